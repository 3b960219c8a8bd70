"""The solve of a few new rows behind a long past on CUDA: every cached key and state is read once.

The past is split over time so that one sequence fills the device. Each program computes the softmax
of its part (maximum, sum, weighted states); a second kernel adds the parts in a fixed order and
solves the few new rows among themselves.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_torch.cuda.device import num_sms
from sessa_torch.cuda.launch import mask_bytes, prepared, rows_contiguous
from sessa_torch.cuda.tiles import NOTHING, log_sum
from sessa_torch.feedback.cuda_sizes import DECODE_ROWS, gradient_tiles, precision

# Rows of a tile.
ROWS = tl.constexpr(DECODE_ROWS)


def solve_few_rows(
    f: Tensor,  # (B, T, D)
    q: Tensor,  # (B, T, K)
    k: Tensor,  # (B, P+T, K)
    gamma: Tensor,  # (B, T)
    past_s: Tensor,  # (B, P, D)
    key_mask: Tensor | None,  # (B, P+T)
) -> tuple[Tensor, Tensor]:
    """`cuda.solve_forward` for at most DECODE_ROWS rows behind a past."""
    dtype = torch.promote_types(f.dtype, q.dtype)
    q, k = q.to(dtype), k.to(dtype)
    (B, T, D), P, K = f.shape, past_s.shape[1], q.shape[2]
    f, q, k, past_s = (rows_contiguous(x) for x in (f, q, k, past_s))
    seen, gamma = mask_bytes(key_mask), gamma.contiguous()
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
    common |= {"MASKED": key_mask is not None, "PRECISION": precision(q.dtype)}
    seen = q if seen is None else seen
    prepared(past_kernel, BN=block, BD=wide, num_warps=8, **common).launch(
        (splits, B), (q, k, past_s, seen, sums, parts), (),
        (*q.stride()[:2], *k.stride()[:2], *past_s.stride()[:2], T, P, share),
    )
    most = max(16, 1 << (splits - 1).bit_length())
    prepared(combine_kernel, BD=32, SPLITS=most, num_warps=4, **common).launch(
        (-(-D // 32), B), (f, q, k, gamma, seen, sums, parts, s, lse), (),
        (*f.stride()[:2], *q.stride()[:2], *k.stride()[:2], T, P, splits),
    )
    return s, lse


@triton.jit(do_not_specialize=["T", "P", "share"])
def past_kernel(
    q, k, past, mask, sums, parts, sqb, sqt, skb, skt, spb, spt, T, P, share,
    K: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    SCALE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):
    """Softmax of the rows over one share of the past: sums (B, splits, 2, ROWS) takes maximum and
    sum, parts (B, splits, T, D) the states weighted by exp2(score - maximum)."""
    split = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, ROWS)
    inner = tl.arange(0, BK)
    d = tl.arange(0, BD)
    q_rows = q + b * sqb + (tl.minimum(rows, T - 1).to(tl.int64) * sqt)[:, None]
    top = tl.full((ROWS,), NOTHING, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BD), tl.float32)
    for first in range(split * share, tl.minimum((split + 1) * share, P), BN):
        cols = first + tl.arange(0, BN)
        near = tl.minimum(cols, P - 1).to(tl.int64)
        k_cols = k + b * skb + (near * skt)[None, :]
        s = tl.zeros((ROWS, BN), tl.float32)
        for start in range(0, K, BK):
            inside = start + inner < K
            x = tl.load(q_rows + (start + inner)[None, :], mask=inside[None, :], other=0.0)
            y = tl.load(k_cols + (start + inner)[:, None], mask=inside[:, None], other=0.0)
            s = tl.dot(x, y, s, input_precision=PRECISION)
        seen = cols < P
        if MASKED:
            seen = seen & (tl.load(mask + b * (P + T) + near) != 0)
        s = tl.where(seen[None, :], s * SCALE, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        e = tl.exp2(s - new[:, None]).to(q.dtype.element_ty)
        keep = tl.exp2(top - new)
        total = total * keep + tl.sum(e.to(tl.float32), 1)
        v_at = past + b * spb + (near * spt)[:, None] + d[None, :]
        v = tl.load(v_at, mask=(d < D)[None, :], other=0.0).to(q.dtype.element_ty)
        acc = tl.dot(e, v, acc * keep[:, None], input_precision=PRECISION)
        top = new
    part = b * tl.num_programs(0) + split
    tl.store(sums + part * 2 * ROWS + rows, top)
    tl.store(sums + part * 2 * ROWS + ROWS + rows, total)
    at = parts + (part * T + rows[:, None]) * D + d[None, :]
    tl.store(at, acc, mask=(rows < T)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["T", "P", "splits"])
def combine_kernel(
    f, q, k, gamma, mask, sums, parts, s, lse, sfb, sft, sqb, sqt, skb, skt, T, P, splits,
    K: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr,
    SCALE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):
    """Add the shares of the past and solve the new rows among themselves, for BD columns of s."""
    b = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, ROWS)
    inner = tl.arange(0, BK)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    split = tl.arange(0, SPLITS)
    near = tl.minimum(rows, T - 1).to(tl.int64)
    new = tl.zeros((ROWS, ROWS), tl.float32)
    if T > 1:
        for start in range(0, K, BK):
            inside = start + inner < K
            x_at = q + b * sqb + (near * sqt)[:, None] + (start + inner)[None, :]
            y_at = k + b * skb + ((P + near) * skt)[None, :] + (start + inner)[:, None]
            x = tl.load(x_at, mask=inside[None, :], other=0.0)
            y = tl.load(y_at, mask=inside[:, None], other=0.0)
            new = tl.dot(x, y, new, input_precision=PRECISION)
    seen = (rows[None, :] < rows[:, None]) & (rows < T)[None, :]
    if MASKED:
        seen = seen & (tl.load(mask + b * (P + T) + P + near) != 0)[None, :]
    new = tl.where(seen, new * SCALE, float("-inf"))
    at = sums + ((b * splits + split) * 2 * ROWS)[:, None] + rows[None, :]
    live = (split < splits)[:, None] & (rows >= 0)[None, :]
    tops = tl.load(at, mask=live, other=NOTHING)
    top = tl.maximum(tl.max(tops, 0), tl.max(new, 1))
    e = tl.exp2(new - top[:, None])
    total = tl.load(at + ROWS, mask=live, other=0.0) * tl.exp2(tops - top[None, :])
    total = tl.sum(total, 0) + tl.sum(e, 1)
    visible = total > 0
    own = tl.load(gamma + b * T + rows, mask=rows < T, other=0.0).to(tl.float32)
    gain = tl.where(visible, own / tl.where(visible, total, 1.0), 0.0)
    rhs = tl.zeros((ROWS, BD), tl.float32)
    for t in range(T):
        # Row t of every share, weighted by exp2 of its maximum over the row's own.
        one = tl.load(
            sums + (b * splits + split) * 2 * ROWS + t, mask=split < splits, other=NOTHING
        )
        weight = tl.exp2(one - tl.max(tl.where(rows == t, top, 2 * NOTHING), 0))
        part_at = parts + (((b * splits + split) * T + t) * D)[:, None] + d[None, :]
        part = tl.load(part_at, mask=(split < splits)[:, None] & (d < D)[None, :], other=0.0)
        rhs = tl.where((rows == t)[:, None], tl.sum(part * weight[:, None], 0)[None, :], rhs)
    ok = (rows < T)[:, None] & (d < D)[None, :]
    f_at = f + b * sfb + (near * sft)[:, None] + d[None, :]
    rhs = rhs * gain[:, None] + tl.load(f_at, mask=ok, other=0.0).to(tl.float32)
    # The strictly lower triangular N is nilpotent: its inverse is (I + N)(I + N^2)(I + N^4)....
    power = e * gain[:, None]
    X = power
    for _ in range(3):
        power = tl.dot(power, power, input_precision="ieee")
        X += power + tl.dot(X, power, input_precision="ieee")
    rhs = tl.dot(X, rhs, rhs, input_precision="ieee")
    tl.store(s + (b * T + rows[:, None]) * D + d[None, :], rhs.to(s.dtype.element_ty), mask=ok)
    if tl.program_id(0) == 0:
        tl.store(lse + b * T + rows, log_sum(top, total), mask=rows < T)
