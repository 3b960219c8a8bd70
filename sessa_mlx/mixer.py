"""The Sessa mixer: causal attention inside a feedback loop.

Letters as in `attention`; f, s, q, k, gamma as in arXiv 2604.18580.
"""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from sessa_common.config import SessaConfig
from sessa_mlx._linear import Linear, adds_bias_apart
from sessa_mlx._step_cache import StepLayerCache, hide_rows
from sessa_mlx.attention import AttentionMixer, Rope
from sessa_mlx.cache import SessaLayerCache
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
        if isinstance(cache, StepLayerCache):
            return self._step(a, cache)
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
        keys = cache.k_fb.append(hide_rows(k, key_mask).astype(work)).astype(k.dtype)
        s = feedback_solve(f.astype(work), q, keys, gamma, past_s=past_s, key_mask=key_mask)
        cache.s.append(hide_rows(s, key_mask))
        return s.astype(f.dtype)

    def gain(self, a: mx.array) -> mx.array:
        """gamma (B, T) = gamma_max tanh(<a, w> + b), in float32 at least."""
        return self._gain(a).squeeze(-1)

    def _gain(self, a: mx.array) -> mx.array:
        """gamma (B, T, 1)."""
        work = mx.float64 if a.dtype == mx.float64 else mx.float32
        logits = (a * self.gamma_ctx.weight.squeeze(0).astype(work)).sum(-1, keepdims=True)
        return self.config.gamma_max * mx.tanh(logits + self.gamma_bias.astype(work))

    def _step(self, a: mx.array, cache: StepLayerCache) -> mx.array:
        """s = f + gamma softmax(q k / sqrt(K)) s of one token (B, 1, D), in the compiled step."""
        projected = cache.project(a)
        f = self._attend(projected, cache)
        states = cache.write_newest_state()
        work = states.dtype
        K = self.config.feedback_key_dim
        q, k = mx.split(projected[..., -2 * K :].astype(work), 2, -1)
        keys = cache.write("k_fb", k, cache.position.index, axis=1)
        past, scale = cache.position.past.astype(work), q.shape[-1] ** -0.5
        keys = keys.swapaxes(1, 2)
        if adds_bias_apart():
            scores = (q * scale) @ keys + past
        else:
            # Scales the products and hides rows without a further pass over them.
            scores = mx.addmm(past, q, keys, alpha=scale)
        mean = mx.softmax(scores, -1) @ states
        cache.newest = f.astype(work) + self._gain(a) * mean
        return cache.newest.astype(f.dtype)
