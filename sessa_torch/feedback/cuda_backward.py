"""The backward pass of the solve on CUDA.

u = (I - N)^-T ds, the gradient of f, is the solve kernel of cuda_forward.py run in reverse. The
gradients of q, k and gamma are the kernels below. They take a chunk of query rows at a time, in a
workspace of chunk x columns: the probabilities alpha; from them r = rowsum(alpha <u, s>); over them
the score gradients gamma alpha (u s^T - r); from those dq and dk.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_torch.cuda.device import has_tma
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
from sessa_torch.cuda.tiles import accumulate_tile, load_block, log2_prob, score_tile, tile_offsets
from sessa_torch.feedback.cuda_forward import run_solve
from sessa_torch.feedback.cuda_sizes import Tiles, gradient_tiles, product_precision
from sessa_torch.feedback.masking import visible_rows
from sessa_torch.feedback.outputs import from_row

# The workspace has so many elements, but at least so many tiles of rows.
CHUNK_ELEMENTS, CHUNK_TILES = 64 * 2**20, 16
# Sizes for which Triton compiles no kernel of its own.
COUNTS = ["first", "chunk", "T", "past"]


def solve_backward(
    ds: Tensor,  # (B, T, D)
    q: Tensor,  # (B, T, K)
    k: Tensor,  # (B, P+T, K)
    gamma: Tensor,  # (B, T)
    s: Tensor,  # (B, T, D)
    lse: Tensor,  # (B, T)
    past_s: Tensor | None,  # (B, P, D)
    key_mask: Tensor | None,  # (B, P+T)
    precision: str,
    document_starts: Tensor | None = None,  # (B, T)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """`cuda.solve_backward` for any number of rows.

    With r = rowsum(alpha * u s^T) the score gradient is gamma alpha (u s^T - r) and the gradient of
    gamma is r. Where s is float32 all products are.
    """
    single = precision == "float32"
    dtype = torch.float32 if single else torch.promote_types(s.dtype, q.dtype)
    B, T, D = s.shape
    columns = k.shape[1]
    ds = rows_contiguous(ds.to(dtype))
    qw, kw, states = (aligned(x.to(dtype)) for x in (q, k, s))
    gain, mask, bounds = gamma.contiguous(), mask_bytes(key_mask), document_bounds(document_starts)
    if past_s is not None:
        states = aligned(torch.cat([past_s.to(dtype), states], 1))
    kw, states = (aligned(visible_rows(x, key_mask)) for x in (kw, states))
    u = aligned_empty(B, columns, D, dtype=dtype, device=s.device)
    run_solve(ds, kw, qw, gain, mask, bounds, lse, u, reverse=True)
    new, past = u[:, columns - T :], u[:, : columns - T]
    dq, dk, dgamma = score_gradients(new, qw, kw, gain, states, lse, mask, bounds)
    # df and dpast_s must not share memory, which slices of one sequence would.
    dpast_s = None if past_s is None else past.to(past_s.dtype, copy=True).contiguous()
    df = from_row(u, columns - T, s.dtype)
    return df, dq.to(q.dtype), dk.to(k.dtype), dgamma, dpast_s


def score_gradients(
    u: Tensor,
    q: Tensor,
    k: Tensor,
    gamma: Tensor,
    states: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    bounds: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dgamma from u (B, T, D) and all states (B, P+T, D), by chunks of query rows.

    `bounds` are the `document_bounds`; tiles whose rows and columns share no document are left out.
    """
    (B, T, D), (columns, K) = u.shape, k.shape[1:]
    t = gradient_tiles(q.dtype, q.device)
    probabilities, means, differences, products = gradient_kernels(
        t, D, K, q.dtype, q.device, mask is not None, bounds is not None
    )
    shown = next((x for x in (mask, bounds) if x is not None), q)
    rows = min(max(CHUNK_ELEMENTS // (B * columns), -(-CHUNK_TILES // B) * t.rows), T)
    chunk = -(-rows // t.rows) * t.rows
    widest = max(t.rows, t.columns)
    padded = -(-columns // widest) * widest
    parts = shares(t, D)
    p = torch.empty(B, chunk, padded, dtype=q.dtype, device=q.device)
    r = torch.empty(parts, B, T, dtype=torch.float32, device=q.device)
    dq = torch.empty(B, T, K, dtype=q.dtype, device=q.device)
    dk = torch.empty(B, columns, K, dtype=q.dtype, device=q.device)
    dgamma = torch.empty_like(gamma)
    dk_sum = torch.empty_like(dk, dtype=torch.float32) if chunk < T else dk
    if chunk < T:
        dk_sum.zero_()
    shift = 15.0 if q.dtype == torch.float16 else 0.0
    unit = score_unit(u, states)
    by_score = (*q.stride()[:2], *k.stride()[:2])
    by_state = (*u.stride()[:2], *states.stride()[:2])
    p_blocks = blocks(p.view(-1, t.inner), t.rows, t.inner)
    q_rows, k_columns = blocks(q, 1, t.rows, t.inner), blocks(k, 1, t.columns, t.inner)
    q_values, k_values = (blocks(x, 1, t.inner, t.width) for x in (q, k))
    u_rows, s_columns = blocks(u, 1, t.rows, t.inner), blocks(states, 1, t.columns, t.inner)
    for first in range(0, T, chunk):
        here = min(chunk, T - first)
        seen = columns - T + first + here
        tiles = -(-here // t.rows)
        grid = (-(-(-(-seen // t.rows) * t.rows) // t.columns), tiles, B)
        where = (first, chunk, T, columns - T, padded)
        probabilities.launch(
            grid, (q, k, lse, shown, p), (q_rows, k_columns),
            (*by_score, *where, K, K**-0.5 * math.log2(math.e), shift),
        )
        means.launch(
            (parts, tiles, B), (p, u, states, shown, r), (u_rows, s_columns),
            (*by_state, *where, D, shift),
        )
        differences.launch(
            grid, (p, u, states, gamma, shown, r, dgamma, unit), (u_rows, s_columns),
            (*by_state, *where, D, shift),
        )
        wide = -(-K // t.width)
        row_tasks = tiles * wide
        products.launch(
            (row_tasks + -(-seen // t.rows) * wide, B), (p, q, k, shown, dq, dk, dk_sum, unit),
            (p_blocks, q_values, k_values),
            (*by_score, *where, K**-0.5, row_tasks, int(first + chunk >= T)),
        )
    return dq, dk, dgamma


@functools.lru_cache(MOST_COMPILED)
def gradient_kernels(
    t: Tiles, D: int, K: int, dtype: torch.dtype, device: torch.device, masked: bool,
    documents: bool,
) -> tuple[Prepared, ...]:
    """The kernels of `score_gradients`, in the order in which they run."""
    common: dict[str, Any] = {"BM": t.rows, "BK": t.inner, "PRECISION": product_precision(dtype)}
    common |= {"USE_TMA": has_tma(device), "DOCUMENTS": documents}
    common |= {"num_warps": t.warps, "num_stages": t.stages}
    return (
        prepared(probabilities_kernel, BN=t.columns, MASKED=masked, **common),
        prepared(means_kernel, BN=t.columns, **common),
        prepared(score_gradients_kernel, BN=t.columns, PARTS=shares(t, D), **common),
        prepared(products_kernel, K=K, BD=t.width, **common),
    )


def shares(t: Tiles, D: int) -> int:
    """Number of programs that share the windows of a row tile in `means_kernel`."""
    return 2 * -(-D // t.width)


def score_unit(u: Tensor, states: Tensor) -> Tensor:
    """The factor that keeps score gradients, of which float16 holds few magnitudes, below 2^14.

    In other types the kernels do not read it.
    """
    if u.dtype != torch.float16:
        return u
    largest = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax() for x in (u, states)]
    bound = 2 * largest[0] * largest[1]
    return torch.where(bound > 0, 2.0**14 / bound, 1.0).reshape(1)


@triton.jit
def load_unit(unit, p):
    """The factor of the score gradients in p: 1 but in float16, whose range is small."""
    return tl.load(unit) if p.dtype.element_ty == tl.float16 else 1.0


@triton.jit
def first_column(bounds, b, row, T, DOCUMENTS: tl.constexpr):
    """The first column that a row tile reads, from its first row."""
    begin = tl.full((), 0, tl.int32)
    if DOCUMENTS:
        begin = tl.load(bounds + b * T + row)
    return begin


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
    MASKED: tl.constexpr, DOCUMENTS: tl.constexpr, USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """2^shift alpha of one tile of rows and columns into the workspace p (B, chunk, NP).

    Row tiles are stored in blocks, see cells. With DOCUMENTS mask holds the document_bounds, and
    there is no past.
    """
    b = tl.program_id(2).to(tl.int64)
    first_row, first_col = first + tl.program_id(1) * BM, tl.program_id(0) * BN
    rows, cols = first_row + tl.arange(0, BM), first_col + tl.arange(0, BN)
    begin = first_column(mask, b, first_row, T, DOCUMENTS)
    if (first_col < tl.cdiv(past + first_row + BM, BM) * BM) & (first_col + BN > begin):
        rows_ok = rows < T
        cols_ok = cols < past + T
        s = score_tile(
            (q, sqb, sqt, T, width, q_blocks), (k, skb, skt, past + T, width, k_blocks),
            tl.program_id(2), first_row, first_col, width, BM, BN, BK, USE_TMA, PRECISION,
        )
        sums = tl.load(lse + b * T + rows, mask=rows_ok, other=float("inf"))
        e = tl.exp2(log2_prob(s, scale2, sums[:, None]) + shift)
        seen = (cols[None, :] < past + rows[:, None]) & cols_ok[None, :]
        if MASKED:
            shown = tl.load(mask + b * (past + T) + cols, mask=cols_ok, other=0) != 0
            seen = seen & shown[None, :]
        if DOCUMENTS:
            starts = tl.load(mask + b * T + rows, mask=rows_ok, other=0)
            seen = seen & (cols[None, :] >= starts[:, None])
        e = tl.where(seen, e, 0.0)
        at = window_offsets(p, b * chunk + tl.program_id(1) * BM, NP, tl.program_id(0), BM, BN, BK)
        tl.store(at, e.to(p.dtype.element_ty))


@triton.jit(do_not_specialize=COUNTS)
def means_kernel(
    p, u, states, bounds, r, u_blocks, s_blocks, sub, sut, ssb, sst,
    first, chunk, T, past, NP, width, shift,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    DOCUMENTS: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):
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
    begin = first_column(bounds, b, first_row, T, DOCUMENTS) // BN + tl.program_id(0)
    for first_col in range(begin * BN, stop, tl.num_programs(0) * BN):
        # Before the product, so that it is there when the product is.
        alpha = tl.load(window_offsets(p, b * chunk + tile * BM, NP, first_col // BN, BM, BN, BK))
        dP = score_tile(
            (u, sub, sut, T, width, u_blocks), (states, ssb, sst, past + T, width, s_blocks),
            tl.program_id(2), first_row, first_col, width, BM, BN, BK, USE_TMA, PRECISION,
        )
        total += tl.sum(alpha.to(tl.float32) * dP, 1)
    at = r + (tl.program_id(0) * tl.num_programs(2) + b) * T + rows
    tl.store(at, total * tl.exp2(-shift), mask=rows < T)


@triton.jit(do_not_specialize=COUNTS)
def score_gradients_kernel(
    p, u, states, gamma, bounds, r, dgamma, unit, u_blocks, s_blocks, sub, sut, ssb, sst,
    first, chunk, T, past, NP, width, shift,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    DOCUMENTS: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):
    """Replace 2^shift alpha in the workspace by unit gamma alpha (<u, s> - r); r is dgamma too."""
    b = tl.program_id(2).to(tl.int64)
    first_row, first_col = first + tl.program_id(1) * BM, tl.program_id(0) * BN
    rows = first_row + tl.arange(0, BM)
    begin = first_column(bounds, b, first_row, T, DOCUMENTS)
    if (first_col < tl.cdiv(past + first_row + BM, BM) * BM) & (first_col + BN > begin):
        rows_ok = rows < T
        dP = score_tile(
            (u, sub, sut, T, width, u_blocks), (states, ssb, sst, past + T, width, s_blocks),
            tl.program_id(2), first_row, first_col, width, BM, BN, BK, USE_TMA, PRECISION,
        )
        mean = tl.zeros((BM,), tl.float32)
        for part in tl.static_range(PARTS):
            mean += tl.load(r + (part * tl.num_programs(2) + b) * T + rows, mask=rows_ok, other=0.0)
        if first_col <= begin:
            tl.store(dgamma + b * T + rows, mean.to(dgamma.dtype.element_ty), mask=rows_ok)
        gain = tl.load(gamma + b * T + rows, mask=rows_ok, other=0.0)
        gain = gain.to(tl.float32) * load_unit(unit, p) * tl.exp2(-shift)
        at = window_offsets(p, b * chunk + tl.program_id(1) * BM, NP, tl.program_id(0), BM, BN, BK)
        alpha = tl.load(at).to(tl.float32)
        tl.store(at, (alpha * gain[:, None] * (dP - mean[:, None])).to(p.dtype.element_ty))


@triton.jit(do_not_specialize=[*COUNTS, "row_tasks", "last"])
def products_kernel(
    p, q, k, bounds, dq, dk, dk_sum, unit, p_blocks, q_blocks, k_blocks, sqb, sqt, skb, skt,
    first, chunk, T, past, NP, scale, row_tasks, last,
    K: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
    DOCUMENTS: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
):
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
        begin = first_column(bounds, b, first + tile * BM, T, DOCUMENTS) // BK * BK
        acc = accumulate_tile(
            acc, (p, p_blocks), (k, skb, skt, past + T, K, k_blocks),
            first_block(tl.program_id(1), tile, chunk, NP, BM, BK), tl.program_id(1), begin, stop,
            task % PARTS * BD, NP, BM, BD, BK, False, USE_TMA, PRECISION,
        )
        dq_at = dq + (b * T + rows[:, None]) * K + d[None, :]
        tl.store(dq_at, (acc * scale).to(dq.dtype.element_ty), mask=(rows < T)[:, None] & d_ok)
    else:
        tile = (task - row_tasks) // PARTS
        cols = tile * BM + tl.arange(0, BM)
        a_at = tile * (BM * BM) + tile_offsets(tl.arange(0, BK), tl.arange(0, BM), BM, BK)
        begin = tl.maximum(tile * BM - past - first, 0) // BM * BM
        stop = tl.minimum(chunk, T - first)
        if DOCUMENTS:
            # The documents of these columns have ended then.
            ends = bounds + (tl.num_programs(1) + b) * T
            stop = tl.minimum(stop, tl.load(ends + tl.minimum((tile + 1) * BM, T) - 1) - first)
        for start in range(begin, stop, BK):
            a = tl.load(p + (b * chunk + start // BM * BM) * NP + (start % BM * BK) + a_at)
            c = load_block(
                (q, sqb, sqt, T, K, q_blocks), tl.program_id(1), first + start, task % PARTS * BD,
                BK, BD, USE_TMA,
            )
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
