"""The two tasks of the solve kernel that read no solved row: scores, and softmax with inverse."""

from __future__ import annotations

import triton
import triton.language as tl

from sessa_torch.cuda.tiles import (
    NOTHING,
    log2_prob,
    log_sum,
    row_sums,
    score_tile,
    signal,
    tile_column,
    tile_offsets,
    wait,
)

# Number of tiles before a row tile whose part in it goes through Y.
LINKS = tl.constexpr(2)


@triton.jit
def scores_task(
    q, k, lse, mask, p, stats, ref_ring, ref_done, scores_done, b, row, chunk, T, P, NP, NW, width,
    begin, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr,
    USE_TMA: tl.constexpr,
    SCALE: tl.constexpr, HEADROOM: tl.constexpr, SHIFT: tl.constexpr,
    REVERSE: tl.constexpr, MASKED: tl.constexpr, DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Windows of BN columns, counted down from the diagonal, of the probabilities of one row tile.

    A window is stored relative to the row's maximum in window 1, which all rows see, or relative to
    its own maximum where that is more than HEADROOM higher. So few rows need rescaling and none
    overflows. Window 1 comes first; the other chunks compute their first product before they wait
    for its maximum. Windows that end before column `begin`, which no row sees, are left out.
    """
    local, inner = tl.arange(0, BM), tl.arange(0, BN)
    cells_at = tile_offsets(local, inner, BM, BK)
    columns = T if REVERSE else P + T
    rows = row * BM + (BM - 1 - local if REVERSE else local)
    # Rows outside the sequence are masked or unused.
    first_row = P + T - (row + 1) * BM if REVERSE else row * BM - P
    end = tl.minimum((row + 1) * BM, NP)
    windows = tl.cdiv(end - begin, BN)
    ref = tl.full((BM,), NOTHING, tl.float32)
    if REVERSE:
        rows_ok = rows < P + T
        if MASKED:
            rows_ok = rows_ok & (tl.load(mask + tl.maximum(P + T - 1 - rows, 0)) != 0)
    for turn in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, windows)):
        window = tl.where(turn < tl.minimum(windows, 2) - 1, 1, tl.where(turn == 1, 0, turn))
        first = end - (window + 1) * BN
        cols = first + (BN - 1 - inner if REVERSE else inner)
        near_cols = tl.minimum(tl.maximum(cols, 0), columns - 1)
        if REVERSE:
            near_cols = T - 1 - near_cols
        first_col = T - BN - first if REVERSE else first
        if REVERSE and PRECISION == "tf32x3":
            # The operands change places, so that float32 scores equal those of the forward pass.
            s = score_tile(k, q, b, first_col, first_row, width, BN, BM, BK, USE_TMA, PRECISION)
            s = tl.trans(s)
        else:
            s = score_tile(q, k, b, first_row, first_col, width, BM, BN, BK, USE_TMA, PRECISION)
        if REVERSE:
            s = log2_prob(s, SCALE, tl.load(lse + near_cols)[None, :])
            s = tl.where(rows_ok[:, None], s, float("-inf"))
        elif MASKED:
            s = tl.where((tl.load(mask + near_cols) != 0)[None, :], s, float("-inf"))
        if DOCUMENTS:
            # A row and a column in memory's order; backward in time the rows are the keys.
            row_starts = tl.load(mask + (near_cols if REVERSE else tl.minimum(rows, T - 1)))
            if REVERSE:
                same = row_starts[None, :] <= (T - 1 - rows)[:, None]
            else:
                same = row_starts[:, None] <= near_cols[None, :]
            s = tl.where(same, s, float("-inf"))
        if (first < 0) | (first + BN > tl.minimum(row * BM, columns)):
            seen = (cols >= 0) & (cols < columns)
            s = tl.where((cols[None, :] < rows[:, None]) & seen[None, :], s, float("-inf"))
        if REVERSE:
            s += SHIFT
        else:
            if (chunk > 0) & (turn == chunk * CHUNK):
                wait(ref_done, 1)
                ref = tl.load(ref_ring + local)
            top = tl.max(s, 1) * SCALE
            m = tl.where(top > ref + HEADROOM, top, ref)
            s = tl.fma(s, SCALE, -m[:, None])
        rounded = tl.exp2(s).to(p.dtype.element_ty)
        at = p + (NP - BN - first if REVERSE else first) * BM
        # cols >= 0, written so that the compiler sees that neighbours agree.
        kept = inner < first + BN if REVERSE else first + inner >= 0
        tl.store(at + cells_at, rounded, mask=kept[None, :])
        if not REVERSE:
            # The sum of the rounded weights, so that the weights of a row add up to one.
            tl.store(stats + window * BM + local, m)
            tl.store(stats + (NW + window) * BM + local, row_sums(rounded, BN))
            ref = tl.where(ref == NOTHING, m, ref)
            if turn == 0:
                tl.store(ref_ring + local, ref)
                signal(ref_done)
    if chunk * CHUNK < windows:
        signal(scores_done)


@triton.jit
def softmax_sums(stats, p, windows, end, NW, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Maximum and sum (BM,) of the rows of a tile.

    Windows that were stored relative to another number are rescaled in place to the maximum.
    """
    local = tl.arange(0, BM)
    top = tl.full((BM,), NOTHING, tl.float32)
    low = tl.full((BM,), -NOTHING, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, windows, 8):
        # Eight windows at a time, so that their loads run concurrently.
        for ahead in tl.static_range(8):
            at = stats + tl.minimum(start + ahead, windows - 1) * BM + local
            m = tl.load(at)
            part = tl.load(at + NW * BM) * tl.where(start + ahead < windows, 1.0, 0.0)
            low = tl.minimum(low, tl.where(part > 0, m, -NOTHING))
            new = tl.maximum(top, tl.where(part > 0, m, NOTHING))
            total = total * tl.exp2(top - new) + part * tl.exp2(tl.minimum(m - new, 0.0))
            top = new
    if tl.max(top - low, 0) > 0:
        for window in range(0, windows):
            first = end - (window + 1) * BN
            at = p + first * BM + tile_offsets(local, tl.arange(0, BN), BM, BK)
            inside = (first + tl.arange(0, BN) >= 0)[None, :] & (local >= 0)[:, None]
            weight = tl.exp2(tl.minimum(tl.load(stats + window * BM + local) - top, 0.0))
            old = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            tl.store(at, (old * weight[:, None]).to(p.dtype.element_ty), mask=inside)
        tl.debug_barrier()
    return top, total


@triton.jit
def load_coupling(
    p, gain, colgain, row, col, SIZE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):
    """gain p colgain (SIZE, SIZE) from row and column of a tile, in float32."""
    i = tl.arange(0, SIZE)
    block = tl.load(p + tile_offsets(row + i, col + i, BM, BK)).to(tl.float32)
    return block * tl.load(gain + row + i)[:, None] * tl.load(colgain + col + i)[None, :]


@triton.jit
def invert_tile(
    p, gain, colgain, BM: tl.constexpr, BK: tl.constexpr, DOUBLINGS: tl.constexpr,
    REVERSE: tl.constexpr, EXACT: tl.constexpr,
):
    """Replace N = gain p colgain, strictly triangular, by X - I with X = (I - N)^-1.

    N is lower triangular, with REVERSE upper. Its diagonal halves have the inverses X1 and X2, each
    (I + N)(I + N^2)(I + N^4)..., computed step by step together so that their products overlap; the
    block beside them becomes X2 N21 X1, or X1 N12 X2. For |gamma| <= 1 no entry of N, of its powers
    and of X is above 1. There float16 has as many digits as TF32, so the operands are float16.
    """
    operand: tl.constexpr = tl.float32 if EXACT == "tf32x3" else tl.float16
    SIZE: tl.constexpr = BM // 2
    i = tl.arange(0, SIZE)
    eye = i[:, None] == i[None, :]
    power1 = load_coupling(p, gain, colgain, 0, 0, SIZE, BM, BK)
    power2 = load_coupling(p, gain, colgain, SIZE, SIZE, SIZE, BM, BK)
    if REVERSE:
        beside = load_coupling(p, gain, colgain, 0, SIZE, SIZE, BM, BK).to(operand)
    else:
        beside = load_coupling(p, gain, colgain, SIZE, 0, SIZE, BM, BK).to(operand)
    X1 = tl.where(eye, 1.0, power1)
    X2 = tl.where(eye, 1.0, power2)
    for doubling in tl.static_range(DOUBLINGS + 1):
        factor1, factor2 = power1.to(operand), power2.to(operand)
        if doubling < DOUBLINGS:
            power1 = tl.dot(factor1, factor1, input_precision=EXACT)
            power2 = tl.dot(factor2, factor2, input_precision=EXACT)
        if doubling > 0:
            X1 = tl.dot(X1.to(operand), factor1, X1, input_precision=EXACT)
            X2 = tl.dot(X2.to(operand), factor2, X2, input_precision=EXACT)
    if REVERSE:
        beside = tl.dot(X1.to(operand), beside, input_precision=EXACT).to(operand)
        beside = tl.dot(beside, X2.to(operand), input_precision=EXACT)
        tl.store(p + tile_offsets(i, SIZE + i, BM, BK), beside.to(p.dtype.element_ty))
    else:
        beside = tl.dot(X2.to(operand), beside, input_precision=EXACT).to(operand)
        beside = tl.dot(beside, X1.to(operand), input_precision=EXACT)
        tl.store(p + tile_offsets(SIZE + i, i, BM, BK), beside.to(p.dtype.element_ty))
    # Whole blocks are stored, although their other half is zero already: it is faster.
    tl.store(p + tile_offsets(i, i, BM, BK), tl.where(eye, 0.0, X1).to(p.dtype.element_ty))
    at = p + tile_offsets(SIZE + i, SIZE + i, BM, BK)
    tl.store(at, tl.where(eye, 0.0, X2).to(p.dtype.element_ty))
    return X1, X2, beside


@triton.jit
def inverse_task(
    p, stats, lse, gamma, gain, scores_done, inverse_done, row, T, P, NP, NW, begin,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr,
    DOUBLINGS: tl.constexpr, SHIFT: tl.constexpr, REVERSE: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gain of a row tile, and lse when forward; X - I takes the place of N_ii, Y of N_{i,i-1}.

    No row reads a column before `begin`. inverse_done is 1 once the gain and all other columns can
    be read, 2 at the end.
    """
    SIZE: tl.constexpr = BM // 2
    local = tl.arange(0, BM)
    rows = row * BM + (BM - 1 - local if REVERSE else local)
    end = tl.minimum((row + 1) * BM, NP)
    windows = tl.cdiv(end - begin, BN)
    colgain = gain + BM
    wait(scores_done, tl.cdiv(windows, CHUNK))
    if REVERSE:
        colgains = tl.load(gamma + T - 1 - rows, mask=rows < T, other=0.0)
        weight = tl.full((BM,), 2.0**-SHIFT, tl.float32)
        tl.store(colgain + local, colgains.to(tl.float32))
    else:
        top, total = softmax_sums(stats, p, windows, end, NW, BM, BN, BK)
        rows_ok = (rows >= P) & (rows < P + T)
        tl.store(lse + rows - P, log_sum(top, total), mask=rows_ok)
        gains = tl.load(gamma + rows - P, mask=rows_ok, other=0.0).to(tl.float32)
        weight = tl.where(total == 0, 0.0, gains / tl.where(total == 0, 1.0, total))
        tl.store(colgain + local, tl.full((BM,), 1.0, tl.float32))
    tl.store(gain + local, weight)
    signal(inverse_done)
    i = tl.arange(0, SIZE)
    X1 = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    X2, beside = X1, tl.zeros((SIZE, SIZE), tl.float32)
    if row * BM < end:
        at = p + tile_column(row, NP, BM, REVERSE) * BM
        X1, X2, beside = invert_tile(at, gain, colgain, BM, BK, DOUBLINGS, REVERSE, EXACT)
    # The gains of the product X N are multiplied into X; 2^SHIFT keeps them in float16's range.
    gains1 = tl.load(gain + i)[None, :] * 2.0**SHIFT
    gains2 = tl.load(gain + SIZE + i)[None, :] * 2.0**SHIFT
    beside = (beside * (gains2 if REVERSE else gains1)).to(p.dtype.element_ty)
    X1 = (X1 * gains1).to(p.dtype.element_ty)
    X2 = (X2 * gains2).to(p.dtype.element_ty)
    links = tl.maximum(row - LINKS, begin // BM)
    for tile in tl.range(links, tl.minimum(row, NP // BM), num_stages=1):
        at1 = p + tile_column(tile, NP, BM, REVERSE) * BM + tile_offsets(i, local, BM, BK)
        at2 = at1 + SIZE * BK
        N1, N2 = tl.load(at1), tl.load(at2)
        Y1 = tl.dot(X1, N1, input_precision=PRECISION)
        Y2 = tl.dot(X2, N2, input_precision=PRECISION)
        if REVERSE:
            Y1 = tl.dot(beside, N2, Y1, input_precision=PRECISION)
        else:
            Y2 = tl.dot(beside, N1, Y2, input_precision=PRECISION)
        tl.store(at1, (Y1 * 2.0**-SHIFT).to(p.dtype.element_ty))
        tl.store(at2, (Y2 * 2.0**-SHIFT).to(p.dtype.element_ty))
    signal(inverse_done)
