"""The Sessa mixer: causal attention inside a feedback loop.

Letters: B batch, T time, P past, D width, H heads, Hkv key/value heads, d head width; f, s, q, k,
gamma as in arXiv 2604.18580.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sessa_common.config import SessaConfig
from sessa_torch.attention import Rope, apply_rope, causal_attention
from sessa_torch.cache import LayerCache
from sessa_torch.feedback import feedback_solve


class SessaMixer(nn.Module):
    """s = (I - diag(gamma) alpha)^-1 f, with f the causal attention of a (section 3 of the paper).

    Forward attention has H heads and RoPE; feedback attention is one head of width D without
    positions, over the strict past. With `feedback` off, s = f.
    """

    def __init__(self, config: SessaConfig) -> None:
        super().__init__()
        self.config = config
        D, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, kv)
        self.v_proj = nn.Linear(D, kv)
        if config.num_attention_heads > 1:
            self.out_proj = nn.Linear(D, D, bias=False)
        if config.feedback:
            self.proj_fb = nn.Linear(D, 2 * D)
            self.gamma_ctx = nn.Linear(D, 1, bias=False)
            self.gamma_bias = nn.Parameter(torch.ones(()))

    def forward(
        self,
        a: Tensor,  # (B, T, D)
        *,
        rope: Rope | None = None,
        cache: LayerCache | None = None,
        key_mask: Tensor | None = None,  # (B, P+T)
    ) -> Tensor:
        """Mix a (B, T, D) over time; with a cache, a continues what the cache holds."""
        f = self._attend(a, rope, cache, key_mask)
        if not self.config.feedback:
            return f
        q, k = self.proj_fb(a).chunk(2, -1)
        gamma = self.gain(a)
        if cache is None:
            return feedback_solve(f, q, k, gamma, key_mask=key_mask)
        past_s = cache.s.rows
        # Cached states stay in float32: see LayerCache.
        wide = f.to(torch.promote_types(f.dtype, torch.float32))
        s = feedback_solve(wide, q, cache.k_fb.append(k), gamma, past_s=past_s, key_mask=key_mask)
        cache.s.append(s)
        return s.to(f.dtype)

    def gain(self, a: Tensor) -> Tensor:
        """gamma (B, T) = gamma_max tanh(<a, w> + b), in float32 at least and under any autocast."""
        work = torch.promote_types(a.dtype, torch.float32)
        logits = (a * self.gamma_ctx.weight[0].to(work)).sum(-1)
        return self.config.gamma_max * torch.tanh(logits + self.gamma_bias.to(work))

    def _attend(
        self, a: Tensor, rope: Rope | None, cache: LayerCache | None, key_mask: Tensor | None
    ) -> Tensor:
        B, T, D = a.shape
        d = self.config.head_dim
        q, k, v = (
            project(a).view(B, T, -1, d).transpose(1, 2)  # (B, heads, T, d)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        if cache is not None:
            k, v = cache.k.append(k), cache.v.append(v)
        f = causal_attention(q, k, v, key_mask).transpose(1, 2).reshape(B, T, D)
        return self.out_proj(f) if self.config.num_attention_heads > 1 else f
