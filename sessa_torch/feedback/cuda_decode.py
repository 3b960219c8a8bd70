"""Triton kernels for at most DECODE_ROWS new rows behind a past, and their launches.

Decoding is bound by memory, so every cached key and state is read once, as it is stored, and the
past is split over time so that one sequence fills the device. Each program keeps the softmax of its
share of the past (maximum, sum, weighted states); a last kernel adds the shares in a fixed order
and solves the few new rows among themselves.

One row multiplies and adds without tensor cores, in one pass over keys and states. More rows take
two passes, scores and then weighted states, so that the second can be split over columns too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_torch.cuda.device import is_interpreter, shared_memory
from sessa_torch.cuda.launch import (
    number_of_shares,
    overlaps,
    power_of_two,
    prepared,
    rows_contiguous,
)
from sessa_torch.cuda.tiles import (
    NOTHING,
    is_finite,
    log_sum,
    start_next_kernel,
    wait_for_kernel_before,
)
from sessa_torch.feedback.cuda_sizes import DECODE_ROWS, product_precision

# One row reads steps of so many keys and states at most, this deep ahead of their use, and with so
# few warps that a warp sums a whole key. A step takes one part in STEP_SHARE of the shared memory.
MOST_KEYS, ONE_ROW_STAGES, ONE_ROW_WARPS, STEP_SHARE = 128, 3, 4, 7
# Shared memory of a program in the interpreter: small, so that there are several steps.
KIB = 1024
INTERPRETED_SHARED = 56 * KIB
# Width up to which keys and states of one row are held whole.
ONE_ROW_WIDTH = 4096
# Most shares of the past, so that the last kernel holds its columns of all of them.
MOST_SHARES, MOST_SHARES_OF_ROWS = 256, 64
# For more than one row: keys of a tile of scores, bytes of each in a step, steps ahead, warps.
KEYS, KEY_BYTES, KEY_STAGES, KEY_WARPS = 64, 256, 4, 4
# Columns of a tile of states, a quarter of that with less shared memory; bytes of a column in a
# step, steps ahead, programs on a multiprocessor at a time. Wide tiles have more warps.
COLUMNS, COLUMNS_SHARED, COLUMN_BYTES, STATE_STAGES, ROWS_PER_SM = 512, 160 * KIB, 64, 3, 2


@dataclass(frozen=True, kw_only=True)
class Past:
    """The past of a few new rows as the kernels read it, with the new keys behind it."""

    q: Tensor  # (B, T, K)
    k: Tensor  # (B, P+T, K)
    s: Tensor  # (B, P, D)
    mask: Tensor | None  # (B, P+T), bytes
    length: Tensor | None  # (), int32, on the device
    rows: int  # P, or with a length the most that it may be
    chained: bool  # the kernel before on this stream lets others start before it ends

    @property
    def is_one_row(self) -> bool:
        """True if there is one new row whose keys and states can be held whole."""
        return self.q.shape[1] == 1 and max(self.q.shape[2], self.s.shape[2]) <= ONE_ROW_WIDTH

    @property
    def flags(self) -> dict[str, bool]:
        """Constants of the kernels."""
        return {"MASKED": self.mask is not None, "LIVE": self.length is not None}

    @property
    def extra(self) -> tuple[Tensor, Tensor]:
        """Mask and length as pointers; a kernel does not read the one that is absent."""
        absent = self.q
        return (
            absent if self.mask is None else self.mask,
            absent if self.length is None else self.length,
        )

    @property
    def mask_stride(self) -> int:
        """Distance of two sequences in the mask."""
        return 0 if self.mask is None else self.mask.stride(0)

    def shares(self, sequences: int, step: int, most: int, per_sm: int) -> int:
        """The number of shares of the past, which is read in steps of so many rows.

        With a length the size of the buffers does not matter, so a copied cache gives equal bits.
        """
        steps = most if self.length is not None else -(-self.rows // step)
        return number_of_shares(sequences, steps, most, per_sm, self.q.device)

    @property
    def scale(self) -> float:
        """The factor of scores, whose powers are taken of 2."""
        return self.q.shape[2] ** -0.5 * math.log2(math.e)


@dataclass(frozen=True, kw_only=True)
class Shares:
    """The past as the last kernel takes it: scores of the new keys, sums and parts of each share.

    One row has no new keys to read.
    """

    past: Past
    scores: Tensor  # (B, T, P+T)
    sums: Tensor  # (B, splits, 2, T)
    parts: Tensor  # (B, splits, T, D)


def solve_few_rows(
    f: Tensor,  # (B, T, D)
    q: Tensor,  # (B, T, K)
    k: Tensor,  # (B, P+T, K)
    gamma: Tensor,  # (B, T)
    past_s: Tensor,  # (B, P, D)
    key_mask: Tensor | None = None,  # (B, P+T)
    precision: str = "auto",
    length: Tensor | None = None,  # (), int32
) -> tuple[Tensor, Tensor]:
    """s (B, T, D) like f and the log-sum-exp (B, T) of at most DECODE_ROWS rows behind a past.

    Keys and states are read where they lie, in any mix of types. With a length on the device k,
    past_s and key_mask are buffers with room for more: the past is their first `length` rows, and
    the keys of the new rows follow it. Products of 16-bit keys, and of 16-bit states with more rows
    than one, have 16-bit operands (the latter not with precision "float32"), all others float32.
    """
    return solve_behind(f, gamma, read_past(q, k, past_s, key_mask, precision, length))


def read_past(
    q: Tensor,  # (B, T, K)
    k: Tensor,  # (B, P+T, K)
    past_s: Tensor,  # (B, P, D)
    key_mask: Tensor | None = None,  # (B, P+T)
    precision: str = "auto",
    length: Tensor | None = None,  # (), int32
    *,
    chained: bool = False,
) -> Shares:
    """The part of `solve_few_rows` that needs no f: all keys and states are read here.

    `chained` says that the kernel before on this stream lets others start before it ends.
    """
    q, k, past_s = (rows_contiguous(x) for x in (q, k, past_s))
    mask = None if key_mask is None else rows_contiguous(key_mask).view(torch.uint8)
    rows = min(past_s.shape[1], k.shape[1] - q.shape[1])
    past = Past(q=q, k=k, s=past_s, mask=mask, length=length, rows=rows, chained=chained)
    return _read_with_one_row(past) if past.is_one_row else _read_with_rows(past, precision)


def solve_behind(
    f: Tensor,  # (B, T, D)
    gamma: Tensor,  # (B, T)
    shares: Shares,
    *,
    append: bool = False,
) -> tuple[Tensor, Tensor]:
    """The rest of `solve_few_rows`; with `append`, s is also written behind the past states."""
    (B, T, D), past = f.shape, shares.past
    f, gamma = rows_contiguous(f), gamma.contiguous()
    s = torch.empty(B, T, D, dtype=f.dtype, device=f.device)
    lse = torch.empty(B, T, dtype=torch.float64, device=f.device)
    splits, columns = shares.sums.shape[1], 32 if T == 1 else 16
    early = past.is_one_row and overlaps(f.device)
    prepared(
        combine_kernel, D=D, BD=columns, ROWS=1 if T == 1 else DECODE_ROWS,
        SPLITS=power_of_two(splits), LIVE=past.length is not None, OVERLAP=early,
        CHAINED=past.chained, APPEND=append, num_warps=4 if T == 1 else 8,
        **({"launch_pdl": True} if early else {}),
    ).launch(
        (-(-D // columns), B),
        (f, gamma, shares.scores, past.extra[1], shares.sums, shares.parts, s, lse, past.s),
        (), (*f.stride()[:2], *past.s.stride()[:2], T, past.rows, shares.scores.shape[2], splits),
    )
    return s, lse


def _read_with_one_row(past: Past) -> Shares:
    (B, _, K), D, device = past.q.shape, past.s.shape[2], past.q.device
    BK, BD = power_of_two(K), power_of_two(D)
    sizes = past.k.element_size(), past.s.element_size()
    keys, per_sm = one_row_steps(
        K * sizes[0] + D * sizes[1], BK * sizes[0] + BD * sizes[1], device
    )
    splits = past.shares(B, keys, MOST_SHARES, per_sm)
    sums = torch.empty(B, splits, 2, 1, dtype=torch.float32, device=device)
    parts = torch.empty(B, splits, 1, D, dtype=torch.float32, device=device)
    early = overlaps(device)
    prepared(
        one_row_kernel, K=K, D=D, BN=keys, BK=BK, BD=BD, STAGES=ONE_ROW_STAGES, SCALE=past.scale,
        K_UNIT=unit(past.k), S_UNIT=unit(past.s), num_warps=ONE_ROW_WARPS, OVERLAP=early,
        CHAINED=past.chained, **past.flags,
        **({"launch_pdl": True} if early and past.chained else {}),
    ).launch(
        (splits, B), (past.q, past.k, past.s, *past.extra, sums, parts), (),
        (past.q.stride(0), *past.k.stride()[:2], *past.s.stride()[:2], past.mask_stride,
         past.rows, splits),
    )
    return Shares(past=past, scores=sums, sums=sums, parts=parts)


def _read_with_rows(past: Past, precision: str) -> Shares:
    scores = _scores(past)
    sums, parts = _weighted_states(past, scores, precision)
    return Shares(past=past, scores=scores, sums=sums, parts=parts)


def _scores(past: Past) -> Tensor:
    """Scores (B, T, P+T) of the new rows and all keys, the new ones included."""
    (B, T, K), columns = past.q.shape, past.rows + past.q.shape[1]
    scores = torch.empty(B, T, columns, dtype=torch.float32, device=past.q.device)
    inner = min(KEY_BYTES // past.q.element_size(), power_of_two(K, 16))
    prepared(
        scores_kernel, K=K, BN=KEYS, BK=inner, ROWS=DECODE_ROWS, STAGES=KEY_STAGES,
        UNIT=unit(past.k), SCALE=past.scale, PRECISION=product_precision(past.q.dtype),
        num_warps=KEY_WARPS, **past.flags,
    ).launch(
        (-(-columns // KEYS), B), (past.q, past.k, *past.extra, scores), (),
        (*past.q.stride()[:2], *past.k.stride()[:2], past.mask_stride, T, past.rows, columns),
    )
    return scores


def _weighted_states(past: Past, scores: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Sums (B, splits, 2, T) and parts (B, splits, T, D) of all shares of the past."""
    (B, T, columns), D, device = scores.shape, past.s.shape[2], scores.device
    most = COLUMNS if _shared(device) >= COLUMNS_SHARED else COLUMNS // 4
    width = min(most, power_of_two(D, 16))
    widen = precision == "float32" and past.s.dtype.itemsize == 2
    states = COLUMN_BYTES // past.s.element_size()
    pieces = -(-D // width)
    splits = past.shares(B * pieces, states, MOST_SHARES_OF_ROWS, ROWS_PER_SM)
    sums = torch.empty(B, splits, 2, T, dtype=torch.float32, device=device)
    parts = torch.empty(B, splits, T, D, dtype=torch.float32, device=device)
    prepared(
        weighted_states_kernel, D=D, BN=states, BD=width, ROWS=DECODE_ROWS, STAGES=STATE_STAGES,
        WIDE=widen, PRECISION=product_precision(torch.float32 if widen else past.s.dtype),
        UNIT=unit(past.s), num_warps=8 if width > 128 else 4, **past.flags,
    ).launch(
        (pieces, splits, B), (scores, past.s, *past.extra, sums, parts), (),
        (*past.s.stride()[:2], past.mask_stride, T, past.rows, columns, splits),
    )
    return sums, parts


def unit(cache: Tensor) -> int:
    """Elements that may be read at once: the greatest power of two up to 16 in the strides.

    Triton finds out about 16 only, and would read a row of 1,000 numbers one by one.
    """
    return math.gcd(16, *cache.stride()[:2])


def one_row_steps(row_bytes: int, held_bytes: int, device: torch.device) -> tuple[int, int]:
    """Keys and states of a step for one row, and how many such programs a multiprocessor holds.

    A key and a state have row_bytes, and held_bytes with their widths filled up to powers of two.
    """
    shared = _shared(device)
    keys = min(max(shared // STEP_SHARE // row_bytes, 2), MOST_KEYS)
    keys = 1 << keys.bit_length() - 1
    ahead = (ONE_ROW_STAGES - 1) * keys * held_bytes
    return keys, max(1, shared // (ahead + KIB))


def _shared(device: torch.device) -> int:
    return INTERPRETED_SHARED if is_interpreter() else shared_memory(device)


@triton.jit
def share_of_past(length, P, split, splits, LIVE: tl.constexpr):
    """Length of the past, and first and last row (exclusive) of one share of it.

    With LIVE the length is read from the device, so that a captured graph follows a growing cache.
    """
    if LIVE:
        P = tl.load(length)
    share = tl.cdiv(P, splits)
    begin = split * share
    return P, begin, tl.minimum(begin + share, P)


@triton.jit(do_not_specialize=["smb", "P", "splits"])
def one_row_kernel(
    q, k, past, mask, length, sums, parts, sqb, skb, skt, spb, spt, smb, P, splits,
    K: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    K_UNIT: tl.constexpr, S_UNIT: tl.constexpr, STAGES: tl.constexpr, SCALE: tl.constexpr,
    MASKED: tl.constexpr, LIVE: tl.constexpr, OVERLAP: tl.constexpr, CHAINED: tl.constexpr,
):
    """Softmax of one row over a share of the past: sums (B, splits, 2) takes maximum and sum, parts
    (B, splits, D) the states weighted by exp2(score - maximum)."""
    if OVERLAP:
        if CHAINED:
            wait_for_kernel_before()
        start_next_kernel()
    skb, skt = skb // K_UNIT * K_UNIT, skt // K_UNIT * K_UNIT
    spb, spt = spb // S_UNIT * S_UNIT, spt // S_UNIT * S_UNIT
    split, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    P, begin, end = share_of_past(length, P, split, splits, LIVE)
    inner, d, near = tl.arange(0, BK), tl.arange(0, BD), tl.arange(0, BN)
    x = tl.load(q + b * sqb + inner, mask=inner < K, other=0.0).to(tl.float32) * SCALE
    k += b * skb
    past += b * spb
    # Each place of a step has a softmax of its own, so that no step waits for a sum over keys.
    top, total = tl.full((BN,), NOTHING, tl.float32), tl.zeros((BN,), tl.float32)
    acc = tl.zeros((BN, BD), tl.float32)
    for first in tl.range(begin, end, BN, num_stages=STAGES):
        row = (first + near).to(tl.int64)[:, None]
        seen = first + near < end
        y = tl.load(k + row * skt + inner[None, :], mask=seen[:, None] & (inner < K)[None, :])
        v = tl.load(past + row * spt + d[None, :], mask=seen[:, None] & (d < D)[None, :])
        if MASKED:
            seen = seen & (tl.load(mask + b * smb + first + near, mask=seen, other=0) != 0)
        # Selected after the load: what is hidden or outside may be anything.
        y = tl.where((inner < K)[None, :], y.to(tl.float32), 0.0)
        s = tl.where(seen, tl.sum(y * x[None, :], 1), float("-inf"))
        new = tl.maximum(top, s)
        e, keep = tl.exp2(s - new), tl.exp2(top - new)
        total = total * keep + e
        v = tl.where(seen[:, None], v.to(tl.float32), 0.0)
        acc = acc * keep[:, None] + v * e[:, None]
        top = new
    part = b * splits + split
    largest = tl.max(top, 0)
    e = tl.exp2(top - largest)
    tl.store(sums + part * 2, largest)
    tl.store(sums + part * 2 + 1, tl.sum(total * e, 0))
    tl.store(parts + part * D + d, tl.sum(acc * e[:, None], 0), mask=d < D)


@triton.jit(do_not_specialize=["smb", "T", "P", "C"])
def scores_kernel(
    q, k, mask, length, scores, sqb, sqt, skb, skt, smb, T, P, C,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    UNIT: tl.constexpr, SCALE: tl.constexpr, MASKED: tl.constexpr, LIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores (B, T, C) of the new rows and BN keys, -inf where a key is hidden."""
    skb, skt = skb // UNIT * UNIT, skt // UNIT * UNIT
    b = tl.program_id(1).to(tl.int64)
    if LIVE:
        P = tl.load(length)
    rows, inner = tl.arange(0, ROWS), tl.arange(0, BK)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = cols < P + T
    q_at = q + b * sqb + (rows.to(tl.int64) * sqt)[:, None]
    k_at = k + b * skb + (cols.to(tl.int64) * skt)[:, None]
    s = tl.zeros((ROWS, BN), tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        at = start + inner
        x = tl.load(q_at + at[None, :], mask=(rows < T)[:, None] & (at < K)[None, :], other=0.0)
        y = tl.load(k_at + at[None, :], mask=inside[:, None] & (at < K)[None, :], other=0.0)
        s = tl.dot(x, y.T, s, input_precision=PRECISION)
    s *= SCALE
    if MASKED:
        seen = tl.load(mask + b * smb + cols, mask=inside, other=0) != 0
        s = tl.where(seen[None, :], s, float("-inf"))
    at = scores + (b * T + rows[:, None]) * C + cols[None, :]
    tl.store(at, s, mask=(rows < T)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["smb", "T", "P", "C", "splits"])
def weighted_states_kernel(
    scores, past, mask, length, sums, parts, spb, spt, smb, T, P, C, splits,
    D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    UNIT: tl.constexpr, MASKED: tl.constexpr, LIVE: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Softmax of the rows over a share of the past, and BD columns of the states weighted by it.

    sums is (B, splits, 2, T), parts (B, splits, T, D). With WIDE 16-bit states are multiplied as
    float32.
    """
    spb, spt = spb // UNIT * UNIT, spt // UNIT * UNIT
    split, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    P, begin, end = share_of_past(length, P, split, splits, LIVE)
    rows, near = tl.arange(0, ROWS), tl.arange(0, BN)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    row_ok, d_ok = rows < T, d < D
    s_at = scores + (b * T + rows[:, None]) * C + near[None, :]
    past += b * spb
    top = tl.full((ROWS,), NOTHING, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BD), tl.float32)
    for first in tl.range(begin, end, BN, num_stages=STAGES):
        row = (first + near).to(tl.int64)[:, None]
        seen = first + near < end
        ok = row_ok[:, None] & seen[None, :]
        s = tl.load(s_at + first, mask=ok, other=float("-inf"))
        v = tl.load(past + row * spt + d[None, :], mask=seen[:, None] & d_ok[None, :], other=0.0)
        if WIDE:
            v = v.to(tl.float32)
        if MASKED:
            seen = seen & (tl.load(mask + b * smb + first + near, mask=seen, other=0) != 0)
            v = tl.where(seen[:, None], v, 0.0)
        new = tl.maximum(top, tl.max(s, 1))
        e = tl.exp2(s - new[:, None]).to(v.dtype)
        keep = tl.exp2(top - new)
        # The sum of what is multiplied, so that the weights of a row add up to one.
        total = total * keep + tl.sum(e.to(tl.float32), 1)
        acc = tl.dot(e, v, acc * keep[:, None], input_precision=PRECISION)
        top = new
    part = b * splits + split
    if tl.program_id(0) == 0:
        tl.store(sums + part * 2 * T + rows, top, mask=row_ok)
        tl.store(sums + part * 2 * T + T + rows, total, mask=row_ok)
    at = parts + (part * T + rows[:, None]) * D + d[None, :]
    tl.store(at, acc, mask=row_ok[:, None] & d_ok[None, :])


@triton.jit
def spoil_behind(x, finite, SIZE: tl.constexpr):
    """x (SIZE, columns) with NaN behind the first row of each column that is not finite."""
    rows = tl.arange(0, SIZE)[:, None]
    first = tl.min(tl.where(finite, SIZE, rows), 0)
    if tl.min(first, 0) < SIZE:
        x = tl.where(rows > first[None, :], float("nan"), x)
    return x


@triton.jit(do_not_specialize=["T", "P", "C", "splits"])
def combine_kernel(
    f, gamma, scores, length, sums, parts, s, lse, states, sfb, sft, ssb, sst, T, P, C, splits,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, LIVE: tl.constexpr,
    OVERLAP: tl.constexpr, CHAINED: tl.constexpr, APPEND: tl.constexpr,
):
    """Add the shares of the past and solve the new rows among themselves, for BD columns of s."""
    b = tl.program_id(1).to(tl.int64)
    rows, split = tl.arange(0, ROWS), tl.arange(0, SPLITS)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    row_ok, d_ok = rows < T, d < D
    ok = row_ok[:, None] & d_ok[None, :]
    if OVERLAP and CHAINED:
        # What made f may still have been running when this kernel was started.
        start_next_kernel()
        wait_for_kernel_before()
    f_at = f + b * sfb + (rows.to(tl.int64) * sft)[:, None] + d[None, :]
    right = tl.load(f_at, mask=ok, other=0.0).to(tl.float32)
    own = tl.load(gamma + b * T + rows, mask=row_ok, other=0.0).to(tl.float32)
    if OVERLAP and not CHAINED:
        wait_for_kernel_before()
    live = (split < splits)[:, None] & row_ok[None, :]
    part = b * splits + split
    sums_at = sums + (part * 2 * T)[:, None] + rows[None, :]
    tops = tl.load(sums_at, mask=live, other=NOTHING)
    totals = tl.load(sums_at + T, mask=live, other=0.0)
    at = parts + ((part[:, None] * T + rows[None, :]) * D)[:, :, None] + d[None, None, :]
    shares = tl.load(at, mask=live[:, :, None] & d_ok[None, None, :], other=0.0)
    top = tl.max(tops, 0)
    if LIVE:
        P = tl.load(length)
    if ROWS > 1:
        earlier = (rows[None, :] < rows[:, None]) & row_ok[:, None]
        new_at = scores + (b * T + rows[:, None]) * C + P + rows[None, :]
        new = tl.load(new_at, mask=earlier, other=float("-inf"))
        top = tl.maximum(top, tl.max(new, 1))
        e = tl.exp2(new - top[:, None])
    weights = tl.exp2(tops - top[None, :])
    total = tl.sum(totals * weights, 0)
    if ROWS > 1:
        total += tl.sum(e, 1)
    gain = tl.where(total == 0, 0.0, own / tl.where(total == 0, 1.0, total))
    z = right + tl.sum(shares * weights[:, :, None], 0) * gain[:, None]
    if ROWS > 1:
        # A row that is not finite is left out of the products: there it would reach those before.
        e = tl.where(is_finite(gain)[:, None], e, 0.0)
        # The strictly lower triangular N is nilpotent: its inverse is (I + N)(I + N^2)(I + N^4)....
        power = e * tl.where(is_finite(gain), gain, 0.0)[:, None]
        X = power
        for _ in range(3):
            power = tl.dot(power, power, input_precision="ieee")
            X += power + tl.dot(X, power, input_precision="ieee")
        # What no row sees may be anything.
        used = tl.max(e, 0) > 0
        finite = is_finite(z)
        operand = tl.where(used[:, None] & finite, z, 0.0)
        z = tl.dot(X, operand, z, input_precision="ieee")
        z = spoil_behind(z, finite | ~used[:, None], ROWS)
    # A row without feedback is f itself, whatever the states are.
    z = tl.where(gain[:, None] == 0, right, z)
    tl.store(s + (b * T + rows[:, None]) * D + d[None, :], z.to(s.dtype.element_ty), mask=ok)
    if APPEND:
        behind = states + b * ssb + ((P + rows).to(tl.int64) * sst)[:, None] + d[None, :]
        tl.store(behind, z.to(states.dtype.element_ty), mask=ok)
    if tl.program_id(0) == 0:
        tl.store(lse + b * T + rows, log_sum(top, total), mask=row_ok)
