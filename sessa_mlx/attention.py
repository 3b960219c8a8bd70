"""The forward branch: causal softmax attention with grouped heads and rotary positions."""

from __future__ import annotations

import mlx.core as mx

Rope = tuple[mx.array, mx.array]


def rope_tables(positions: mx.array, head_dim: int, theta: float, dtype: mx.Dtype) -> Rope:
    """Cosines and signed sines (B, 1, T, d), in pairs, of the angles position * theta^(-2i/d).

    positions (B, T). Angles are float32 (float64 for float64) whatever the model's dtype: in
    bfloat16 positions above 256 would fall together.
    """
    work = mx.float64 if dtype == mx.float64 else mx.float32
    exponents = mx.arange(0, head_dim, 2, dtype=work) / head_dim
    angles = positions[:, None, :, None].astype(work) * theta**-exponents
    cos, sin = mx.cos(angles), mx.sin(angles)
    return mx.repeat(cos, 2, -1), mx.stack([-sin, sin], -1).flatten(-2)


def apply_rope(x: mx.array, rope: Rope) -> mx.array:
    """Rotate the interleaved pairs (0,1), (2,3), ... of x (B, H, T, d) by the angles of `rope`."""
    cos, sin = rope
    swapped = mx.unflatten(x, -1, (-1, 2))[..., ::-1].flatten(-2)
    return (x * cos + swapped * sin).astype(x.dtype)


def causal_attention(
    q: mx.array,  # (B, H, T, d)
    k: mx.array,  # (B, Hkv, P+T, d)
    v: mx.array,  # (B, Hkv, P+T, d)
    key_mask: mx.array | None = None,  # (B, P+T)
) -> mx.array:
    """Softmax attention over keys j <= P + t, scale d^-1/2, by the fused kernel; (B, H, T, d).

    A mask is built only for padding. Every query sees itself, so a padded row gives no NaN; what it
    gives means nothing.
    """
    T, S, scale = q.shape[2], k.shape[2], q.shape[-1] ** -0.5
    if key_mask is None:
        mask = "causal" if T > 1 else None
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    row, column = mx.arange(S - T, S)[:, None], mx.arange(S)
    visible = (column <= row) & (key_mask[:, None, None, :] | (column == row))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=visible)
