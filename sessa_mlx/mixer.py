"""The Sessa mixer: causal attention inside a feedback loop.

Letters as in `attention`; f, s, q, k, gamma as in arXiv 2604.18580.
"""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from sessa_common.config import SessaConfig
from sessa_mlx.attention import AttentionMixer, Rope
from sessa_mlx.cache import SessaLayerCache
from sessa_mlx.feedback import feedback_solve


class SessaMixer(AttentionMixer):
    """s = (I - diag(gamma) alpha)^-1 f, with f the causal attention of a (section 3 of the paper).

    Forward attention has H heads and RoPE; feedback attention is one head of width D without
    positions, over the strict past. f is the output of `out_proj` where there is one.
    """

    def __init__(self, config: SessaConfig, *, gated: bool = True) -> None:
        super().__init__(config, gated=gated)
        D = config.hidden_size
        self.proj_fb = nn.Linear(D, 2 * D)
        self.gamma_ctx = nn.Linear(D, 1, bias=False)
        self.gamma_bias = mx.ones(())

    def __call__(
        self,
        a: mx.array,  # (B, T, D)
        *,
        rope: Rope | None = None,
        cache: SessaLayerCache | None = None,
        key_mask: mx.array | None = None,  # (B, P+T)
    ) -> mx.array:
        """Mix a (B, T, D) over time; arguments as in `AttentionMixer`."""
        f = super().__call__(a, rope=rope, cache=cache, key_mask=key_mask)
        q, k = mx.split(self.proj_fb(a), 2, -1)
        gamma = self.gain(a)
        if cache is None:
            return feedback_solve(f, q, k, gamma, key_mask=key_mask)
        past_s = cache.s.rows
        # SessaLayerCache says why cached states stay in float32.
        wide = f if f.dtype == mx.float64 else f.astype(mx.float32)
        s = feedback_solve(wide, q, cache.k_fb.append(k), gamma, past_s=past_s, key_mask=key_mask)
        cache.s.append(s)
        return s.astype(f.dtype)

    def gain(self, a: mx.array) -> mx.array:
        """gamma (B, T) = gamma_max tanh(<a, w> + b), in float32 at least."""
        work = mx.float64 if a.dtype == mx.float64 else mx.float32
        logits = (a * self.gamma_ctx.weight[0].astype(work)).sum(-1)
        return self.config.gamma_max * mx.tanh(logits + self.gamma_bias.astype(work))
