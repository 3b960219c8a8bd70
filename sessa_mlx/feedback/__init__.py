"""feedback_solve: the one operator of Sessa, as an MLX custom function with an explicit vjp."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

from sessa_common.operator import (
    check_arrays,
    check_backend,
    check_precision,
    check_shapes,
    choose_backend,
)
from sessa_mlx._operator import Operator
from sessa_mlx.feedback import blocked, gpu, metal
from sessa_mlx.feedback.naive import feedback_solve_naive

__all__ = ["feedback_solve", "feedback_solve_naive"]


def feedback_solve(
    f: mx.array,
    q: mx.array,
    k: mx.array,
    gamma: mx.array,
    *,
    past_s: mx.array | None = None,
    key_mask: mx.array | None = None,
    document_starts: mx.array | None = None,
    backend: str = "auto",
    precision: str = "auto",
) -> mx.array:
    """Solve s_t = f_t + gamma_t sum_{j<t} softmax_j(q_t k_j / sqrt(K)) s_j (arXiv 2604.18580, 3).

    Args: f (B, T, D); q (B, T, K); k (B, P+T, K); gamma (B, T); past_s (B, P, D), states already
    solved; key_mask (B, P+T) bool, True = visible; document_starts (B, T) integers, for each row
    the first one of its document, before which it sees nothing (with neither past_s nor key_mask);
    backend "auto", "naive", "blocked" or "kernel".
    Returns s (B, T, D) in the dtype of f; a row that sees nothing gives s = f. Sums and softmax run
    in float32 (float64 for float64). precision is the type of the weights and states that a GPU
    multiplies: "float32", or "bfloat16", to which float32 is rounded while sums and s stay float32
    (16-bit arrays are taken as they are); "auto" follows q and k. A CPU multiplies in float32.
    docs/precision.md has the errors. States that are stored in 16 bits lose more: bfloat16 tells
    apart the first 15 positions of the positional code, float16 the first 71 (Lemma 4.10 at gain
    0.76). sessa_common/operator.py states the range of gamma and what happens to numbers that are
    not finite.
    Raises ValueError or TypeError, naming the argument, for shapes or dtypes that do not fit, and
    ValueError with the reason when the kernel is asked for where it cannot run.
    """
    check_backend(backend)
    check_precision(precision)
    check_arrays(mx.array, f, q, k, gamma, past_s, key_mask, document_starts)
    check_shapes(f, q, k, gamma, past_s, key_mask, document_starts)
    _check_types(f, q, k, gamma, past_s, key_mask, document_starts)
    if backend == "naive":
        return feedback_solve_naive(f, q, k, gamma, past_s, key_mask, document_starts)
    module = _implementation(backend, f, q)
    options = () if module is blocked else (("precision", precision),)
    optional = {"past_s": past_s, "key_mask": key_mask, "document_starts": document_starts}
    given = {name: array for name, array in optional.items() if array is not None}
    return _operator(module, options, tuple(given))(f, q, k, gamma, *given.values())[0]


def _check_types(
    f: mx.array,
    q: mx.array,
    k: mx.array,
    gamma: mx.array,
    past_s: mx.array | None,
    key_mask: mx.array | None,
    document_starts: mx.array | None,
) -> None:
    for name, array in (("f", f), ("q", q), ("k", k), ("gamma", gamma), ("past_s", past_s)):
        if array is not None and not mx.issubdtype(array.dtype, mx.floating):
            raise TypeError(f"{name} is {array.dtype}, expected a floating type")
    if q.dtype != k.dtype:
        raise TypeError(f"k is {k.dtype}, expected {q.dtype} like q")
    if key_mask is not None and key_mask.dtype != mx.bool_:
        raise TypeError(f"key_mask is {key_mask.dtype}, expected mlx.core.bool")
    if document_starts is not None and not mx.issubdtype(document_starts.dtype, mx.integer):
        raise TypeError(f"document_starts is {document_starts.dtype}, expected an integer type")


def _implementation(backend: str, f: mx.array, q: mx.array) -> Any:
    """The module whose solve_forward and solve_backward solve on the default device."""
    chosen = choose_backend(backend, lambda: metal.unavailable_reason(f, q))
    if chosen == "kernel":
        return metal
    return gpu if mx.default_device().type == mx.DeviceType.gpu else blocked


@cache
def _operator(solve: Any, options: tuple[tuple[str, str], ...], given: tuple[str, ...]) -> Operator:
    """The differentiable operator over f, q, k, gamma and the optional arrays of these names.

    `options` are keyword arguments of both passes of the module `solve`.
    """

    def forward(*arrays: mx.array) -> tuple[mx.array, mx.array]:
        optional = dict(zip(given, arrays[4:], strict=True))
        return solve.solve_forward(*arrays[:4], **optional, **dict(options))

    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        optional = dict(zip(given, primals[4:], strict=True))
        *grads, dpast_s = solve.solve_backward(
            cotangents[0], *primals[1:4], *outputs, **optional, **dict(options)
        )
        others = {name: mx.zeros_like(array) for name, array in optional.items()}
        return (*grads, *(others | ({"past_s": dpast_s} if "past_s" in others else {})).values())

    return Operator(forward, backward)
