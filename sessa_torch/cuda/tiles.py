"""Helpers of the Triton kernels: products of tiles, workspaces, flags between programs."""

from __future__ import annotations

import triton
import triton.language as tl

# The maximum of a row in which nothing is visible.
NOTHING = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def log_sum(top, total):
    """log(2^top total) in float64, +inf where the total is 0."""
    value = top.to(tl.float64) + tl.log2(tl.where(total == 0, 1.0, total).to(tl.float64))
    return tl.where(total == 0, float("inf"), value / LOG2_E)


@triton.jit
def is_finite(x):
    """False where x is NaN or infinite."""
    return tl.abs(x) < float("inf")


@triton.jit
def log2_prob(s, scale, lse):
    """s scale - lse / log 2 in float32, with lse in float64.

    An lse of 80 rounded to float32 is off by 4e-6, and so would be all weights of its row. A
    rounded product would have the same effect, so product and difference must be fused.
    """
    exact = lse * LOG2_E
    near = exact.to(tl.float32)
    rest = tl.where(exact == float("inf"), 0.0, exact - near).to(tl.float32)
    return tl.fma(s, scale, -near) - rest


@triton.jit
def load_block(
    x, b, row, col, ROWS: tl.constexpr, COLS: tl.constexpr, USE_TMA: tl.constexpr
):
    """A block (ROWS, COLS) of sequence b from row and col on, with zeros outside the tensor.

    x is (pointer, strides of sequences and rows, rows, columns, descriptor). With USE_TMA the
    tensor memory unit, which GPUs from Hopper on have, reads by the descriptor.
    """
    pointer, sb, st, count, width, descriptor = x
    if USE_TMA:
        block = descriptor.load([b, row, col]).reshape(ROWS, COLS)
    else:
        rows, cols = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
        inside = ((rows >= 0) & (rows < count))[:, None] & (cols < width)[None, :]
        at = pointer + b.to(tl.int64) * sb + (rows.to(tl.int64) * st)[:, None] + cols[None, :]
        block = tl.load(at, mask=inside, other=0.0)
    return block


@triton.jit
def score_tile(
    q, k, b, row, col, width, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):
    """Products (BM, BN) in float32 of the rows of q from row on with those of k from col on.

    q and k are as in load_block. width is K, passed at run time so that the loop is not unrolled.
    """
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, width, BK):
        a = load_block(q, b, row, start, BM, BK, USE_TMA)
        c = load_block(k, b, col, start, BN, BK, USE_TMA)
        acc = tl.dot(a, c.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def tile_offsets(rows, cols, BM: tl.constexpr, BK: tl.constexpr):
    """Offsets (rows, cols) in a row tile, which is stored in blocks of BM rows and BK columns.

    So the elements that one step of a product reads lie at fixed distances. Column c * BK lies
    c * BM * BK elements behind column 0.
    """
    return (cols // BK * (BM * BK) + cols % BK)[None, :] + (rows * BK)[:, None]


@triton.jit
def accumulate_tile(
    acc, p, v, at, b, begin, end, first, columns,
    BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, REVERSE: tl.constexpr,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):
    """acc plus the product of columns begin to end of a row tile with the same rows of v.

    The product has BD columns of v, from column `first` on. p is (pointer, descriptor) of a
    workspace with rows of BK elements, in which the tile starts at row `at`; v is as in load_block.
    Whole steps of BK are read, so some columns behind end too. With REVERSE columns and rows are
    counted from the last.
    """
    cells_at = tl.arange(0, BM)[:, None] * BK + tl.arange(0, BK)[None, :]
    for step in range(begin, end, BK):
        start = columns - BK - step if REVERSE else step
        cell = at + start // BK * BM
        a = p[1].load([cell, 0]) if USE_TMA else tl.load(p[0] + cell.to(tl.int64) * BK + cells_at)
        c = load_block(v, b, start, first, BK, BD, USE_TMA)
        acc = tl.dot(a, c, acc, input_precision=PRECISION)
    return acc


@triton.jit
def row_sums(tile, BN: tl.constexpr):
    """Sums (BM,) in float32 of a tile of BN columns.

    The tensor cores sum 16-bit numbers. A sum in float32 would widen them one by one, and the
    compiler then narrows them one by one too, which is much slower than in pairs.
    """
    if tile.dtype == tl.float32:
        return tl.sum(tile, 1)
    # The compiler would put a constant into shared memory, written by all threads of every program.
    ones = tl.where(tl.arange(0, BN)[:, None] + tl.arange(0, 16)[None, :] >= 0, 1.0, 0.0)
    return tl.max(tl.dot(tile, ones.to(tile.dtype)), 1)


@triton.jit
def tile_column(tile, NP, BM: tl.constexpr, REVERSE: tl.constexpr):
    """The first column, in memory, of a tile of columns."""
    return NP - (tile + 1) * BM if REVERSE else tile * BM


@triton.jit
def wait(flag, count):
    """Spin until the flag reaches count; all writes before its signals are visible from then on."""
    seen = tl.atomic_add(flag, 0, sem="acquire")
    while seen < count:
        seen = tl.atomic_add(flag, 0, sem="acquire")
    return seen


@triton.jit
def signal(flag):
    """Raise the flag by one when all threads of the program have written their results."""
    tl.debug_barrier()
    tl.atomic_add(flag, 1, sem="release")


@triton.jit
def start_next_kernel():
    """Let the next kernel start, once all programs of this one have, if it was launched to overlap.

    It sees what this kernel writes only after wait_for_kernel_before.
    """
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], tl.int32, False, 1
    )


@triton.jit
def wait_for_kernel_before():
    """Wait for the end of the kernel that let this one start; what it wrote is then visible."""
    tl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], tl.int32, False, 1)
