"""Triton kernels for the gradients of q, k and gamma, given u, the gradient of f.

A chunk of query rows at a time, in a workspace of chunk x columns: the probabilities alpha; from
them r = rowsum(alpha <u, s>); over them the score gradients gamma alpha (u s^T - r); from those dq
and dk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sessa_torch.cuda.tiles import accumulate_tile, load_block, log2_prob, score_tile, tile_offsets

# Sizes for which no kernel of its own is compiled.
COUNTS = ["first", "chunk", "T", "past"]


@triton.jit
def load_unit(unit, p):
    """The factor of the score gradients in p: 1 but in float16, whose range is small."""
    return tl.load(unit) if p.dtype.element_ty == tl.float16 else 1.0


@triton.jit
def window_offsets(p, row, NP, window, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Pointers (BM, BN) to a window of columns in the row tile that starts at this row of p."""
    return (
        p + row * NP + window * (BN * BM) + tile_offsets(tl.arange(0, BM), tl.arange(0, BN), BM, BK)
    )


@triton.jit
def first_block(b, tile, chunk, NP, BM: tl.constexpr, BK: tl.constexpr):
    """The row of p's blocks, see product, in which a row tile of the chunk starts."""
    return (b * chunk + tile * BM) * (NP // BK)


@triton.jit(do_not_specialize=COUNTS)
def probabilities_kernel(
    q, k, lse, mask, p, q_blocks, k_blocks, sqb, sqt, skb, skt,
    first, chunk, T, past, NP, width, scale2, shift,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    MASKED: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """2^shift alpha of one tile of rows and columns into the workspace p (B, chunk, NP).

    Row tiles are stored in blocks, see cells.
    """
    b = tl.program_id(2).to(tl.int64)
    first_row, first_col = first + tl.program_id(1) * BM, tl.program_id(0) * BN
    rows, cols = first_row + tl.arange(0, BM), first_col + tl.arange(0, BN)
    if first_col < tl.cdiv(past + first_row + BM, BM) * BM:
        rows_ok = rows < T
        cols_ok = cols < past + T
        s = score_tile(
            (q, sqb, sqt, T, width, q_blocks), (k, skb, skt, past + T, width, k_blocks),
            tl.program_id(2), first_row, first_col, width, BM, BN, BK, USE_TMA, PRECISION,
        )  # fmt: skip
        sums = tl.load(lse + b * T + rows, mask=rows_ok, other=float("inf"))
        e = tl.exp2(log2_prob(s, scale2, sums[:, None]) + shift)
        seen = (cols[None, :] < past + rows[:, None]) & cols_ok[None, :]
        if MASKED:
            shown = tl.load(mask + b * (past + T) + cols, mask=cols_ok, other=0) != 0
            seen = seen & shown[None, :]
        e = tl.where(seen, e, 0.0)
        at = window_offsets(p, b * chunk + tl.program_id(1) * BM, NP, tl.program_id(0), BM, BN, BK)
        tl.store(at, e.to(p.dtype.element_ty))


@triton.jit(do_not_specialize=COUNTS)
def means_kernel(
    p, u, states, r, u_blocks, s_blocks, sub, sut, ssb, sst,
    first, chunk, T, past, NP, width, shift,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """rowsum(alpha <u, s>) of one row tile over its share of the windows, into r (parts, B, T).

    <u, s> is what score_gradients_kernel finds, bit for bit: in a row that sees hardly more than
    one key the score gradient is a small difference of the two.
    """
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    first_row = first + tile * BM
    rows = first_row + tl.arange(0, BM)
    stop = tl.minimum(past + first_row + BM, past + T)
    total = tl.zeros((BM,), tl.float32)
    for first_col in range(tl.program_id(0) * BN, stop, tl.num_programs(0) * BN):
        # Before the product, so that it is there when the product is.
        alpha = tl.load(window_offsets(p, b * chunk + tile * BM, NP, first_col // BN, BM, BN, BK))
        dP = score_tile(
            (u, sub, sut, T, width, u_blocks), (states, ssb, sst, past + T, width, s_blocks),
            tl.program_id(2), first_row, first_col, width, BM, BN, BK, USE_TMA, PRECISION,
        )  # fmt: skip
        total += tl.sum(alpha.to(tl.float32) * dP, 1)
    at = r + (tl.program_id(0) * tl.num_programs(2) + b) * T + rows
    tl.store(at, total * tl.exp2(-shift), mask=rows < T)


@triton.jit(do_not_specialize=COUNTS)
def score_gradients_kernel(
    p, u, states, gamma, r, dgamma, unit, u_blocks, s_blocks, sub, sut, ssb, sst,
    first, chunk, T, past, NP, width, shift,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Replace 2^shift alpha in the workspace by unit gamma alpha (<u, s> - r); r is dgamma too."""
    b = tl.program_id(2).to(tl.int64)
    first_row, first_col = first + tl.program_id(1) * BM, tl.program_id(0) * BN
    rows = first_row + tl.arange(0, BM)
    if first_col < tl.cdiv(past + first_row + BM, BM) * BM:
        rows_ok = rows < T
        dP = score_tile(
            (u, sub, sut, T, width, u_blocks), (states, ssb, sst, past + T, width, s_blocks),
            tl.program_id(2), first_row, first_col, width, BM, BN, BK, USE_TMA, PRECISION,
        )  # fmt: skip
        mean = tl.zeros((BM,), tl.float32)
        for part in tl.static_range(PARTS):
            mean += tl.load(r + (part * tl.num_programs(2) + b) * T + rows, mask=rows_ok, other=0.0)
        if tl.program_id(0) == 0:
            tl.store(dgamma + b * T + rows, mean.to(dgamma.dtype.element_ty), mask=rows_ok)
        gain = tl.load(gamma + b * T + rows, mask=rows_ok, other=0.0)
        gain = gain.to(tl.float32) * load_unit(unit, p) * tl.exp2(-shift)
        at = window_offsets(p, b * chunk + tl.program_id(1) * BM, NP, tl.program_id(0), BM, BN, BK)
        alpha = tl.load(at).to(tl.float32)
        tl.store(at, (alpha * gain[:, None] * (dP - mean[:, None])).to(p.dtype.element_ty))


@triton.jit(do_not_specialize=[*COUNTS, "row_tasks", "last"])
def products_kernel(
    p, q, k, dq, dk, dk_sum, unit, p_blocks, q_blocks, k_blocks, sqb, sqt, skb, skt,
    first, chunk, T, past, NP, scale, row_tasks, last,
    K: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of the chunk's rows, and what the chunk adds to dk_sum; the last chunk writes dk.

    dq, dk and dk_sum are contiguous; dk_sum starts as zeros.
    """
    PARTS: tl.constexpr = (K + BD - 1) // BD
    task = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    d = (task % PARTS) * BD + tl.arange(0, BD)
    d_ok = (d < K)[None, :]
    acc = tl.zeros((BM, BD), tl.float32)
    scale = scale / load_unit(unit, p)
    if task < row_tasks:
        tile = (row_tasks - 1 - task) // PARTS
        rows = first + tile * BM + tl.arange(0, BM)
        stop = tl.minimum(past + first + (tile + 1) * BM, past + T)
        acc = accumulate_tile(
            acc, (p, p_blocks), (k, skb, skt, past + T, K, k_blocks),
            first_block(tl.program_id(1), tile, chunk, NP, BM, BK), tl.program_id(1), 0, stop,
            task % PARTS * BD, NP, BM, BD, BK, False, USE_TMA, PRECISION,
        )  # fmt: skip
        dq_at = dq + (b * T + rows[:, None]) * K + d[None, :]
        tl.store(dq_at, (acc * scale).to(dq.dtype.element_ty), mask=(rows < T)[:, None] & d_ok)
    else:
        tile = (task - row_tasks) // PARTS
        cols = tile * BM + tl.arange(0, BM)
        a_at = tile * (BM * BM) + tile_offsets(tl.arange(0, BK), tl.arange(0, BM), BM, BK)
        begin = tl.maximum(tile * BM - past - first, 0) // BM * BM
        for start in range(begin, tl.minimum(chunk, T - first), BK):
            a = tl.load(p + (b * chunk + start // BM * BM) * NP + (start % BM * BK) + a_at)
            c = load_block(
                (q, sqb, sqt, T, K, q_blocks), tl.program_id(1), first + start, task % PARTS * BD,
                BK, BD, USE_TMA,
            )  # fmt: skip
            acc = tl.dot(tl.trans(a), c, acc, input_precision=PRECISION)
        dk_at = (b * (past + T) + cols[:, None]) * K + d[None, :]
        dk_ok = (cols < past + T)[:, None] & d_ok
        acc *= scale
        if first > 0:
            acc += tl.load(dk_sum + dk_at, mask=dk_ok, other=0.0)
        if last:
            tl.store(dk + dk_at, acc.to(dk.dtype.element_ty), mask=dk_ok)
        else:
            tl.store(dk_sum + dk_at, acc, mask=dk_ok)
