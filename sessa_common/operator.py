"""Rules for the arguments of `feedback_solve` that both frameworks share.

A gain gamma may have any size: the definition, the blocks, the Metal kernels, the native operator
and the ONNX body are as accurate as substitution, which is tested up to |gamma| = 10. The CUDA
kernels are made for |gamma| <= 1, which a model's gains never exceed: they invert their tiles by
powers of N, which lose digits for larger gains. No value is checked, because a check would wait for
the device.

A hidden key has no influence, whatever it and its state hold, and its gradients are 0. A row that
is not finite changes no row before it; the CUDA kernels promise this between tiles of rows, not
within one, where a guard would slow down every solve. What is not finite in one document of a row
may spoil the documents behind it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

BACKENDS = ("auto", "naive", "blocked", "kernel")
PRECISIONS = ("auto", "float32", "bfloat16")
log = logging.getLogger("sessa")


def check_arrays(
    kind: type,
    f: Any,
    q: Any,
    k: Any,
    gamma: Any,
    past_s: Any,
    key_mask: Any,
    document_starts: Any = None,
) -> None:
    """Raise TypeError that names the argument unless every argument is an array of this kind.

    past_s, key_mask and document_starts may be None.
    """
    for name, array in (("f", f), ("q", q), ("k", k), ("gamma", gamma)):
        if not isinstance(array, kind):
            raise TypeError(f"{name} is a {type(array).__name__}, expected a {kind.__name__}")
    optional = {"past_s": past_s, "key_mask": key_mask, "document_starts": document_starts}
    for name, array in optional.items():
        if array is not None and not isinstance(array, kind):
            raise TypeError(f"{name} is a {type(array).__name__}, expected a {kind.__name__}")


def check_shapes(
    f: Any, q: Any, k: Any, gamma: Any, past_s: Any, key_mask: Any, document_starts: Any = None
) -> None:
    """Raise ValueError that names the argument unless all shapes fit one feedback solve.

    f (B, T, D), q (B, T, K), k (B, P+T, K), gamma (B, T), past_s (B, P, D), key_mask (B, P+T),
    document_starts (B, T), which goes with neither of the last two.
    """
    for name, array in (("f", f), ("q", q), ("k", k)):
        if array.ndim != 3:
            raise ValueError(f"{name} has shape {tuple(array.shape)}, expected three dimensions")
    B, T, D = f.shape
    K = q.shape[2]
    if T < 1 or D < 1 or K < 1 or B < 1:
        raise ValueError(f"f {tuple(f.shape)} and q {tuple(q.shape)} must not be empty")
    P = k.shape[1] - T
    if P < 0:
        raise ValueError(f"k has {k.shape[1]} rows, expected at least the {T} rows of f")
    if past_s is None and P > 0:
        raise ValueError(f"k has {P} more rows than f, so past_s (B, {P}, D) is needed")
    wanted = {
        "q": (q, (B, T, K)),
        "k": (k, (B, P + T, K)),
        "gamma": (gamma, (B, T)),
        "past_s": (past_s, (B, P, D)),
        "key_mask": (key_mask, (B, P + T)),
        "document_starts": (document_starts, (B, T)),
    }
    for name, (array, shape) in wanted.items():
        if array is not None and tuple(array.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(array.shape)}, expected {shape}")
    if document_starts is not None and (past_s is not None or key_mask is not None):
        raise ValueError("document_starts goes with neither past_s nor key_mask")


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is one of BACKENDS."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")


def check_precision(precision: str) -> None:
    """Raise ValueError unless `precision` is one that exists."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")


@cache
def _say_once(message: str) -> None:
    log.info(message)


def choose_backend(backend: str, unavailable_reason: Callable[[], str | None]) -> str:
    """Resolve "auto" to "kernel" or "blocked"; the choice and its reason are logged once.

    `unavailable_reason` returns the reason why the kernel cannot run here, or None. Raises
    ValueError with that reason when `backend` is "kernel" and the kernel cannot run.
    """
    if backend not in ("auto", "kernel"):
        return backend
    reason = unavailable_reason()
    if backend == "kernel" and reason:
        raise ValueError(f"backend 'kernel' cannot run here: {reason}")
    if backend == "auto":
        _say_once(f"feedback_solve uses {f'blocked: {reason}' if reason else 'kernel'}")
    return "blocked" if reason else "kernel"
