"""Every path of the feedback solve against float64, outputs and all gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sessa_common.reference.ops import feedback_solve, feedback_solve_backward
from sessa_common.selftest.rows import Row, judge, skipped
from sessa_common.selftest.twin import Twin

# Relative errors, norm over norm, that a correct path stays far below.
LIMITS = {"float32": 5e-6, "float16": 2e-3, "bfloat16": 1.5e-2}
# The error of float32 products whose operands have the 11 bits of TF32.
TF32_LIMIT = 2e-3
NAMES = ("s", "df", "dq", "dk", "dgamma", "dpast_s")


@dataclass(frozen=True)
class Size:
    """B sequences of T tokens after P past ones, widths D and K."""

    B: int
    T: int
    D: int
    K: int
    P: int = 0
    masked: bool = False

    def __str__(self) -> str:
        past = f" P{self.P}" if self.P else ""
        return f"B{self.B} T{self.T}{past} D{self.D} K{self.K}{' masked' if self.masked else ''}"


CHECKED = (
    Size(2, 130, 40, 24),
    Size(1, 300, 72, 40, P=21, masked=True),
    Size(2, 1, 40, 24, P=75, masked=True),
    # Odd widths, whose rows no kernel can read with aligned loads.
    Size(2, 90, 37, 13, P=21),
)


def check_solve(twin: Twin) -> Iterator[Row]:
    """A row for each path and dtype, with the worst error of all sizes."""
    reason = _kernel_unavailable(twin)
    for path in ("naive", "blocked", "kernel"):
        check = f"solve, {path}"
        if path == "kernel" and reason:
            yield skipped(twin, check, "", reason)
            continue
        for dtype, allowed in LIMITS.items():
            errors = {
                f"{name} at {size}": error
                for size in CHECKED
                for name, error in solve_errors(twin, path, dtype, size).items()
            }
            worst = max(errors, key=lambda place: np.nan_to_num(errors[place], nan=np.inf))
            verdict = judge(errors[worst], allowed, TF32_LIMIT if dtype == "float32" else None)
            yield Row(
                framework=twin.name,
                device=twin.device_name,
                check=check,
                precision=dtype,
                measured=errors[worst],
                allowed=allowed,
                detail=worst,
                verdict=verdict,
            )


def _kernel_unavailable(twin: Twin) -> str:
    tiny = {name: twin.array(a, "float32") for name, a in draw(Size(1, 2, 4, 4)).items()}
    run, arrays = bind(twin, tiny, "kernel")
    try:
        run(*arrays)
    except ValueError as reason:
        return str(reason)
    return ""


def solve_errors(twin: Twin, path: str, dtype: str, size: Size) -> dict[str, float]:
    """Relative error of s and of every gradient, norm over norm."""
    arrays = {name: twin.array(array, dtype) for name, array in draw(size).items()}
    # The reference gets the numbers after rounding to the type.
    exact = {
        name: array if array.dtype == bool else _float64(twin, arrays[name])
        for name, array in draw(size).items()
    }
    ds, exact_ds = arrays.pop("ds"), exact.pop("ds")
    run, inputs = bind(twin, arrays, path)
    got = [_float64(twin, value) for value in twin.vjp(run, inputs, ds)]
    want = [feedback_solve(**exact), *feedback_solve_backward(exact_ds, **exact)]
    return {
        name: float(np.linalg.norm(a - w) / np.maximum(np.linalg.norm(w), 1e-30))
        for name, a, w in zip(NAMES, got, want, strict=False)
        if w is not None
    }


def draw(size: Size) -> dict[str, np.ndarray]:
    """Draw f, q, k, gamma and ds in float32, and past_s and key_mask where the size has them."""
    random = np.random.default_rng(0)
    B, T, D, K, P = size.B, size.T, size.D, size.K, size.P
    shapes = {"f": (B, T, D), "q": (B, T, K), "k": (B, P + T, K), "ds": (B, T, D)}
    if P:
        shapes["past_s"] = (B, P, D)
    given = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    given["gamma"] = random.choice([0.9, -0.7, 0.0, 0.999, -0.999, 0.3], (B, T))
    drawn: dict[str, np.ndarray] = {n: array.astype(np.float32) for n, array in given.items()}
    if size.masked:
        drawn["key_mask"] = random.random((B, P + T)) > 0.3
    return drawn


def bind(twin: Twin, drawn: dict[str, Any], backend: str) -> tuple[Callable[..., Any], list[Any]]:
    """Return the solve as a function of its differentiable arrays, and those arrays."""
    names = [name for name in ("f", "q", "k", "gamma", "past_s") if name in drawn]
    mask = drawn.get("key_mask")

    def run(*arrays: Any) -> Any:
        past_s = arrays[4] if len(arrays) > 4 else None
        return twin.solve(*arrays[:4], past_s=past_s, key_mask=mask, backend=backend)

    return run, [drawn[name] for name in names]


def _float64(twin: Twin, value: Any) -> np.ndarray:
    return twin.numpy(value).astype(np.float64)
