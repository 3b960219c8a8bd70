"""The Sessa mixer: causal attention inside a feedback loop.

Letters as in `attention`; f, s, q, k, gamma as in arXiv 2604.18580.
"""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from sessa_common.config import SessaConfig
from sessa_mlx._linear import Linear
from sessa_mlx.attention import AttentionMixer, Rope
from sessa_mlx.cache import SessaLayerCache, _hide_rows
from sessa_mlx.feedback import feedback_solve


class _ContextGain(nn.Module):
    """w (1, D) of the gain; no `nn.Linear`, so that it is neither quantised nor given a LoRA."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = mx.random.uniform(-(width**-0.5), width**-0.5, (1, width))


class SessaMixer(AttentionMixer):
    """s = (I - diag(gamma) alpha)^-1 f, with f the causal attention of a (section 3 of the paper).

    Forward attention has H heads and RoPE; feedback attention is one head of width K without
    positions, over the strict past; K is D unless `feedback_key_dim` says otherwise. f is the
    output of `out_proj` where there is one.
    """

    def __init__(self, config: SessaConfig, *, gated: bool = True) -> None:
        super().__init__(config, gated=gated)
        D = config.hidden_size
        self.proj_fb = Linear(D, 2 * config.feedback_key_dim)
        self.gamma_ctx = _ContextGain(D)
        self.gamma_bias = mx.ones(())

    def __call__(
        self,
        a: mx.array,  # (B, T, D)
        *,
        rope: Rope | None = None,
        cache: SessaLayerCache | None = None,
        key_mask: mx.array | None = None,  # (B, P+T)
        document_starts: mx.array | None = None,  # (B, T)
    ) -> mx.array:
        """Mix a (B, T, D) over time; arguments as in `AttentionMixer`."""
        f = super().__call__(
            a, rope=rope, cache=cache, key_mask=key_mask, document_starts=document_starts
        )
        q, k = mx.split(self.proj_fb(a), 2, -1)
        gamma = self.gain(a)
        if cache is None:
            return feedback_solve(
                f, q, k, gamma, key_mask=key_mask, document_starts=document_starts
            )
        past_s = cache.s.rows
        # SessaLayerCache says why cached states and keys are in float32.
        work = mx.float64 if f.dtype == mx.float64 else mx.float32
        keys = cache.k_fb.append(_hide_rows(k, key_mask).astype(work)).astype(k.dtype)
        s = feedback_solve(f.astype(work), q, keys, gamma, past_s=past_s, key_mask=key_mask)
        cache.s.append(_hide_rows(s, key_mask))
        return s.astype(f.dtype)

    def gain(self, a: mx.array) -> mx.array:
        """gamma (B, T) = gamma_max tanh(<a, w> + b), in float32 at least."""
        work = mx.float64 if a.dtype == mx.float64 else mx.float32
        logits = (a * self.gamma_ctx.weight.squeeze(0).astype(work)).sum(-1)
        return self.config.gamma_max * mx.tanh(logits + self.gamma_bias.astype(work))
