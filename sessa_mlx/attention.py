"""Causal softmax attention with grouped heads and rotary positions, alone or as Sessa's first half.

Letters: B batch, T time, P past, D width, H heads, G key/value heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np
from mlx import nn

from sessa_common.config import SessaConfig
from sessa_common.rope import RopeScaling
from sessa_mlx._device import on_gpu
from sessa_mlx._linear import Linear
from sessa_mlx.attention_blocks import attend
from sessa_mlx.cache import SessaLayerCache, _hide_rows


@dataclass(frozen=True)
class _Consecutive:
    """Rotary positions first, first + 1, ...; MLX has one kernel for these."""

    first: mx.array  # (1,) or (B,)
    periods: mx.array  # (d/2,) float32, theta^(2i/d)


# Tables of `rope_tables`, or positions that need none.
Rope = tuple[mx.array, mx.array] | _Consecutive


def rope_tables(
    positions: mx.array,
    head_dim: int,
    theta: float,
    dtype: mx.Dtype,
    scaling: RopeScaling | None = None,
) -> Rope:
    """Cosines and signed sines (B, 1, T, d), in pairs, of the angles position * theta^(-2i/d).

    positions (B, T). A scaling gives other frequencies, and an amplitude to both tables. Angles are
    computed in float32 (float64 for float64) whatever the model's dtype, because bfloat16 cannot
    tell positions above 256 apart.
    """
    work = mx.float64 if dtype == mx.float64 else mx.float32
    if scaling is None:
        exponents = mx.arange(0, head_dim, 2, dtype=work) / head_dim
        frequencies = theta**-exponents
    else:
        frequencies = mx.array(scaling.frequencies(head_dim, theta), dtype=work)
    angles = positions[:, None, :, None].astype(work) * frequencies
    cos, sin = mx.cos(angles), mx.sin(angles)
    if scaling is not None and scaling.amplitude != 1:
        cos, sin = scaling.amplitude * cos, scaling.amplitude * sin
    return mx.repeat(cos, 2, -1), mx.stack([-sin, sin], -1).flatten(-2)


def rope_of(
    config: SessaConfig,
    x: mx.array,  # (B, T, D)
    past: int,
    key_mask: mx.array | None = None,  # (B, P+T)
    document_starts: mx.array | None = None,  # (B, T)
) -> Rope | None:
    """The tables for rows x that follow `past` cached ones; None when the model has no RoPE.

    The position of a token is the number of visible tokens of its document before it, so padding
    does not count.
    """
    if not config.use_forward_rope:
        return None
    if document_starts is not None:
        positions = mx.arange(x.shape[1]) - document_starts
    elif key_mask is None:
        return _rope_from(config, mx.array([past]), x)
    else:
        positions = mx.maximum(mx.cumsum(key_mask.astype(mx.int32), -1) - 1, 0)[:, past:]
    d, theta = config.head_dim, config.rope_theta
    return rope_tables(positions, d, theta, x.dtype, config.rope_scaling)


def _rope_from(config: SessaConfig, first: mx.array, x: mx.array) -> Rope:
    """The positions first, first + 1, ... of T rows, x being (B, T, D).

    first (n,) has one position for each of the n sequences that are rotated, or n is 1.

    MLX's kernel is faster than tables on a GPU alone, and knows no amplitude.
    """
    d, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    amplified = scaling is not None and scaling.amplitude != 1
    if x.dtype == mx.float64 or amplified or not on_gpu():
        positions = first[:, None] + mx.arange(x.shape[1])
        return rope_tables(positions, d, theta, x.dtype, scaling)
    return _Consecutive(first, _periods(d, theta, scaling))


@cache
def _periods(head_dim: int, theta: float, scaling: RopeScaling | None) -> mx.array:
    """The periods (d/2,), rounded once; MLX's own powers in float32 are less exact."""
    if scaling is None:
        periods = theta ** (np.arange(0, head_dim, 2) / head_dim)
    else:
        periods = 1 / scaling.frequencies(head_dim, theta)
    return mx.array(periods, dtype=mx.float32)


def apply_rope(x: mx.array, rope: Rope) -> mx.array:
    """Rotate the interleaved pairs (0,1), (2,3), ... of x (B, H, T, d) by the angles of `rope`."""
    if isinstance(rope, _Consecutive):
        return mx.fast.rope(
            x,
            x.shape[-1],
            traditional=True,
            base=None,
            scale=1.0,
            offset=rope.first,
            freqs=rope.periods,
        )
    cos, sin = rope
    swapped = mx.unflatten(x, -1, (-1, 2))[..., ::-1].flatten(-2)
    return (x * cos + swapped * sin).astype(x.dtype)


def causal_attention(
    q: mx.array,  # (B, H, T, K)
    k: mx.array,  # (B, G, P+T, K)
    v: mx.array,  # (B, G, P+T, d)
    key_mask: mx.array | None = None,  # (B, P+T)
    document_starts: mx.array | None = None,  # (B, T)
) -> mx.array:
    """Softmax attention over keys j <= P + t, scale K^-1/2, in O(T) memory; (B, H, T, d).

    Queries and keys may have another width than values. Every query sees itself, so a padded row is
    never NaN; its result has no meaning. Hidden keys and values are read as zeros, because a weight
    of 0 would not hide NaN or infinity. With document_starts, which go with neither a past nor a
    mask, no key before the first row of the own document is read.
    """
    if key_mask is not None:
        k, v = (mx.where(key_mask[:, None, :, None], x, 0) for x in (k, v))
    return attend(q, k, v, key_mask, document_starts)


class AttentionMixer(nn.Module):
    """Causal attention of a with H heads.

    Inside Sessa's gated block, `out_proj` has no bias and exists only for several heads, as in the
    author's release. Inside the standard block it always exists; the configuration says whether it
    has a bias, and whether RMSNorms scale every query and key head before RoPE.
    """

    def __init__(self, config: SessaConfig, *, gated: bool = False) -> None:
        super().__init__()
        self.config = config
        D, d, bias = config.hidden_size, config.head_dim, config.qkv_bias
        inner, kv = config.num_attention_heads * d, config.num_key_value_heads * d
        self.q_proj = Linear(D, inner, bias=bias)
        self.k_proj = Linear(D, kv, bias=bias)
        self.v_proj = Linear(D, kv, bias=bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(d, eps=config.layer_norm_eps)
            self.k_norm = nn.RMSNorm(d, eps=config.layer_norm_eps)
        self.projects = config.num_attention_heads > 1 or not gated
        if self.projects:
            self.out_proj = nn.Linear(inner, D, bias=config.out_proj_bias and not gated)

    def __call__(
        self,
        a: mx.array,  # (B, T, D)
        *,
        rope: Rope | None = None,
        cache: SessaLayerCache | None = None,
        key_mask: mx.array | None = None,  # (B, P+T)
        document_starts: mx.array | None = None,  # (B, T)
    ) -> mx.array:
        """Mix a (B, T, D) over time; with a cache, a follows the cached positions.

        document_starts are, for each position, the first one of its document; they go with neither
        a cache nor a mask. `rope` are the tables of `rope_of`, from a caller that shares them
        between layers. Without them they are built here, from the cache, the mask or the documents.
        """
        B, T, _ = a.shape
        d = self.config.head_dim
        q, k, v = (
            project(a).reshape(B, T, -1, d).swapaxes(1, 2)  # (B, heads, T, d)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is None:
            past = 0 if cache is None else cache.kv.length
            rope = rope_of(self.config, a, past, key_mask, document_starts)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        if cache is not None:
            k, v = (_hide_rows(x, key_mask) for x in (k, v))
            k, v = cache._append_heads(k, v)
        f = causal_attention(q, k, v, key_mask, document_starts).swapaxes(1, 2).reshape(B, T, -1)
        return self.out_proj(f) if self.projects else f
