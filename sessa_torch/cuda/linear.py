"""Linear layers of a few rows on CUDA, with what stands before and behind them in one kernel.

A few rows are bound by reading the weights, which is done once. So small a kernel takes no longer
than its start and its first read, therefore the weights of its first step are requested before it
waits for the kernel before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_torch.cuda.device import num_sms
from sessa_torch.cuda.launch import launch_options, power_of_two, prepared
from sessa_torch.cuda.tiles import start_next_kernel, wait_for_kernel_before


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a program: rows, columns of the result, columns of a step of products and of sums.

    `whole` steps are held in registers, the first of them before the kernel waits for the one
    before. Long results may have up to `most_columns` a program.
    """

    rows: int
    columns: int
    inner: int
    normed: int
    whole: bool
    most_columns: int
    warps: int = 4
    stages: int = 3

    def constants(self, K: int) -> dict[str, Any]:
        """Constants of a kernel whose rows have K columns."""
        fits = power_of_two(K, 16)
        return {
            "ROWS": self.rows, "BN": self.columns, "BK": min(fits, self.inner),
            "BS": min(fits, self.normed), "WHOLE": self.whole, "STAGES": self.stages,
            "PRECISION": "ieee", "num_warps": self.warps,
        }


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A layer norm of the rows that a linear layer multiplies, or without a bias an RMSNorm."""

    weight: Tensor  # (K,)
    bias: Tensor | None  # (K,)
    eps: float


# One row is multiplied and summed without tensor cores.
ONE_ROW = Sizes(rows=1, columns=8, most_columns=16, inner=1024, normed=1024, whole=True)
FEW_ROWS = Sizes(
    rows=16, columns=16, most_columns=32, inner=1024, normed=1024, whole=True, warps=8
)
FEW_WIDE_ROWS = Sizes(rows=16, columns=16, most_columns=32, inner=128, normed=512, whole=False)
MANY_ROWS = Sizes(rows=64, columns=64, most_columns=64, inner=64, normed=128, whole=False)


def sizes(rows: int, dtype: torch.dtype) -> Sizes:
    """The sizes for so many rows of this type."""
    if rows > 64:
        return MANY_ROWS
    if rows > 1:
        return FEW_ROWS if dtype.itemsize == 2 else FEW_WIDE_ROWS
    return ONE_ROW


def linear(
    x: Tensor,  # (R, K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None = None,  # (N,)
    *,
    norm: Norm | None = None,
    plus: Tensor | None = None,  # (R, K)
    times: Tensor | None = None,  # (R, K)
    gelu: int = 0,
    gate: tuple[Tensor, Tensor | None] | None = None,  # (N, K), (N,)
    residual: Tensor | None = None,  # (R, N)
    more: Tensor | None = None,  # (R, N)
    out: Tensor,  # (R, N)
) -> Tensor:
    """out = y W^T + bias + residual + more for a few rows, where y is x plus or times another.

    `norm` is a norm of y. Before the residuals are added, the first `gelu` columns of the result go
    through gelu, and with `gate`, weight and bias of a second linear layer of y with a bias where
    the first has one, the result is multiplied by silu of the second's. `x` and `times` may be
    columns of wider rows.
    """
    (R, K), N = x.shape, weight.shape[0]
    second = plus if plus is not None else times
    gate_weight, gate_bias = gate if gate is not None else (weight, bias)
    size = sizes(R, weight.dtype)
    # Few columns a program keep all multiprocessors busy; with many, rows are normed less often.
    while size.columns < size.most_columns and 4 * size.columns * num_sms(x.device) < N:
        size = replace(size, columns=2 * size.columns)
    prepared(
        linear_kernel, K=K, N=N, GELU=gelu, GATE=gate is not None,
        SECOND=(plus is not None) + 2 * (times is not None), **norm_constants(norm),
        BIAS=bias is not None, RESIDUAL=residual is not None, MORE=more is not None,
        **size.constants(K), **launch_options(x.device),
    ).launch(
        (-(-N // size.columns), -(-R // size.rows)),
        (x, x if second is None else second, *norm_tensors(norm, weight), weight,
         weight if bias is None else bias, gate_weight, weight if gate_bias is None else gate_bias,
         out if residual is None else residual, out if more is None else more, out),
        (), (x.stride(0), 0 if second is None else second.stride(0), R),
    )
    return out


def norm_constants(norm: Norm | None) -> dict[str, Any]:
    """Constants of a kernel that norms its rows."""
    if norm is None:
        return {"NORM": False, "RMS": False, "EPS": 0.0}
    return {"NORM": True, "RMS": norm.bias is None, "EPS": norm.eps}


def norm_tensors(norm: Norm | None, absent: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias as pointers; a kernel does not read those that are absent."""
    if norm is None:
        return absent, absent
    return norm.weight, norm.weight if norm.bias is None else norm.bias


@triton.jit
def input_rows(
    x, second, norm_weight, norm_bias, rows, cols, sx, ss, R, mean, scale,
    K: tl.constexpr, SECOND: tl.constexpr, NORM: tl.constexpr, RMS: tl.constexpr,
):
    """Columns of the rows that a linear layer multiplies, in float32; zeros outside."""
    ok = (rows < R)[:, None] & (cols < K)[None, :]
    row = rows.to(tl.int64)[:, None]
    given = tl.load(x + row * sx + cols[None, :], mask=ok, other=0.0)
    y = given.to(tl.float32)
    if SECOND > 0:
        other = tl.load(second + row * ss + cols[None, :], mask=ok, other=0.0).to(tl.float32)
        # A sum is rounded as the residual stream that it is.
        y = (y + other).to(given.dtype).to(tl.float32) if SECOND == 1 else y * other
    if NORM:
        weight = tl.load(norm_weight + cols, mask=cols < K, other=0.0).to(tl.float32)
        if RMS:
            y = y * scale[:, None] * weight[None, :]
        else:
            bias = tl.load(norm_bias + cols, mask=cols < K, other=0.0).to(tl.float32)
            y = (y - mean[:, None]) * scale[:, None] * weight[None, :] + bias[None, :]
            y = tl.where(ok, y, 0.0)
    return y


@triton.jit
def norm_of_rows(
    x, second, rows, sx, ss, R, K: tl.constexpr, BS: tl.constexpr, ROWS: tl.constexpr,
    SECOND: tl.constexpr, RMS: tl.constexpr, EPS: tl.constexpr,
):
    """Mean and 1 / sqrt(variance + EPS) of rows, in two passes; with RMS the mean counts as 0."""
    none = tl.zeros((ROWS,), tl.float32)
    mean, squares = none, none
    if not RMS:
        for start in tl.static_range(0, K, BS):
            cols = start + tl.arange(0, BS)
            y = input_rows(
                x, second, x, x, rows, cols, sx, ss, R, none, none, K, SECOND, False, False
            )
            mean += tl.sum(y, 1)
        mean = mean / K
    for start in tl.static_range(0, K, BS):
        cols = start + tl.arange(0, BS)
        y = input_rows(
            x, second, x, x, rows, cols, sx, ss, R, none, none, K, SECOND, False, False
        )
        y = tl.where((cols < K)[None, :], y - mean[:, None], 0.0)
        squares += tl.sum(y * y, 1)
    return mean, tl.rsqrt(squares / K + EPS)


@triton.jit
def products(
    x, second, norm_weight, norm_bias, w, rows, n, width, sx, ss, R,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, ROWS: tl.constexpr,
    SECOND: tl.constexpr, NORM: tl.constexpr, RMS: tl.constexpr, EPS: tl.constexpr,
    WHOLE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):
    """Products (ROWS, BN) in float32 of the rows with rows n of w, of which there are `width`."""
    PARTS: tl.constexpr = BK // 128 if BK > 128 else 1
    inner, n_ok = tl.arange(0, BK), n < width
    w_at = w + n.to(tl.int64)[:, None] * K + inner[None, :]
    acc = tl.zeros((ROWS, BN), tl.float32)
    if WHOLE:
        tile = tl.load(w_at, mask=n_ok[:, None] & (inner < K)[None, :], other=0.0)
    if OVERLAP:
        start_next_kernel()
        wait_for_kernel_before()
    mean, scale = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    if NORM:
        mean, scale = norm_of_rows(x, second, rows, sx, ss, R, K, BS, ROWS, SECOND, RMS, EPS)
    if WHOLE:
        for start in tl.static_range(0, K, BK):
            cols = start + inner
            y = input_rows(
                x, second, norm_weight, norm_bias, rows, cols, sx, ss, R, mean, scale,
                K, SECOND, NORM, RMS,
            ).to(tile.dtype)
            if ROWS == 1:
                acc += tl.sum(tile.to(tl.float32) * y.to(tl.float32), 1)[None, :]
            else:
                # Every warp has columns of its own, and their products are added at the end.
                left = y.reshape(ROWS, PARTS, BK // PARTS).permute(1, 0, 2)
                right = tile.reshape(BN, PARTS, BK // PARTS).permute(1, 2, 0)
                acc += tl.sum(tl.dot(left, right, input_precision=PRECISION), 0)
            if start + BK < K:
                cols += BK
                tile = tl.load(
                    w_at + start + BK, mask=n_ok[:, None] & (cols < K)[None, :], other=0.0
                )
    else:
        for start in tl.range(0, K, BK, num_stages=STAGES):
            cols = start + inner
            tile = tl.load(w_at + start, mask=n_ok[:, None] & (cols < K)[None, :], other=0.0)
            y = input_rows(
                x, second, norm_weight, norm_bias, rows, cols, sx, ss, R, mean, scale,
                K, SECOND, NORM, RMS,
            )
            acc = tl.dot(y.to(tile.dtype), tile.T, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["R"])
def linear_kernel(
    x, second, norm_weight, norm_bias, w, bias, gate_w, gate_bias, residual, more, out, sx, ss, R,
    K: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr,
    ROWS: tl.constexpr, SECOND: tl.constexpr, NORM: tl.constexpr, RMS: tl.constexpr,
    EPS: tl.constexpr, GELU: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, MORE: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):
    """BN columns of a linear layer of ROWS rows; SECOND is 1 to add inputs, 2 to multiply them."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    acc = products(
        x, second, norm_weight, norm_bias, w, rows, n, N, sx, ss, R,
        K, BN, BK, BS, ROWS, SECOND, NORM, RMS, EPS, WHOLE, STAGES, PRECISION, OVERLAP,
    )
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GATE:
        gate = products(
            x, second, norm_weight, norm_bias, gate_w, rows, n, N, sx, ss, R,
            K, BN, BK, BS, ROWS, SECOND, NORM, RMS, EPS, WHOLE, STAGES, PRECISION, False,
        )
        if BIAS:
            gate += tl.load(gate_bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        acc *= gate / (1 + tl.exp(-gate))
    if GELU > 0:
        acc = tl.where((n < GELU)[None, :], 0.5 * acc * (1 + tl.erf(acc * 0.7071067811865476)), acc)
    at = rows.to(tl.int64)[:, None] * N + n[None, :]
    ok = (rows < R)[:, None] & (n < N)[None, :]
    if RESIDUAL:
        base = tl.load(residual + at, mask=ok, other=0.0)
        known = base.to(tl.float32)
        if MORE:
            other = tl.load(more + at, mask=ok, other=0.0).to(tl.float32)
            known = (known + other).to(base.dtype).to(tl.float32)
        acc += known
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=ok)
