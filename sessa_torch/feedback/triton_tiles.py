"""What the Triton kernels share: products of tiles, sums of their rows, how workspaces lie."""

from __future__ import annotations

import triton
import triton.language as tl

# The maximum of a row in which nothing is visible.
NOTHING = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def log_sum(top, total):
    """log(2^top total) in float64, +inf where the total is 0."""
    value = top.to(tl.float64) + tl.log2(tl.where(total > 0, total, 1.0).to(tl.float64))
    return tl.where(total > 0, value / LOG2_E, float("inf"))


@triton.jit
def relative(s, lse):
    """s - lse for s in float32 and in units of log 2, lse in float64.

    In float32 an lse of 80 is off by 4e-6, and so would be all the weights of its row.
    """
    exact = lse * LOG2_E
    near = exact.to(tl.float32)
    return s - near - tl.where(exact == float("inf"), 0.0, exact - near).to(tl.float32)


@triton.jit
def score_tile(
    q, k, width, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Products (BM, BN) in float32; q (BM, 1) and k (1, BN) point to the start of their rows.

    width is K, passed at run time so that the loop is not unrolled.
    """
    inner = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, width, BK):
        if K % BK == 0:
            a = tl.load(q + (start + inner)[None, :])
            b = tl.load(k + (start + inner)[:, None])
        else:
            inside = start + inner < K
            a = tl.load(q + (start + inner)[None, :], mask=inside[None, :], other=0.0)
            b = tl.load(k + (start + inner)[:, None], mask=inside[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def cells(rows, cols, BM: tl.constexpr, BK: tl.constexpr):
    """Offsets (rows, cols) in a row tile, which is stored in blocks of BM rows and BK columns.

    The cells that one step of a product reads are then a fixed distance apart. Column c BK is c BM
    BK further than column 0.
    """
    return (cols // BK * (BM * BK) + cols % BK)[None, :] + (rows * BK)[:, None]


@triton.jit
def product(
    acc, p, v, stride, begin, end, first, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    BK: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + columns begin to end of a row tile times these rows of v, BD columns from first on.

    Without RAGGED whole steps of BK rows are read, so also rows from end on.
    """
    inner, d = tl.arange(0, BK), tl.arange(0, BD)
    p_at = cells(tl.arange(0, BM), inner, BM, BK)
    v_at = (inner * stride)[:, None] + d[None, :]
    for start in range(begin, end, BK):
        a = tl.load(p + start * BM + p_at)
        b = v + ((tl.zeros((), tl.int64) + start) * stride + first) + v_at
        if RAGGED:
            b_ok = (start + inner < end)[:, None] & (first + d < D)[None, :]
            b = tl.load(b, mask=b_ok, other=0.0)
        else:
            b = tl.load(b) if D % BD == 0 else tl.load(b, mask=(first + d < D)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def row_sums(tile, BN: tl.constexpr):
    """Sums (BM,) in float32 of a tile of BN columns.

    16-bit numbers are summed by the tensor cores: where they are widened one by one, the compiler
    narrows them one by one too, which is much slower than in pairs.
    """
    if tile.dtype == tl.float32:
        return tl.sum(tile, 1)
    return tl.max(tl.dot(tile, tl.full((BN, 16), 1.0, tile.dtype)), 1)
