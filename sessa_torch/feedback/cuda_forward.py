"""The solve kernel on CUDA: forward in time for s and, for the gradient of f, backward in time.

`solve_forward` is the forward pass; cuda_backward.py runs the same kernel in reverse.

Rows are cut into tiles. A program draws a ticket and does one task. A task waits only for tasks of
lower tickets, which are running or done, so the order of the tickets excludes a deadlock:

    scores   exp2(score - m) of one row tile over a chunk of columns, into a ring of row tiles
    inverse  softmax sums of a row tile; X = (I - N_ii)^-1, and Y_ij = X N_ij for the LINKS tiles j
             before i, which replaces N_ij in the ring
    mix      z = X (f + N s over the tiles before those), then s_i = z + Y s, for a slice of D

The first two tasks are in cuda_weights.py. Only the product with Y waits for the tiles just before,
so the chain through time is one small product per tile, and the scores run ahead of it as far as
the ring allows. The part of a mix that reads other tiles needs no inverse, so both are computed at
the same time.

Backward in time the same system is u = ds + N^T u. The rows are then keys and the columns queries,
both counted from the last position; the probabilities are known (lse), and the values are
w = gamma u. Memory keeps the order of the sequence: the tiles lie last one first, and N_ii is upper
triangular.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_torch.cuda.device import has_tma, is_interpreter, num_sms
from sessa_torch.cuda.launch import (
    MOST_COMPILED,
    Prepared,
    aligned,
    aligned_empty,
    blocks,
    document_bounds,
    mask_bytes,
    prepared,
    rows_contiguous,
)
from sessa_torch.cuda.tiles import accumulate_tile, signal, tile_column, tile_offsets, wait
from sessa_torch.feedback.cuda_sizes import (
    Tiles,
    operand_types,
    product_precision,
    solve_tiles,
)
from sessa_torch.feedback.cuda_weights import LINKS, inverse_task, scores_task
from sessa_torch.feedback.outputs import from_row

# The scores run LAG row tiles ahead of the solve. From LAG_COLUMNS columns on they run fewer ahead,
# since the ring would take memory for a gain of 1 %. The least is SHORT_LAG, which is also taken
# for SEQUENCES sequences or more.
LAG, LAG_COLUMNS, SHORT_LAG, SEQUENCES = 40, 2**15, 5, 16
# Steps of the schedule that are tried at once: as many as a warp has threads.
SEARCH = tl.constexpr(32)


def solve_forward(
    f: Tensor,  # (B, T, D)
    q: Tensor,  # (B, T, K)
    k: Tensor,  # (B, P+T, K)
    gamma: Tensor,  # (B, T)
    past_s: Tensor | None,  # (B, P, D)
    key_mask: Tensor | None,  # (B, P+T)
    precision: str,
    document_starts: Tensor | None = None,  # (B, T)
) -> tuple[Tensor, Tensor]:
    """`cuda.solve_forward` for any number of rows.

    The states are kept twice where the operands of later rows differ from the result: with 16-bit
    products of float32 rows they are rounded, and with a mask those of hidden rows are 0.
    """
    B, T, D = f.shape
    P = k.shape[1] - T
    scored, mixed = operand_types(f.dtype, q.dtype, precision)
    states = aligned_empty(B, P + T, D, dtype=mixed, device=f.device)
    if past_s is not None:
        states[:, :P] = past_s
        if key_mask is not None:
            states[:, :P].masked_fill_(~key_mask[:, :P, None], 0)
    lse = torch.empty(B, T, dtype=torch.float64, device=f.device)
    q, k = (aligned(x.to(scored)) for x in (q, k))
    gain, mask = gamma.contiguous(), mask_bytes(key_mask)
    bounds = document_bounds(document_starts)
    wider = f.dtype.itemsize > mixed.itemsize
    right = rows_contiguous(f if wider else f.to(mixed))
    if wider or mask is not None:
        s = torch.empty(B, T, D, dtype=f.dtype, device=f.device)
        run_solve(right, q, k, gain, mask, bounds, lse, states, s, reverse=False)
        return s, lse
    run_solve(right, q, k, gain, mask, bounds, lse, states, reverse=False)
    return from_row(states, P, f.dtype), lse


def run_solve(
    f: Tensor,
    q: Tensor,
    k: Tensor,
    gamma: Tensor,
    mask: Tensor | None,
    bounds: Tensor | None,
    lse: Tensor,
    out: Tensor,
    s: Tensor | None = None,
    *,
    reverse: bool,
) -> None:
    """Run the solve kernel on f and write its solution to out (B, P+T, D).

    Forward in time the first P rows of out hold the past states. With s (B, T, D), which a mask
    needs, s takes the solution of the new rows and out the operands of later ones. In reverse the
    kernel solves for the gradient u: f is the gradient of s, q are the keys and k the queries.
    There is a mask, or the `document_bounds`, or neither.
    """
    (B, T, D), K, rows = f.shape, q.shape[2], out.shape[1]
    plan = solve_plan(
        B, T, rows, D, K, q.dtype, out.dtype, q.device, reverse, mask is not None,
        bounds is not None, s is not None,
    )
    shown = next((x for x in (mask, bounds) if x is not None), q)
    t, values = plan.tiles, out
    if reverse:
        values = aligned_empty(B, plan.columns, D, dtype=out.dtype, device=q.device)
    p = out.new_empty(plan.cells, t.inner)
    work = q.new_empty(plan.work, dtype=torch.float32)
    flags = torch.zeros(plan.flags, dtype=torch.int32, device=q.device)
    plan.kernel.launch(
        (plan.tasks,),
        (f, q, k, gamma, shown, lse, values, out, out if s is None else s, p,
         work, flags),
        (blocks(q, 1, t.rows, t.inner), blocks(k, 1, t.columns, t.inner),
         blocks(p, t.rows, t.inner), blocks(values, 1, t.inner, t.width)),
        (*f.stride()[:2], *q.stride()[:2], *k.stride()[:2], out.stride(1), *plan.numbers),
    )


@dataclass(frozen=True, kw_only=True)
class SolvePlan:
    """Everything about a solve that follows from its shapes and types.

    columns is the padded number of score columns. cells (rows of `tiles.inner` elements), work and
    flags are the sizes of the workspaces, tasks is the number of programs, and numbers are the
    kernel's last arguments.
    """

    tiles: Tiles
    columns: int
    cells: int
    work: int
    flags: int
    tasks: int
    numbers: tuple[int, ...]
    kernel: Prepared


@functools.lru_cache(MOST_COMPILED)
def solve_plan(
    B: int, T: int, rows: int, D: int, K: int, dtype: torch.dtype, mixed: torch.dtype,
    device: torch.device, reverse: bool, masked: bool, documents: bool, apart: bool,
) -> SolvePlan:
    """The plan of a solve of T rows, whose solution has `rows` rows with the past.

    dtype is the type of queries and keys, mixed that of weights and states, of the same size.
    """
    t = solve_tiles(dtype, device, min(D, K))
    columns = T if reverse else rows
    tiles, parts = -(-rows // t.rows), -(-D // t.width)
    padded = -(-columns // t.rows) * t.rows
    windows = -(-padded // t.columns)
    # With many sequences or columns one step keeps the device busy until the next.
    lag = 0 if B >= SEQUENCES else min(LAG, LAG * LAG_COLUMNS // columns)
    lag = min(tiles, max(lag, SHORT_LAG))
    first = 0 if reverse else (rows - T) // t.rows
    # The chunks of scores are those that chunks_before counts.
    per, most = t.columns * t.chunk // t.rows, padded // t.rows
    chunks = sum(-(-min(row + 1, most) // per) for row in range(first, tiles))
    ring = min(tiles, lag + 2 + num_sms(device) // (B * parts))
    half = mixed == torch.float16
    kernel = prepared(
        solve_kernel,
        D=D, BM=t.rows, BN=t.columns, BK=t.inner, BD=t.width, CHUNK=t.chunk,
        DOUBLINGS=t.rows.bit_length() - 3,
        SCALE=K**-0.5 * math.log2(math.e), HEADROOM=14.0 if half else 60.0,
        SHIFT=15.0 if half else 0.0,
        REVERSE=reverse, MASKED=masked, DOCUMENTS=documents, APART=apart,
        EXACT="tf32" if dtype.itemsize == 2 else product_precision(dtype),
        PRECISION=product_precision(dtype),
        USE_TMA=has_tma(device), FENCE=has_tma(device) and not is_interpreter(),
        num_warps=t.warps, num_stages=t.stages,
    )
    return SolvePlan(
        tiles=t,
        columns=padded,
        cells=B * ring * t.rows * padded // t.inner,
        work=B * ring * t.rows * (2 * windows + 3),
        flags=1 + 3 * B * tiles + B * parts,
        tasks=B * (chunks + (tiles - first) * (1 + parts)),
        numbers=(B, T, rows - T, ring, (lag + 1) // 2, lag, K),
        kernel=kernel,
    )


@triton.jit
def read_solved(
    acc, p, v, at, b, solved, known, begin, end, first, NP, BM: tl.constexpr, BD: tl.constexpr,
    BK: tl.constexpr, REVERSE: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
    FENCE: tl.constexpr,
):
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
        )
        done = tl.maximum(ready, done)
    return acc


@triton.jit
def select_visible(z, mask, rows, end, MASKED: tl.constexpr):
    """z (BM, BD) with zeros in the rows that the mask hides; a weight of 0 would not hide NaN."""
    if MASKED:
        visible = tl.load(mask + rows, mask=rows < end, other=0) != 0
        z = tl.where(visible[:, None], z, 0.0)
    return z


@triton.jit
def mix_task(
    f, v, out, s, mask, p, p_blocks, v_blocks, at, gain, inverse_done, solved, sft, sv, b, row,
    part, T, P, NP, begin,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
    REVERSE: tl.constexpr, MASKED: tl.constexpr, DOCUMENTS: tl.constexpr, APART: tl.constexpr,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr, FENCE: tl.constexpr,
):
    """Solve one row tile for BD columns of the states; solved counts the tiles done, in order.

    No row reads a column before `begin`.
    """
    local = tl.arange(0, BM)
    rows = row * BM + (BM - 1 - local if REVERSE else local)
    d = part * BD + tl.arange(0, BD)
    d_ok = (d < D)[None, :]
    known = 0 if REVERSE else P // BM
    tiles = tl.minimum(row, NP // BM)
    nearest = begin // BM
    before = tl.maximum(tl.minimum(row - LINKS, NP // BM), nearest)
    f_rows = T - 1 - rows if REVERSE else rows - P
    out_rows = P + T - 1 - rows if REVERSE else rows
    inverted = wait(inverse_done, 1)
    acc = tl.zeros((BM, BD), tl.float32)
    acc = read_solved(
        acc, p_blocks, v_blocks, at, b, solved, known, nearest, before, part * BD, NP,
        BM, BD, BK, REVERSE, USE_TMA, PRECISION, FENCE,
    )
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
        operand = select_visible(z, mask, rows, P + T, MASKED and not REVERSE)
        z = tl.dot(X, operand.to(X.dtype), z, input_precision=PRECISION)
    z = read_solved(
        z, p_blocks, v_blocks, at, b, solved, known, before, tiles, part * BD, NP,
        BM, BD, BK, REVERSE, USE_TMA, PRECISION, FENCE,
    )
    if row * BM > NP:
        wait(solved, row - known)
    operand = select_visible(z, mask, rows, P + T, MASKED and not REVERSE)
    tl.store(out_at, operand.to(out.dtype.element_ty), mask=out_ok)
    if REVERSE:
        # The rows behind the last are read too.
        w = tl.where((rows < T)[:, None], z * tl.load(gain + BM + local)[:, None], 0.0)
        w_at = v + ((NP - 1 - rows).to(tl.int64) * sv)[:, None] + d[None, :]
        tl.store(w_at, w.to(v.dtype.element_ty), mask=(rows < NP)[:, None] & d_ok)
    if DOCUMENTS:
        # Rows that read no tile before them are solved early, but counted in order.
        wait(solved, row - known)
    signal(solved)
    if APART:
        # After the signal: later rows do not wait for what they do not read.
        s_at = s + (f_rows.to(tl.int64) * D)[:, None] + d[None, :]
        tl.store(s_at, z.to(s.dtype.element_ty), mask=f_ok)


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
    f, q, k, gamma, mask, lse, v, out, s, p, work, flags, q_blocks, k_blocks, p_blocks, v_blocks,
    sfb, sft, sqb, sqt, skb, skt, sv, B, T, P, ring, inverse_lag, mix_lag, width,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, CHUNK: tl.constexpr, DOUBLINGS: tl.constexpr, SCALE: tl.constexpr,
    HEADROOM: tl.constexpr, SHIFT: tl.constexpr, REVERSE: tl.constexpr, MASKED: tl.constexpr,
    DOCUMENTS: tl.constexpr, APART: tl.constexpr, USE_TMA: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, FENCE: tl.constexpr,
):
    """Draw a ticket: step by step the chunks of scores, an inverse and the mixes, of each sequence.

    gamma, lse (B, T) and mask (B, P+T) are contiguous, out (B, P+T, D) and v too but for the stride
    sv of their rows. With DOCUMENTS there is no past, and mask holds the document_bounds; a row
    tile then has no scores before the document of its first row. Forward v is out, whose first P
    rows are given, and with APART the contiguous s (B, T, D) takes the solution, and v what later
    rows multiply; backward in time v (B, NP, D) takes w, the last rows of which are the last ones
    in time. A slot of the ring is BM x NP in p, in blocks, see cells, and the statistics and
    factors in work. The lags are the steps by which the tickets of a row tile's inverse and mixes
    follow those of its first scores. USE_TMA says that the descriptors are used, see load_block,
    and FENCE that their reads must be ordered behind stores.
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
    # The first column that a row of the tile reads, in the order of the tiles.
    begin = tl.full((), 0, tl.int32)
    if DOCUMENTS:
        if REVERSE:
            begin = T - tl.load(mask + (wide + B) * T + T - 1 - row * BM)
        else:
            begin = tl.load(mask + wide * T + row * BM)
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
            b, row, task, T, P, NP, NW, width, begin, BM, BN, BK, CHUNK, USE_TMA,
            SCALE, HEADROOM, SHIFT, REVERSE, MASKED, DOCUMENTS, PRECISION,
        )
    elif task < chunks + inverses:
        inverse_task(
            p, work, lse, gamma + wide * T, gain, scores_done, inverse_done, row, T, P, NP, NW,
            begin, BM, BN, BK, CHUNK, DOUBLINGS, SHIFT, REVERSE, EXACT, PRECISION,
        )
    else:
        part = task - chunks - inverses
        # w is padded.
        v_rows = NP if REVERSE else columns
        each = v_rows.to(tl.int64) * sv
        mix_task(
            f + wide * sfb, v + wide * each, out + wide * (P + T) * sv, s + wide * T * D,
            mask + wide * (P + T), p,
            ring_blocks, (v, each, sv, v_rows, D, v_blocks), slot * (NP // BK * BM), gain,
            inverse_done, solved + part, sft, sv, b, row, part, T, P, NP, begin,
            D, BM, BD, BK, REVERSE, MASKED, DOCUMENTS, APART, USE_TMA, PRECISION, FENCE,
        )
