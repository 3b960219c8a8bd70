"""feedback_solve: the one operator of Sessa, as a PyTorch custom op with an explicit backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sessa_common.operator import (
    check_arrays,
    check_backend,
    check_precision,
    check_shapes,
    choose_backend,
)
from sessa_torch.feedback import blocked
from sessa_torch.feedback.naive import feedback_solve_naive
from sessa_torch.feedback.outputs import sum_type

__all__ = ["feedback_solve", "feedback_solve_naive"]


def feedback_solve(
    f: Tensor,
    q: Tensor,
    k: Tensor,
    gamma: Tensor,
    *,
    past_s: Tensor | None = None,
    key_mask: Tensor | None = None,
    document_starts: Tensor | None = None,
    backend: str = "auto",
    precision: str = "auto",
) -> Tensor:
    """Solve s_t = f_t + gamma_t sum_{j<t} softmax_j(q_t k_j / sqrt(K)) s_j (arXiv 2604.18580, 3).

    Args: f (B, T, D); q (B, T, K); k (B, P+T, K); gamma (B, T); past_s (B, P, D), states already
    solved; key_mask (B, P+T) bool, True = visible; document_starts (B, T) integers, for each row
    the first one of its document, before which it sees nothing (with neither past_s nor key_mask);
    backend "auto", "naive", "blocked" or "kernel".
    Returns s (B, T, D) in the dtype of f; a row that sees nothing gives s = f. Sums and softmax run
    in float32 (float64 for float64). precision is the type of what the kernels multiply:
    "float32", or "bfloat16", to which float32 operands are rounded while sums and s stay float32
    (16-bit operands are taken as they are); "auto" follows q and k. The other backends do not heed
    it. docs/precision.md has the errors. States that are stored in 16 bits lose more: bfloat16
    tells apart the first 15 positions of the positional code, float16 the first 71 (Lemma 4.10 at
    gain 0.76). Autocast does not change the types of the inputs. sessa_common/operator.py states
    the range of gamma and what happens to numbers that are not finite.
    Raises ValueError or TypeError, naming the argument, for shapes, dtypes or devices that do not
    fit, and ValueError with the reason when the kernel is asked for where it cannot run.
    """
    check_backend(backend)
    check_precision(precision)
    check_arrays(Tensor, f, q, k, gamma, past_s, key_mask, document_starts)
    check_shapes(f, q, k, gamma, past_s, key_mask, document_starts)
    _check_types(f, q, k, gamma, past_s, key_mask, document_starts)
    if torch.onnx.is_in_onnx_export():
        if document_starts is not None:
            raise ValueError("document_starts cannot be exported to ONNX")
        inputs = [f, q, k, gamma, past_s, key_mask]
        while inputs[-1] is None:
            inputs.pop()
        return torch.onnx.ops.symbolic(
            "sessa::FeedbackSolve", inputs, dtype=f.dtype, shape=f.shape, version=1
        )
    if backend == "naive":
        with torch.autocast(f.device.type, enabled=False):
            return feedback_solve_naive(f, q, k, gamma, past_s, key_mask, document_starts)
    # Only who looks at operators needs the custom op, whose dispatch takes longer than a short
    # solve: the compiler, and modes such as that of selective checkpoints.
    solve = _Eager.apply if torch.is_grad_enabled() else _solve
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        solve = _forward
    return solve(f, q, k, gamma, past_s, key_mask, document_starts, backend, precision)[0]


def _check_types(
    f: Tensor,
    q: Tensor,
    k: Tensor,
    gamma: Tensor,
    past_s: Tensor | None,
    key_mask: Tensor | None,
    document_starts: Tensor | None,
) -> None:
    for name, tensor in (("f", f), ("q", q), ("k", k), ("gamma", gamma), ("past_s", past_s)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}, expected a floating type")
    if q.dtype != k.dtype:
        raise TypeError(f"k is {k.dtype}, expected {q.dtype} like q")
    if key_mask is not None and key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask is {key_mask.dtype}, expected torch.bool")
    if document_starts is not None and document_starts.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"document_starts is {document_starts.dtype}, expected an integer type")
    for name, tensor in (
        ("q", q),
        ("k", k),
        ("gamma", gamma),
        ("past_s", past_s),
        ("key_mask", key_mask),
        ("document_starts", document_starts),
    ):
        if tensor is not None and tensor.device != f.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {f.device} like f")


def _implementation(backend: str, f: Tensor, q: Tensor) -> Any:
    """The module whose solve_forward and solve_backward solve on the device of f."""
    kernels: ModuleType | None = None
    if f.device.type == "cuda":
        from sessa_torch.feedback import cuda as kernels
    elif f.device.type == "mps":
        from sessa_torch.feedback import metal as kernels

    def unavailable_reason() -> str | None:
        if kernels is None:
            return f"no kernel for device {f.device.type}"
        return kernels.unavailable_reason(f, q)

    return kernels if choose_backend(backend, unavailable_reason) == "kernel" else blocked


def _solve(
    f: Tensor,
    q: Tensor,
    k: Tensor,
    gamma: Tensor,
    past_s: Tensor | None,
    key_mask: Tensor | None,
    document_starts: Tensor | None,
    backend: str,
    precision: str = "auto",
) -> tuple[Tensor, Tensor]:
    solver = _implementation(backend, f, q)
    options = _options(solver, precision)
    with _no_autocast(f.device):
        return solver.solve_forward(
            f, q, k, gamma, past_s, key_mask, document_starts=document_starts, **options
        )


def _options(solver: Any, precision: str) -> dict[str, Any]:
    """Options of the kernels alone; the other backends have one way to multiply."""
    return {} if solver is blocked else {"precision": precision}


def _no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context without autocast, which would compute the float32 sums of a solve in a low type."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _gradients(
    ds: Tensor,
    q: Tensor,
    k: Tensor,
    gamma: Tensor,
    s: Tensor,
    lse: Tensor,
    past_s: Tensor | None,
    key_mask: Tensor | None,
    document_starts: Tensor | None,
    backend: str,
    precision: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    solver = _implementation(backend, s, q)
    options, tensors = _options(solver, precision), (ds, q, k, gamma, s, lse)
    with _no_autocast(s.device):
        *grads, dpast_s = solver.solve_backward(
            *tensors, past_s, key_mask, document_starts=document_starts, **options
        )
    # A custom op returns tensors only; an empty one stands for "no past".
    return *grads, s.new_empty(0) if dpast_s is None else dpast_s


_forward = torch.library.custom_op("sessa::feedback_solve", _solve, mutates_args=())
_backward = torch.library.custom_op("sessa::feedback_solve_backward", _gradients, mutates_args=())


@_forward.register_fake
def _(f, q, k, gamma, past_s, key_mask, document_starts, backend, precision="auto"):
    lse = f.new_empty(f.shape[:2], dtype=sum_type(f.device))
    return torch.empty_like(f, memory_format=torch.contiguous_format), lse


@_backward.register_fake
def _(ds, q, k, gamma, s, lse, past_s, key_mask, document_starts, backend, precision="auto"):
    like = [s, q, k, gamma] + ([] if past_s is None else [past_s])
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]
    return tuple(grads + ([s.new_empty(0)] if past_s is None else []))


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, q, k, gamma, past_s, key_mask, document_starts, *ctx.ways = inputs
    ctx.has_past = past_s is not None
    ctx.save_for_backward(q, k, gamma, *output, past_s, key_mask, document_starts)


def _by_input(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    df, dq, dk, dgamma, dpast_s = grads
    return df, dq, dk, dgamma, dpast_s if ctx.has_past else None, None, None, None, None


def _differentiate(ctx: Any, ds: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return _by_input(ctx, _backward(ds, *ctx.saved_tensors, *ctx.ways))


_forward.register_autograd(_differentiate, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The same operator without the dispatch of a custom op."""

    # There is no setup_context, with which apply would inspect the signature at every call.
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _solve(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, ds: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        # The custom op raises on a second derivative; this fast path would silently drop it, so it
        # is used only for first derivatives.
        gradients: Any = _backward if torch.is_grad_enabled() else _gradients
        return _by_input(ctx, gradients(ds, *ctx.saved_tensors, *ctx.ways))
