"""The feedback solve as one Triton kernel, forward in time and, for the gradient, backward in time.

Rows are cut into tiles. A program draws a ticket and does one task; a task waits only for tasks of
lower tickets, which are running or done, so the order of the tickets excludes a deadlock:

    scores   exp2(score - m) of one row tile over a chunk of columns, into a ring of row tiles
    inverse  softmax sums of a row tile; X = (I - N_ii)^-1 and Y_ij = X N_ij of the LINKS tiles j
             before i, in the place of N in the ring
    mix      z = X (f + N s over the tiles before those), then s_i = z + Y s, for a slice of D

Only the product with Y waits for the tiles just before, so the chain through time is one small
product a tile, and the scores run ahead of it as far as the ring allows. What a mix reads of other
tiles needs no inverse, so both are computed at once.

Backward in time the same system is u = ds + N^T u. Rows are then keys, columns are queries, both
counted from the last position, the probabilities are known (lse), and the values are w = gamma u.
In memory all keeps the order of the sequence: tiles lie last one first, and N_ii is upper
triangular.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sessa_torch.cuda.tiles import (
    NOTHING,
    accumulate_tile,
    log2_prob,
    row_sums,
    score_tile,
    signal,
    tile_column,
    tile_offsets,
    wait,
)
from sessa_torch.feedback.cuda_inverse import LINKS, inverse_task

# Steps of the schedule that are tried at once: as many as a warp has threads.
SEARCH = tl.constexpr(32)


@triton.jit
def scores_task(
    q, k, lse, mask, p, stats, ref_ring, ref_done, scores_done, b, row, chunk, T, P, NP, NW, width,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr,
    USE_TMA: tl.constexpr,
    SCALE: tl.constexpr, HEADROOM: tl.constexpr, SHIFT: tl.constexpr,
    REVERSE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Windows of BN columns, counted down from the diagonal, of the probabilities of one row tile.

    A window is stored relative to the row's maximum in window 1, which all rows see, or to its own
    where that is more than HEADROOM higher: few rows need rescaling and none overflows. Window 1
    comes first, and the other chunks have their first product ready before they wait for it.
    """
    local, inner = tl.arange(0, BM), tl.arange(0, BN)
    cells_at = tile_offsets(local, inner, BM, BK)
    columns = T if REVERSE else P + T
    rows = row * BM + (BM - 1 - local if REVERSE else local)
    # What rows outside give is masked or unused.
    first_row = P + T - (row + 1) * BM if REVERSE else row * BM - P
    end = tl.minimum((row + 1) * BM, NP)
    windows = tl.cdiv(end, BN)
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
            # Operands change places, so that float32 scores are those of the forward pass.
            s = score_tile(k, q, b, first_col, first_row, width, BN, BM, BK, USE_TMA, PRECISION)
            s = tl.trans(s)
        else:
            s = score_tile(q, k, b, first_row, first_col, width, BM, BN, BK, USE_TMA, PRECISION)
        if REVERSE:
            s = log2_prob(s, SCALE, tl.load(lse + near_cols)[None, :])
            s = tl.where(rows_ok[:, None], s, float("-inf"))
        elif MASKED:
            s = tl.where((tl.load(mask + near_cols) != 0)[None, :], s, float("-inf"))
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
        # cols >= 0, in a form in which the compiler sees that neighbours agree.
        kept = inner < first + BN if REVERSE else first + inner >= 0
        tl.store(at + cells_at, rounded, mask=kept[None, :])
        if not REVERSE:
            # The sum of what is multiplied, so that the weights of a row add up to one.
            tl.store(stats + window * BM + local, m)
            tl.store(stats + (NW + window) * BM + local, row_sums(rounded, BN))
            ref = tl.where(ref == NOTHING, m, ref)
            if turn == 0:
                tl.store(ref_ring + local, ref)
                signal(ref_done)
    signal(scores_done)


@triton.jit
def read_solved(
    acc, p, v, at, b, solved, known, begin, end, first, NP, BM: tl.constexpr, BD: tl.constexpr,
    BK: tl.constexpr, REVERSE: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
    FENCE: tl.constexpr,
):  # fmt: skip
    """acc + the columns of tiles begin to end times v, as far as solved at a time; see product."""
    done = begin
    while done < end:
        ready = tl.minimum(tl.atomic_add(solved, 0, sem="acquire") + known, end)
        if FENCE:
            # What others wrote by stores is read by the tensor memory unit.
            tl.inline_asm_elementwise(
                "fence.proxy.async.global; mov.u32 $0, 0;", "=r", [], tl.int32, False, 1
            )
        acc = accumulate_tile(
            acc, p, v, at, b, done * BM, ready * BM, first, NP,
            BM, BD, BK, REVERSE, USE_TMA, PRECISION,
        )  # fmt: skip
        done = tl.maximum(ready, done)
    return acc


@triton.jit
def mix_task(
    f, v, out, p, p_blocks, v_blocks, at, gain, inverse_done, solved, sft, sv, b, row, part,
    T, P, NP,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
    REVERSE: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr, FENCE: tl.constexpr,
):  # fmt: skip
    """Solve one row tile for BD columns of the states; solved counts the tiles done, in order."""
    local = tl.arange(0, BM)
    rows = row * BM + (BM - 1 - local if REVERSE else local)
    d = part * BD + tl.arange(0, BD)
    d_ok = (d < D)[None, :]
    known = 0 if REVERSE else P // BM
    tiles = tl.minimum(row, NP // BM)
    before = tl.maximum(tl.minimum(row - LINKS, NP // BM), 0)
    f_rows = T - 1 - rows if REVERSE else rows - P
    out_rows = P + T - 1 - rows if REVERSE else rows
    inverted = wait(inverse_done, 1)
    acc = tl.zeros((BM, BD), tl.float32)
    acc = read_solved(
        acc, p_blocks, v_blocks, at, b, solved, known, 0, before, part * BD, NP,
        BM, BD, BK, REVERSE, USE_TMA, PRECISION, FENCE,
    )  # fmt: skip
    # Only now: it would take registers from the loop.
    f_ok = ((f_rows >= 0) & (f_rows < T))[:, None] & d_ok
    f_at = f + (f_rows.to(tl.int64) * sft)[:, None] + d[None, :]
    right = tl.load(f_at, mask=f_ok, other=0.0)
    out_at = out + (out_rows.to(tl.int64) * sv)[:, None] + d[None, :]
    out_ok = (rows < P + T)[:, None] & d_ok
    if not REVERSE:
        out_ok = out_ok & (rows >= P)[:, None]
        if row * BM < P:
            old = (rows < P)[:, None] & d_ok
            right += tl.load(out_at, mask=old, other=0.0).to(right.dtype)
    if inverted < 2:
        wait(inverse_done, 2)
    z = right.to(tl.float32) + tl.load(gain + local)[:, None] * acc
    if row * BM < NP:
        X = tl.load(p + tile_column(row, NP, BM, REVERSE) * BM + tile_offsets(local, local, BM, BK))
        z = tl.dot(X, z.to(X.dtype), z, input_precision=PRECISION)
    z = read_solved(
        z, p_blocks, v_blocks, at, b, solved, known, before, tiles, part * BD, NP,
        BM, BD, BK, REVERSE, USE_TMA, PRECISION, FENCE,
    )  # fmt: skip
    if row * BM > NP:
        wait(solved, row - known)
    tl.store(out_at, z.to(out.dtype.element_ty), mask=out_ok)
    if REVERSE:
        # The rows behind the last are read too.
        w = tl.where((rows < T)[:, None], z * tl.load(gain + BM + local)[:, None], 0.0)
        w_at = v + ((NP - 1 - rows).to(tl.int64) * sv)[:, None] + d[None, :]
        tl.store(w_at, w.to(v.dtype.element_ty), mask=(rows < NP)[:, None] & d_ok)
    signal(solved)


@triton.jit
def chunks_before(row, blocks, PER: tl.constexpr):
    """Chunks of scores of all row tiles before this one.

    A row tile has scores for itself and the tiles before it, at most blocks, PER of them a chunk.
    """
    triangle = tl.minimum(row, blocks)
    full = triangle // PER
    inside = PER * (full * (full + 1) // 2) + triangle % PER * (full + 1)
    return inside + (row - triangle) * tl.cdiv(blocks, PER)


@triton.jit
def tickets_before(
    step, rows, first_tile, blocks, inverse_lag, mix_lag, PER: tl.constexpr, PARTS: tl.constexpr
):
    """Tickets of one sequence in the steps before this one."""
    scored = first_tile + tl.minimum(step, rows)
    inverted = tl.minimum(tl.maximum(step - inverse_lag, 0), rows)
    mixed = tl.minimum(tl.maximum(step - mix_lag, 0), rows)
    scores = chunks_before(scored, blocks, PER) - chunks_before(first_tile, blocks, PER)
    return scores + inverted + PARTS * mixed


@triton.jit(do_not_specialize=["B", "T", "P", "ring", "inverse_lag", "mix_lag"])
def solve_kernel(
    f, q, k, gamma, mask, lse, v, out, p, work, flags, q_blocks, k_blocks, p_blocks, v_blocks,
    sfb, sft, sqb, sqt, skb, skt, sv, B, T, P, ring, inverse_lag, mix_lag, width,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, CHUNK: tl.constexpr, DOUBLINGS: tl.constexpr, SCALE: tl.constexpr,
    HEADROOM: tl.constexpr, SHIFT: tl.constexpr, REVERSE: tl.constexpr, MASKED: tl.constexpr,
    USE_TMA: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, FENCE: tl.constexpr,
):  # fmt: skip
    """Draw a ticket: step by step the chunks of scores, an inverse and the mixes, of each sequence.

    gamma, lse (B, T) and mask (B, P+T) are contiguous, out (B, P+T, D) and v too but for the stride
    sv of their rows. Forward v is out, whose first P rows are given; backward in time v (B, NP, D)
    takes w, the last rows of which are the last ones in time. A slot of the ring is BM x NP in p,
    in blocks, see cells, and the statistics and factors in work. The lags are the steps by which
    the tickets of a row tile's inverse and mixes follow those of its first scores. USE_TMA says
    that the descriptors are used, see load_block, and FENCE that their reads must be ordered
    behind stores.
    """
    PARTS: tl.constexpr = (D + BD - 1) // BD
    columns = T if REVERSE else P + T
    first_tile = 0 if REVERSE else P // BM
    tiles = tl.cdiv(P + T, BM)
    NP = tl.cdiv(columns, BM) * BM
    NW = tl.cdiv(NP, BN)
    PER: tl.constexpr = BN * CHUNK // BM
    rows = tiles - first_tile
    blocks = NP // BM
    ticket = tl.atomic_add(flags, 1, sem="relaxed")
    b = ticket % B
    task = ticket // B
    # The last step with no more tickets before it, searched for with SEARCH candidates at a time.
    step, stride = tl.full((), 0, tl.int32), tl.full((), 1, tl.int32)
    while stride * SEARCH < rows + mix_lag:
        stride *= SEARCH
    while stride > 0:
        steps = step + stride * tl.arange(0, SEARCH)
        before = tickets_before(steps, rows, first_tile, blocks, inverse_lag, mix_lag, PER, PARTS)
        step += stride * (tl.sum(tl.where(before <= task, 1, 0)) - 1)
        stride //= SEARCH
    task -= tickets_before(step, rows, first_tile, blocks, inverse_lag, mix_lag, PER, PARTS)
    chunks = tl.where(step < rows, tl.cdiv(tl.minimum(first_tile + step + 1, blocks), PER), 0)
    inverses = tl.where((step >= inverse_lag) & (step - inverse_lag < rows), 1, 0)
    lag = tl.where(task < chunks + inverses, inverse_lag, mix_lag)
    row = first_tile + step - tl.where(task < chunks, 0, lag)
    wide = b.to(tl.int64)
    slot = b * ring + row % ring
    ring_blocks = (p, p_blocks)
    p += slot.to(tl.int64) * (BM * NP)
    work += slot.to(tl.int64) * (2 * NW * BM + 3 * BM)
    ref_ring = work + 2 * NW * BM
    gain = ref_ring + BM
    lse += wide * T
    count = B * tiles
    ref_done = flags + 1 + b * tiles + row
    scores_done = ref_done + count
    inverse_done = scores_done + count
    solved = flags + 1 + 3 * count + b * PARTS
    if task < chunks:
        if row - first_tile >= ring:
            for part in range(PARTS):
                wait(solved + part, row - first_tile - ring + 1)
        scores_task(
            (q, sqb, sqt, P + T if REVERSE else T, width, q_blocks),
            (k, skb, skt, columns, width, k_blocks),
            lse, mask + wide * (P + T), p, work, ref_ring, ref_done, scores_done,
            b, row, task, T, P, NP, NW, width, BM, BN, BK, CHUNK, USE_TMA,
            SCALE, HEADROOM, SHIFT, REVERSE, MASKED, PRECISION,
        )  # fmt: skip
    elif task < chunks + inverses:
        inverse_task(
            p, work, lse, gamma + wide * T, gain, scores_done, inverse_done, row, T, P, NP, NW,
            BM, BN, BK, CHUNK, DOUBLINGS, SHIFT, REVERSE, EXACT, PRECISION,
        )  # fmt: skip
    else:
        part = task - chunks - inverses
        # w is padded.
        v_rows = NP if REVERSE else columns
        each = v_rows.to(tl.int64) * sv
        mix_task(
            f + wide * sfb, v + wide * each, out + wide * (P + T) * sv, p,
            ring_blocks, (v, each, sv, v_rows, D, v_blocks), slot * (NP // BK * BM), gain,
            inverse_done, solved + part, sft, sv, b, row, part, T, P, NP,
            D, BM, BD, BK, REVERSE, USE_TMA, PRECISION, FENCE,
        )  # fmt: skip
