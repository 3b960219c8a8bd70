"""All projections of a mixer for a few new rows on CUDA: one kernel up to the caches.

It applies rotary positions, and writes keys and values into their places in the caches, whose
length it reads from the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from sessa_torch.cuda.launch import launch_options, power_of_two, prepared
from sessa_torch.cuda.linear import Norm, norm_constants, norm_tensors, products, sizes
from sessa_torch.cuda.tiles import start_next_kernel, wait_for_kernel_before

Linear = tuple[Tensor, Tensor]  # weight and bias


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """The feedback's part of a projection: its weights, the cache of its keys, and the results.

    W is the width of a feedback key. proj has the queries' rows first and the keys' rows behind;
    gain is the weight (1, D) and the bias () of gamma = most tanh(gain).
    """

    proj: Linear
    gain: Linear
    most: float
    keys: Tensor  # (B, capacity, W)
    queries: Tensor  # (R, W)
    gamma: Tensor  # (R,) float32


def project(
    x: Tensor,  # (R, K)
    weights: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor, Tensor, Tensor] | None,
    *,
    norm: Norm | None,
    head_norms: tuple[Norm, Norm] | None,
    rope: tuple[Tensor, Tensor] | None,
    length: Tensor,  # (), int32
    hidden: Tensor,  # (B,), int32
    keys: Tensor,  # (B, G, capacity, d)
    values: Tensor,  # (B, G, capacity, d)
    feedback: Feedback | None,
    out: Tensor,  # (R, H d)
) -> Tensor:
    """Queries (R, H d) in `out`, of R / B new rows of each sequence; the rest goes into the caches.

    The new rows stand behind `length` cached ones, of which `hidden` (B,) are padding and have no
    position. weights and biases are those of queries, keys and values. head_norms are RMSNorms of
    every query and every key head. `rope` are tables (positions, d) of `rope_tables`.
    """
    (R, K), (B, G, _, d), H = x.shape, keys.shape, out.shape[1] // keys.shape[3]
    size = sizes(R, x.dtype)
    cos, sin = rope if rope is not None else (x, x)
    place = (cos, sin, length, hidden)
    W = 0 if feedback is None else feedback.queries.shape[1]
    tiles = [-(-n // size.columns) for n in (H * d, G * d, W)]
    programs = tiles[0] + 2 * tiles[1] + (0 if feedback is None else 2 * tiles[2] + 1)
    absent = (weights[0], weights[0])
    proj, gain, most, stored = absent, absent, 0.0, (keys, out, out)
    if feedback is not None:
        proj, gain, most = feedback.proj, feedback.gain, feedback.most
        stored = (feedback.keys, feedback.queries, feedback.gamma)
    prepared(
        project_kernel, K=K, H=H, G=G, d=d, W=W, **norm_constants(norm),
        ROPE=rope is not None and head_norms is None, BIAS=biases is not None,
        FEEDBACK=feedback is not None, MOST=most, **size.constants(K), **launch_options(x.device),
    ).launch(
        (programs, -(-R // size.rows)),
        (x, *norm_tensors(norm, x), *weights, proj[0], gain[0], *(biases or weights), proj[1],
         gain[1], *place, out, keys, values, *stored),
        (), (x.stride(0), R, R // B, *keys.stride()[:3], *values.stride()[:3],
             *stored[0].stride()[:2]),
    )
    if head_norms is not None:
        prepared(
            norm_heads_kernel, H=H, d=d, BD=power_of_two(d), ROPE=rope is not None,
            EPS=head_norms[0].eps, num_warps=1, **launch_options(x.device),
        ).launch(
            (R, H + G), (out, keys, *(part.weight for part in head_norms), *place), (),
            (R // B, *keys.stride()[:3]),
        )
    return out


@triton.jit(do_not_specialize=["R", "T"])
def project_kernel(
    x, norm_weight, norm_bias, wq, wk, wv, wf, wg, bq, bk, bv, bf, bg, cos, sin, length, hidden,
    out, keys, values, fb_keys, fb_queries, gamma,
    sx, R, T, skb, skg, skt, svb, svg, svt, sfb, sft,
    K: tl.constexpr, H: tl.constexpr, G: tl.constexpr, d: tl.constexpr, W: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
    RMS: tl.constexpr, EPS: tl.constexpr, BIAS: tl.constexpr, ROPE: tl.constexpr,
    FEEDBACK: tl.constexpr, MOST: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):
    """BN columns of a projection: queries, keys, values, feedback, gain, in this order."""
    TQ: tl.constexpr = (H * d + BN - 1) // BN
    TK: tl.constexpr = (G * d + BN - 1) // BN
    TF: tl.constexpr = (W + BN - 1) // BN
    BIASED: tl.constexpr = 0 if BIAS else 3
    tile = tl.program_id(0)
    part, w, bias, width = 0, wq, bq, H * d
    if tile >= TQ:
        part, w, bias, width, tile = 1, wk, bk, G * d, tile - TQ
        if tile >= TK:
            part, w, bias, tile = 2, wv, bv, tile - TK
            if FEEDBACK and tile >= TK:
                part, w, bias, width, tile = 3, wf, bf, W, tile - TK
                if tile >= TF:
                    part, w, bias, tile = 4, wf + W * K, bf + W, tile - TF
                    if tile >= TF:
                        part, w, width, tile = 5, wg, 1, tile - TF
    n = tile * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    acc = products(
        x, x, norm_weight, norm_bias, w, rows, n, width, sx, sx, R,
        K, BN, BK, BS, ROWS, 0, NORM, RMS, EPS, WHOLE, STAGES, PRECISION, OVERLAP,
    )
    has_bias = (n < width) & (part >= BIASED) & (part < 5)
    acc += tl.load(bias + n, mask=has_bias, other=0.0).to(tl.float32)[None, :]
    past = tl.load(length)
    b, place = (rows // T).to(tl.int64), (past + rows % T).to(tl.int64)
    ok = (rows < R)[:, None] & (n < width)[None, :]
    if ROPE and part < 2:
        position = place - tl.load(hidden + b, mask=rows < R, other=0)
        at = position[:, None] * d + (n % d)[None, :]
        even, odd = acc.reshape(ROWS, BN // 2, 2).split()
        swapped = tl.join(odd, even).reshape(ROWS, BN)
        acc = acc * tl.load(cos + at, mask=ok, other=0.0)
        acc += swapped * tl.load(sin + at, mask=ok, other=0.0)
    in_head = (n // d)[None, :]
    if part == 0:
        at = rows.to(tl.int64)[:, None] * (H * d) + n[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=ok)
    elif part == 1:
        at = (b * skb + place * skt)[:, None] + in_head * skg + (n % d)[None, :]
        tl.store(keys + at, acc.to(keys.dtype.element_ty), mask=ok)
    elif part == 2:
        at = (b * svb + place * svt)[:, None] + in_head * svg + (n % d)[None, :]
        tl.store(values + at, acc.to(values.dtype.element_ty), mask=ok)
    if FEEDBACK:
        if part == 3:
            at = rows.to(tl.int64)[:, None] * W + n[None, :]
            tl.store(fb_queries + at, acc.to(fb_queries.dtype.element_ty), mask=ok)
        elif part == 4:
            at = (b * sfb + place * sft)[:, None] + n[None, :]
            tl.store(fb_keys + at, acc.to(fb_keys.dtype.element_ty), mask=ok)
        elif part == 5:
            # The bias may be float32 in a 16-bit model. tanh by a power that cannot overflow.
            acc += tl.load(bg).to(tl.float32)
            small = tl.exp(-2 * tl.abs(acc))
            value = (1 - small) / (1 + small)
            gain = MOST * tl.where(acc < 0, -value, value)
            at = rows[:, None] + n[None, :]
            tl.store(gamma + at, gain, mask=ok)


@triton.jit(do_not_specialize=["T"])
def norm_heads_kernel(
    q, keys, q_weight, k_weight, cos, sin, length, hidden, T, skb, skg, skt,
    H: tl.constexpr, d: tl.constexpr, BD: tl.constexpr, ROPE: tl.constexpr, EPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """RMSNorm and rotary positions of a query or a key head of one new row, in place."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.arange(0, BD)
    ok = n < d
    if OVERLAP:
        start_next_kernel()
        wait_for_kernel_before()
    b, place = row // T, tl.load(length) + row % T
    x, weight = q + (row * H + head) * d, q_weight
    if head >= H:
        x, weight = keys + b * skb + place * skt + (head - H) * skg, k_weight
    # What was written just before is read past the first cache, which may hold older values.
    y = tl.load(x + n, mask=ok, other=0.0, cache_modifier=".cg").to(tl.float32)
    y *= tl.rsqrt(tl.sum(y * y, 0) / d + EPS)
    y *= tl.load(weight + n, mask=ok, other=0.0).to(tl.float32)
    if ROPE:
        at = (place - tl.load(hidden + b)) * d + n
        even, odd = y.reshape(BD // 2, 2).split()
        swapped = tl.join(odd, even).reshape(BD)
        y = y * tl.load(cos + at, mask=ok, other=0.0)
        y += swapped * tl.load(sin + at, mask=ok, other=0.0)
    tl.store(x + n, y.to(q.dtype.element_ty), mask=ok)
