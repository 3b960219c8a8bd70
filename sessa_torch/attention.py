"""The forward branch: causal softmax attention with grouped heads and rotary positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Rope = tuple[Tensor, Tensor]


def rope_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rope:
    """Cosines and signed sines (B, 1, T, d), in pairs, of the angles position * theta^(-2i/d).

    positions (B, T). Angles are float32 (float64 for float64) whatever the model's dtype: in
    bfloat16 positions above 256 would fall together.
    """
    work = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=work) / head_dim
    angles = positions[:, None, :, None].to(work) * theta**-exponents
    cos, sin = angles.cos(), angles.sin()
    return cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the interleaved pairs (0,1), (2,3), ... of x (B, H, T, d) by the angles of `rope`."""
    cos, sin = rope
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


def causal_attention(
    q: Tensor,  # (B, H, T, d)
    k: Tensor,  # (B, Hkv, P+T, d)
    v: Tensor,  # (B, Hkv, P+T, d)
    key_mask: Tensor | None = None,  # (B, P+T)
) -> Tensor:
    """Softmax attention over keys j <= P + t, scale d^-1/2, by the fused kernel; (B, H, T, d).

    A mask is built only for padding or for a chunk after a past. Every query sees itself, so a
    padded row gives no NaN; what it gives means nothing.
    """
    T, S = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if key_mask is None and (T in (S, 1)):
        causal = T == S and T > 1
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if key_mask is not None:
        own = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T)
        visible = visible & (key_mask[:, None, None, :] | own)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped)
