"""The feedback solve on CUDA: which inputs the Triton kernels take, and how they are launched.

Triton is imported when a kernel first runs, so that this module can say what is missing.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sessa_torch.cuda.launch import (
    MOST_COMPILED,
    Prepared,
    aligned,
    aligned_empty,
    blocks,
    prepared,
)
from sessa_torch.feedback import blocked
from sessa_torch.feedback.cuda_sizes import (
    SINGLE_SHARED,
    Tiles,
    capability,
    gradient_tiles,
    has_tma,
    is_interpreter,
    num_sms,
    precision,
    shared_memory,
    solve_tiles,
)
from sessa_torch.feedback.outputs import from_row

MIB = 2**20
# What CUDA allows in the second and third dimension of a grid.
MOST_SEQUENCES = 65535
# New rows and columns of s up to which a few rows behind a past have kernels of their own.
DECODE_ROWS, DECODE_WIDTH = 16, 2048
# The workspace of the score gradients: so many elements, but at least so many tiles of rows.
CHUNK_ELEMENTS, CHUNK_TILES = 64 * MIB, 16
# Row tiles by which the scores run ahead of the solve: LAG, but from LAG_COLUMNS columns on fewer,
# since the ring would take memory for a gain of 1 %. SHORT_LAG at least, and for SEQUENCES or more.
LAG, LAG_COLUMNS, SHORT_LAG, SEQUENCES = 40, 2**15, 5, 16


def unavailable_reason(f: Tensor, q: Tensor) -> str | None:
    """Why the kernels cannot run for these inputs; None when they can."""
    if (missing := _missing_triton()) is not None:
        return missing
    if torch.promote_types(f.dtype, q.dtype) == torch.float64:
        return "the kernels take float32, bfloat16 and float16, not float64"
    if f.shape[0] > MOST_SEQUENCES:
        return f"a batch of more than {MOST_SEQUENCES:,}"
    if is_interpreter():
        return None
    if f.device.type != "cuda":
        return f"f is on {f.device.type}, the kernels need CUDA"
    if capability(f.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if torch.float32 in (f.dtype, q.dtype) and shared_memory(f.device) < SINGLE_SHARED:
        return "the GPU gives a program less than the 128 KiB that float32 needs"
    return None


@functools.cache
def _missing_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if importlib.util.find_spec("triton.tools.tensor_descriptor") is None:
        return "Triton is older than 3.4 (PyTorch 2.8 brings it)"
    return None


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor with unit stride along its last axis, copied only where it has another."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    """A boolean mask as contiguous bytes."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def solve_forward(
    f: Tensor,  # (B, T, D)
    q: Tensor,  # (B, T, K)
    k: Tensor,  # (B, P+T, K)
    gamma: Tensor,  # (B, T)
    past_s: Tensor | None = None,  # (B, P, D)
    key_mask: Tensor | None = None,  # (B, P+T)
) -> tuple[Tensor, Tensor]:
    """Solve (I - N) s = f; give s (B, T, D) like f and the log-sum-exp (B, T) of every score row.

    The log-sum-exp is float64, and +inf for a row that sees nothing.
    """
    B, T, D = f.shape
    P = k.shape[1] - T
    dtype = torch.promote_types(f.dtype, q.dtype)
    if past_s is not None and _is_few(T, P, D):
        return _decode(f, q.to(dtype), k.to(dtype), gamma, past_s, key_mask)
    states = aligned_empty(B, P + T, D, dtype=dtype, device=f.device)
    if past_s is not None:
        states[:, :P] = past_s
    lse = torch.empty(B, T, dtype=torch.float64, device=f.device)
    right, (q, k) = rows_contiguous(f.to(dtype)), (aligned(x.to(dtype)) for x in (q, k))
    gain, mask = gamma.contiguous(), mask_bytes(key_mask)
    _solve(right, q, k, gain, mask, lse, states, reverse=False)
    return from_row(states, P, f.dtype), lse


def _is_few(T: int, P: int, D: int) -> bool:
    """Whether rows are so few, behind a past, that the kernels of _decode solve them."""
    return T <= DECODE_ROWS and P > 0 and D <= DECODE_WIDTH


def _decode(
    f: Tensor, q: Tensor, k: Tensor, gamma: Tensor, past_s: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """solve_forward for at most DECODE_ROWS rows behind a past."""
    from sessa_torch.feedback.cuda_decode import ROWS, combine_kernel, past_kernel

    (B, T, D), P, K = f.shape, past_s.shape[1], q.shape[2]
    f, q, k, past_s = (rows_contiguous(x) for x in (f, q, k, past_s))
    seen, gamma = mask_bytes(mask), gamma.contiguous()
    wide = 1 << max(D - 1, 15).bit_length()
    block = max(16, min(64, 2**16 // (wide * q.element_size())))
    # At most 128 shares, so that the second kernel holds one row of all of them.
    splits = max(1, min(128, num_sms(q.device) // B, -(-P // block)))
    share = -(-P // (splits * block)) * block
    splits = -(-P // share)
    sums = torch.empty(B, splits, 2, ROWS.value, dtype=torch.float32, device=f.device)
    parts = torch.empty(B, splits, T, D, dtype=torch.float32, device=f.device)
    s = torch.empty(B, T, D, dtype=f.dtype, device=f.device)
    lse = torch.empty(B, T, dtype=torch.float64, device=f.device)
    # One wide piece of K would be buffered whole for every stage, beyond the shared memory.
    inner = gradient_tiles(q.dtype, q.device).inner
    inner = min(inner, 1 << max(K - 1, 15).bit_length())
    common = {"K": K, "D": D, "BK": inner, "SCALE": K**-0.5 * math.log2(math.e)}
    common |= {"MASKED": mask is not None, "PRECISION": precision(q.dtype)}
    seen = q if seen is None else seen
    prepared(past_kernel, BN=block, BD=wide, num_warps=8, **common).launch(
        (splits, B), (q, k, past_s, seen, sums, parts), (),
        (*q.stride()[:2], *k.stride()[:2], *past_s.stride()[:2], T, P, share),
    )  # fmt: skip
    most = max(16, 1 << (splits - 1).bit_length())
    prepared(combine_kernel, BD=32, SPLITS=most, num_warps=4, **common).launch(
        (-(-D // 32), B), (f, q, k, gamma, seen, sums, parts, s, lse), (),
        (*f.stride()[:2], *q.stride()[:2], *k.stride()[:2], T, P, splits),
    )  # fmt: skip
    return s, lse


def _solve(
    f: Tensor,
    q: Tensor,
    k: Tensor,
    gamma: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    out: Tensor,
    *,
    reverse: bool,
) -> None:
    """Run the solve kernel; when reverse, q are the keys, k the queries and out the gradient u.

    Forward the first rows of out are the past.
    """
    (B, T, D), K, rows = f.shape, q.shape[2], out.shape[1]
    plan = _solve_plan(B, T, rows, D, K, q.dtype, q.device, reverse, mask is not None)
    t, values = plan.tiles, out
    if reverse:
        values = aligned_empty(B, plan.columns, D, dtype=q.dtype, device=q.device)
    p = q.new_empty(plan.cells, t.inner)
    work = q.new_empty(plan.work, dtype=torch.float32)
    flags = torch.zeros(plan.flags, dtype=torch.int32, device=q.device)
    plan.kernel.launch(
        (plan.tasks,),
        (f, q, k, gamma, q if mask is None else mask, lse, values, out, p, work, flags),
        (blocks(q, 1, t.rows, t.inner), blocks(k, 1, t.columns, t.inner),
         blocks(p, t.rows, t.inner), blocks(values, 1, t.inner, t.width)),
        (*f.stride()[:2], *q.stride()[:2], *k.stride()[:2], out.stride(1), *plan.numbers),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _SolvePlan:
    """What a solve of some shape and type needs: padded columns, sizes of workspaces, the kernel.

    cells counts rows of Tiles.inner.
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
def _solve_plan(
    B: int, T: int, rows: int, D: int, K: int, dtype: torch.dtype, device: torch.device,
    reverse: bool, masked: bool,
) -> _SolvePlan:  # fmt: skip
    from sessa_torch.feedback.cuda_forward import solve_kernel

    t = solve_tiles(dtype, device, min(D, K))
    columns = T if reverse else rows
    tiles, parts = -(-rows // t.rows), -(-D // t.width)
    padded = -(-columns // t.rows) * t.rows
    windows = -(-padded // t.columns)
    # With many sequences or columns a step keeps the device busy until the next.
    lag = 0 if B >= SEQUENCES else min(LAG, LAG * LAG_COLUMNS // columns)
    lag = min(tiles, max(lag, SHORT_LAG))
    first = 0 if reverse else (rows - T) // t.rows
    # Chunks of scores: see chunks_before in triton_solve.py.
    per, most = t.columns * t.chunk // t.rows, padded // t.rows
    chunks = sum(-(-min(row + 1, most) // per) for row in range(first, tiles))
    ring = min(tiles, lag + 2 + num_sms(device) // (B * parts))
    half = dtype == torch.float16
    kernel = prepared(
        solve_kernel,
        D=D, BM=t.rows, BN=t.columns, BK=t.inner, BD=t.width, CHUNK=t.chunk,
        DOUBLINGS=t.rows.bit_length() - 3,
        SCALE=K**-0.5 * math.log2(math.e), HEADROOM=14.0 if half else 60.0,
        SHIFT=15.0 if half else 0.0, REVERSE=reverse, MASKED=masked,
        EXACT="tf32" if dtype.itemsize == 2 else precision(dtype), PRECISION=precision(dtype),
        USE_TMA=has_tma(device), FENCE=has_tma(device) and not is_interpreter(),
        num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return _SolvePlan(
        tiles=t,
        columns=padded,
        cells=B * ring * t.rows * padded // t.inner,
        work=B * ring * t.rows * (2 * windows + 3),
        flags=1 + 3 * B * tiles + B * parts,
        tasks=B * (chunks + (tiles - first) * (1 + parts)),
        numbers=(B, T, rows - T, ring, (lag + 1) // 2, lag, K),
        kernel=kernel,
    )


def solve_backward(
    ds: Tensor,  # (B, T, D)
    q: Tensor,  # (B, T, K)
    k: Tensor,  # (B, P+T, K)
    gamma: Tensor,  # (B, T)
    s: Tensor,  # (B, T, D)
    lse: Tensor,  # (B, T)
    past_s: Tensor | None = None,  # (B, P, D)
    key_mask: Tensor | None = None,  # (B, P+T)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of f, q, k, gamma and past_s (None without a past) from ds, the gradient of s.

    u = (I - N)^-T ds is the same solve backward in time; with r = rowsum(alpha * u s^T) the score
    gradient is gamma alpha (u s^T - r) and the gradient of gamma is r.
    """
    dtype = torch.promote_types(s.dtype, q.dtype)
    B, T, D = s.shape
    columns = k.shape[1]
    if past_s is not None and _is_few(T, columns - T, D):
        # In sums of few terms the errors of the kernels' products show.
        return blocked.solve_backward(ds, q, k, gamma, s, lse, past_s, key_mask)
    ds = rows_contiguous(ds.to(dtype))
    qw, kw, states = (aligned(x.to(dtype)) for x in (q, k, s))
    gain, mask = gamma.contiguous(), mask_bytes(key_mask)
    if past_s is not None:
        states = aligned(torch.cat([past_s.to(dtype), states], 1))
    u = aligned_empty(B, columns, D, dtype=dtype, device=s.device)
    _solve(ds, kw, qw, gain, mask, lse, u, reverse=True)
    new, past = u[:, columns - T :], u[:, : columns - T]
    dq, dk, dgamma = _score_gradients(new, qw, kw, gain, states, lse, mask)
    # df and dpast_s must not share memory, which slices of one sequence would.
    dpast_s = None if past_s is None else past.to(past_s.dtype, copy=True).contiguous()
    df = from_row(u, columns - T, s.dtype)
    return df, dq.to(q.dtype), dk.to(k.dtype), dgamma, dpast_s


def _score_gradients(
    u: Tensor,
    q: Tensor,
    k: Tensor,
    gamma: Tensor,
    states: Tensor,
    lse: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dgamma from u (B, T, D) and all states (B, P+T, D), by chunks of query rows."""
    (B, T, D), (columns, K) = u.shape, k.shape[1:]
    t = gradient_tiles(q.dtype, q.device)
    probabilities, means, score_gradients, products = _gradient_kernels(
        t, D, K, q.dtype, q.device, mask is not None
    )
    rows = min(max(CHUNK_ELEMENTS // (B * columns), -(-CHUNK_TILES // B) * t.rows), T)
    chunk = -(-rows // t.rows) * t.rows
    widest = max(t.rows, t.columns)
    padded = -(-columns // widest) * widest
    parts = _shares(t, D)
    p = torch.empty(B, chunk, padded, dtype=q.dtype, device=q.device)
    r = torch.empty(parts, B, T, dtype=torch.float32, device=q.device)
    dq = torch.empty(B, T, K, dtype=q.dtype, device=q.device)
    dk = torch.empty(B, columns, K, dtype=q.dtype, device=q.device)
    dgamma = torch.empty_like(gamma)
    dk_sum = torch.empty_like(dk, dtype=torch.float32) if chunk < T else dk
    if chunk < T:
        dk_sum.zero_()
    shift = 15.0 if q.dtype == torch.float16 else 0.0
    unit = _unit(u, states)
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
            grid, (q, k, lse, q if mask is None else mask, p), (q_rows, k_columns),
            (*by_score, *where, K, K**-0.5 * math.log2(math.e), shift),
        )  # fmt: skip
        means.launch(
            (parts, tiles, B), (p, u, states, r), (u_rows, s_columns),
            (*by_state, *where, D, shift),
        )  # fmt: skip
        score_gradients.launch(
            grid, (p, u, states, gamma, r, dgamma, unit), (u_rows, s_columns),
            (*by_state, *where, D, shift),
        )  # fmt: skip
        wide = -(-K // t.width)
        row_tasks = tiles * wide
        products.launch(
            (row_tasks + -(-seen // t.rows) * wide, B), (p, q, k, dq, dk, dk_sum, unit),
            (p_blocks, q_values, k_values),
            (*by_score, *where, K**-0.5, row_tasks, first + chunk >= T),
        )  # fmt: skip
    return dq, dk, dgamma


@functools.lru_cache(MOST_COMPILED)
def _gradient_kernels(
    t: Tiles, D: int, K: int, dtype: torch.dtype, device: torch.device, masked: bool
) -> tuple[Prepared, ...]:
    """The kernels of _score_gradients in the order in which they run."""
    from sessa_torch.feedback import cuda_backward as kernels

    common: dict[str, Any] = {"BM": t.rows, "BK": t.inner, "PRECISION": precision(dtype)}
    common["USE_TMA"] = has_tma(device)
    common |= {"num_warps": t.warps, "num_stages": t.stages}
    return (
        prepared(kernels.probabilities_kernel, BN=t.columns, MASKED=masked, **common),
        prepared(kernels.means_kernel, BN=t.columns, **common),
        prepared(kernels.score_gradients_kernel, BN=t.columns, PARTS=_shares(t, D), **common),
        prepared(kernels.products_kernel, K=K, BD=t.width, **common),
    )


def _shares(t: Tiles, D: int) -> int:
    """Programs that share the windows of a row tile in r: the wider the states, the longer each."""
    return 2 * -(-D // t.width)


def _unit(u: Tensor, states: Tensor) -> Tensor:
    """The factor that keeps score gradients, of which float16 holds few magnitudes, below 2^14.

    In other types the kernels do not read it.
    """
    if u.dtype != torch.float16:
        return u
    largest = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax() for x in (u, states)]
    bound = 2 * largest[0] * largest[1]
    return torch.where(bound > 0, 2.0**14 / bound, 1.0).reshape(1)
