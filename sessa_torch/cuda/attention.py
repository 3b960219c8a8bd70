"""Attention of a few new rows over cached keys and values on CUDA.

The past is split over time, so that one sequence fills the device. Keys and values are read once,
as they are stored, by all query heads that share them; sums are float32. The length is read from
the device, so that a captured graph follows a cache that grows inside its buffers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_torch.cuda.launch import launch_options, number_of_shares, power_of_two, prepared
from sessa_torch.cuda.tiles import NOTHING, start_next_kernel, wait_for_kernel_before

# Numbers of a step's keys, steps ahead, and programs on a multiprocessor at a time.
KEY_NUMBERS, STAGES, PER_SM = 4096, 3, 4
# Most shares of the past, so that the last kernel holds those of a head.
MOST_SHARES = 64
# Rows of a program when there are more than one.
ROWS = 16


def attend(
    q: Tensor,  # (B, T, H, d)
    k: Tensor,  # (B, G, capacity, d)
    v: Tensor,  # (B, G, capacity, d)
    length: Tensor,  # (), int32
    mask: Tensor | None,  # (B, capacity)
    *,
    unrelated: bool = False,
    out: Tensor,  # (B, T, H, d)
) -> Tensor:
    """`causal_attention` of T new rows behind `length` cached ones, in `out`.

    `unrelated` says that nothing here was written by the kernel just before, whose end is waited
    for only at the end.

    The new keys and values already lie behind the cached ones. Products of 16-bit keys and values
    have 16-bit operands where T or H / G is above 1, all others float32.
    """
    (B, T, H, d), G, device = q.shape, k.shape[1], q.device
    group = T * H // G
    rows = 1 if group == 1 else ROWS
    blocks = -(-group // rows)
    # The size of the buffers does not matter, so a copied cache gives equal bits.
    splits = number_of_shares(B * G * blocks, MOST_SHARES, MOST_SHARES, PER_SM, device)
    sums = torch.empty(B * G, splits, 2, group, dtype=torch.float32, device=device)
    parts = torch.empty(B * G, splits, group, d, dtype=torch.float32, device=device)
    launch = {"num_warps": 4, **launch_options(device)}
    seen = q if mask is None else mask.view(torch.uint8)
    wide = power_of_two(d, 16)
    prepared(
        attend_kernel, H=H, G=G, d=d, BD=wide, BN=min(64, KEY_NUMBERS // wide), ROWS=rows,
        STAGES=STAGES, SCALE=d**-0.5 * math.log2(math.e), MASKED=mask is not None,
        PRECISION="ieee", UNRELATED=unrelated and d * k.element_size() % 16 == 0, **launch,
    ).launch(
        (splits, B * G, blocks), (q, k, v, seen, length, sums, parts), (),
        (*k.stride()[:3], *v.stride()[:3], 0 if mask is None else mask.stride(0), T, splits),
    )
    prepared(
        merge_kernel, H=H, G=G, d=d, BD=power_of_two(d), SPLITS=power_of_two(splits), **launch
    ).launch((B * T * H,), (sums, parts, out), (), (T, splits))
    return out


@triton.jit(do_not_specialize=["smb", "T", "splits"])
def attend_kernel(
    q, k, v, mask, length, sums, parts, skb, skg, skt, svb, svg, svt, smb, T, splits,
    H: tl.constexpr, G: tl.constexpr, d: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, SCALE: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, UNRELATED: tl.constexpr, OVERLAP: tl.constexpr,
):
    """Softmax of ROWS rows of a key/value head over a share of the keys.

    The rows of a head are its T new positions, each with its H / G query heads. sums (B G, splits,
    2, rows) takes maxima and sums, parts (B G, splits, rows, d) the values weighted by
    exp2(score - maximum).
    """
    E: tl.constexpr = H // G
    split, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    b, g, count = head // G, head % G, T * E
    row_ok, t = rows < count, rows // E
    inner, near = tl.arange(0, BD), tl.arange(0, BN)
    inner_ok = inner < d
    if OVERLAP:
        start_next_kernel()
        if not UNRELATED:
            wait_for_kernel_before()
    # What was written just before is read past the first cache, which may hold older values.
    P = tl.load(length, cache_modifier=".cg")
    share = tl.cdiv(P + T, splits)
    begin = split * share
    end = tl.minimum(begin + share, P + T)
    q_at = ((b * T + t) * H + g * E + rows % E) * d
    ok = row_ok[:, None] & inner_ok[None, :]
    x = tl.load(q + q_at[:, None] + inner[None, :], mask=ok, other=0.0, cache_modifier=".cg")
    k += b * skb + g * skg
    v += b * svb + g * svg
    part = head * splits + split
    if ROWS == 1:
        x = tl.sum(x.to(tl.float32), 0) * SCALE
        # Each place of a step has a softmax of its own, so that no step waits for a sum over keys.
        tops, totals = tl.full((BN,), NOTHING, tl.float32), tl.zeros((BN,), tl.float32)
        accs = tl.zeros((BN, BD), tl.float32)
        for first in tl.range(begin, end, BN, num_stages=STAGES):
            at = (first + near).to(tl.int64)[:, None]
            seen = first + near < end
            y = tl.load(k + at * skt + inner[None, :], mask=seen[:, None] & inner_ok[None, :])
            u = tl.load(v + at * svt + inner[None, :], mask=seen[:, None] & inner_ok[None, :])
            if MASKED:
                shown = tl.load(mask + b * smb + first + near, mask=seen, other=0) != 0
                seen = seen & (shown | (first + near == P))
            # Selected after the load: what is hidden or outside may be anything.
            y = tl.where(inner_ok[None, :], y.to(tl.float32), 0.0)
            s = tl.where(seen, tl.sum(y * x[None, :], 1), float("-inf"))
            news = tl.maximum(tops, s)
            weights, keeps = tl.exp2(s - news), tl.exp2(tops - news)
            totals = totals * keeps + weights
            u = tl.where(seen[:, None], u.to(tl.float32), 0.0)
            accs = accs * keeps[:, None] + u * weights[:, None]
            tops = news
        top = tl.max(tops, 0)
        weights = tl.exp2(tops - top)
        if OVERLAP and UNRELATED:
            wait_for_kernel_before()
        tl.store(sums + part * 2, top)
        tl.store(sums + part * 2 + 1, tl.sum(totals * weights, 0))
        tl.store(parts + part * d + inner, tl.sum(accs * weights[:, None], 0), mask=inner_ok)
    else:
        tops = tl.full((ROWS,), NOTHING, tl.float32)
        totals = tl.zeros((ROWS,), tl.float32)
        accs = tl.zeros((ROWS, BD), tl.float32)
        for first in tl.range(begin, end, BN, num_stages=STAGES):
            at = (first + near).to(tl.int64)[:, None]
            inside = first + near < end
            tile_ok = inside[:, None] & inner_ok[None, :]
            y = tl.load(k + at * skt + inner[None, :], mask=tile_ok, other=0.0)
            u = tl.load(v + at * svt + inner[None, :], mask=tile_ok, other=0.0)
            key = (first + near)[None, :]
            shows = inside[None, :] & (key <= P + t[:, None])
            if MASKED:
                shown = tl.load(mask + b * smb + first + near, mask=inside, other=0) != 0
                shows = shows & (shown[None, :] | (key == P + t[:, None]))
                u = tl.where((shown | (first + near >= P))[:, None], u, 0.0)
            scores = tl.dot(x, y.T, input_precision=PRECISION) * SCALE
            scores = tl.where(shows, scores, float("-inf"))
            news = tl.maximum(tops, tl.max(scores, 1))
            weights = tl.exp2(scores - news[:, None]).to(u.dtype)
            keeps = tl.exp2(tops - news)
            # The sum of what is multiplied, so that the weights of a row add up to one.
            totals = totals * keeps + tl.sum(weights.to(tl.float32), 1)
            accs = tl.dot(weights, u, accs * keeps[:, None], input_precision=PRECISION)
            tops = news
        if OVERLAP and UNRELATED:
            wait_for_kernel_before()
        tl.store(sums + part * 2 * count + rows, tops, mask=row_ok)
        tl.store(sums + part * 2 * count + count + rows, totals, mask=row_ok)
        to = parts + (part * count + rows[:, None]) * d + inner[None, :]
        tl.store(to, accs, mask=ok)


@triton.jit(do_not_specialize=["T", "splits"])
def merge_kernel(
    sums, parts, out, T, splits,
    H: tl.constexpr, G: tl.constexpr, d: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Add the shares of one row of one query head, in a fixed order."""
    E: tl.constexpr = H // G
    row = tl.program_id(0).to(tl.int64)
    h, t, b = row % H, row // H % T, row // (H * T)
    head, place, count = b * G + h // E, t * E + h % E, T * E
    split, inner = tl.arange(0, SPLITS), tl.arange(0, BD)
    if OVERLAP:
        start_next_kernel()
        wait_for_kernel_before()
    part = head * splits + split
    live = split < splits
    tops = tl.load(sums + part * 2 * count + place, mask=live, other=NOTHING)
    totals = tl.load(sums + part * 2 * count + count + place, mask=live, other=0.0)
    at = (part * count + place)[:, None] * d + inner[None, :]
    shares = tl.load(parts + at, mask=live[:, None] & (inner < d)[None, :], other=0.0)
    weights = tl.exp2(tops - tl.max(tops, 0))
    value = tl.sum(shares * weights[:, None], 0) / tl.sum(totals * weights, 0)
    tl.store(out + row * d + inner, value.to(out.dtype.element_ty), mask=inner < d)
