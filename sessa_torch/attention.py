"""Causal softmax attention with grouped heads and rotary positions, alone or as Sessa's first half.

Letters: B batch, T time, P past, D width, H heads, G key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from sessa_common.config import SessaConfig
from sessa_common.rope import RopeScaling
from sessa_torch._documents import document_attention
from sessa_torch.cache import SessaLayerCache
from sessa_torch.cuda.device import MOST_SEQUENCES, unavailable_reason

Rope = tuple[Tensor, Tensor]


def rope_tables(
    positions: Tensor,
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    scaling: RopeScaling | None = None,
) -> Rope:
    """Cosines and signed sines (B, 1, T, d), in pairs, of the angles position * theta^(-2i/d).

    positions (B, T). A scaling gives other frequencies, and an amplitude to both tables. Angles are
    computed in float32 (float64 for float64) whatever the model's dtype, because bfloat16 cannot
    tell positions above 256 apart.
    """
    work = torch.promote_types(dtype, torch.float32)
    if scaling is None:
        exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=work) / head_dim
        frequencies = theta**-exponents
    else:
        exact = scaling.frequencies(head_dim, theta).tolist()
        frequencies = torch.tensor(exact, device=positions.device, dtype=work)
    angles = positions[:, None, :, None].to(work) * frequencies
    cos, sin = angles.cos(), angles.sin()
    if scaling is not None and scaling.amplitude != 1:
        cos, sin = scaling.amplitude * cos, scaling.amplitude * sin
    return cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)


def rope_of(
    config: SessaConfig,
    x: Tensor,  # (B, T, D)
    past: int,
    key_mask: Tensor | None = None,  # (B, P+T)
    document_starts: Tensor | None = None,  # (B, T)
) -> Rope | None:
    """The tables for rows x that follow `past` cached ones; None when the model has no RoPE.

    The position of a token is the number of visible tokens of its document before it, so padding
    does not count.
    """
    if not config.use_forward_rope:
        return None
    if document_starts is not None:
        positions = torch.arange(x.shape[1], device=x.device) - document_starts
    elif key_mask is None:
        positions = torch.arange(past, past + x.shape[1], device=x.device)[None]
    else:
        positions = (key_mask.long().cumsum(-1) - 1).clamp_min(0)[:, past:]
    d, theta = config.head_dim, config.rope_theta
    return rope_tables(positions, d, theta, x.dtype, config.rope_scaling)


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the interleaved pairs (0,1), (2,3), ... of x (B, H, T, d) by the angles of `rope`.

    On CUDA by one kernel, but not in a compiled graph, which fuses what is written here.
    """
    cos, sin = rope
    if x.is_cuda and not torch.compiler.is_compiling() and _has_kernel(x, cos):
        from sessa_torch.cuda.rope import Rotation

        return Rotation.apply(x, cos, sin)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


def _has_kernel(x: Tensor, cos: Tensor) -> bool:
    few = x.shape[0] * x.shape[1] <= MOST_SEQUENCES
    return few and cos.dtype == torch.float32 and unavailable_reason(x.device, x.dtype) is None


def causal_attention(
    q: Tensor,  # (B, H, T, d)
    k: Tensor,  # (B, G, P+T, d)
    v: Tensor,  # (B, G, P+T, d)
    key_mask: Tensor | None = None,  # (B, P+T)
    document_starts: Tensor | None = None,  # (B, T)
) -> Tensor:
    """Softmax attention over keys j <= P + t, scale d^-1/2, by the fused kernel; (B, H, T, d).

    With document_starts, which go with neither a past nor a mask, no key before the first row of
    the own document is read. A mask is built only for padding, and elsewhere than on CUDA for a
    chunk after a past. Every query sees itself, so a padded row is never NaN; its result has no
    meaning. Hidden keys and values are read as zeros, because a weight of 0 would not hide NaN or
    infinity.
    """
    if document_starts is not None:
        return document_attention(q, k, v, document_starts)
    T, S = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if key_mask is None and q.is_cuda and 1 < T < S:
        lower_right = causal_lower_right(T, S)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=lower_right, enable_gqa=grouped)
    if key_mask is None and (T in (S, 1)):
        causal = T == S and T > 1
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if key_mask is not None:
        own = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T)
        visible = visible & (key_mask[:, None, None, :] | own)
        hidden = ~key_mask[:, None, :, None]
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped)


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
        self.q_proj = nn.Linear(D, inner, bias=bias)
        self.k_proj = nn.Linear(D, kv, bias=bias)
        self.v_proj = nn.Linear(D, kv, bias=bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(d, eps=config.layer_norm_eps)
            self.k_norm = nn.RMSNorm(d, eps=config.layer_norm_eps)
        # `sessa_torch.distributed` replaces it where processes share the tokens of a row.
        self.attend: Callable[..., Tensor] = causal_attention
        self.projects = config.num_attention_heads > 1 or not gated
        if self.projects:
            self.out_proj = nn.Linear(inner, D, bias=config.out_proj_bias and not gated)

    def forward(
        self,
        a: Tensor,  # (B, T, D)
        *,
        rope: Rope | None = None,
        cache: SessaLayerCache | None = None,
        key_mask: Tensor | None = None,  # (B, P+T)
        document_starts: Tensor | None = None,  # (B, T)
    ) -> Tensor:
        """Mix a (B, T, D) over time; with a cache, a follows the cached positions.

        document_starts are, for each position, the first one of its document; they go with neither
        a cache nor a mask. `rope` are the tables of `rope_of`, from a caller that shares them
        between layers. Without them they are built here, from the cache, the mask or the documents.
        """
        B, T, _ = a.shape
        d = self.config.head_dim
        q, k, v = (
            project(a).view(B, T, -1, d).transpose(1, 2)  # (B, heads, T, d)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is None:
            past = 0 if cache is None else cache.k.length
            rope = rope_of(self.config, a, past, key_mask, document_starts)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        if cache is not None:
            k, v = cache.k.append(k), cache.v.append(v)
        documents = {} if document_starts is None else {"document_starts": document_starts}
        f = self.attend(q, k, v, key_mask, **documents).transpose(1, 2).reshape(B, T, -1)
        return self.out_proj(f) if self.projects else f
