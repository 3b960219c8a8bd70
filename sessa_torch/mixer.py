"""The Sessa mixer: causal attention inside a feedback loop.

Letters as in `attention`; f, s, q, k, gamma as in arXiv 2604.18580.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sessa_common.config import SessaConfig
from sessa_torch.attention import AttentionMixer, Rope
from sessa_torch.cache import SessaLayerCache
from sessa_torch.feedback import feedback_solve


class _GainRow(nn.Linear):
    """<a, w> in float32 at least; a module that is called, so that adapters and offloading apply.

    Adapters wrap a module's call, and offloading loads its weights for a call.
    """

    def forward(self, a: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, 1)."""
        work = torch.promote_types(a.dtype, torch.float32)
        return (a * self.weight[0].to(work)).sum(-1, keepdim=True)


class SessaMixer(AttentionMixer):
    """s = (I - diag(gamma) alpha)^-1 f, with f the causal attention of a (section 3 of the paper).

    Forward attention has H heads and RoPE; feedback attention is one head of width K without
    positions, over the strict past; K is D unless `feedback_key_dim` says otherwise. f is the
    output of `out_proj` where there is one.
    """

    def __init__(self, config: SessaConfig, *, gated: bool = True) -> None:
        super().__init__(config, gated=gated)
        D = config.hidden_size
        self.proj_fb = nn.Linear(D, 2 * config.feedback_key_dim)
        self.gamma_ctx = _GainRow(D, 1, bias=False)
        self.gamma_bias = nn.Parameter(torch.ones(()))
        # `sessa_torch.distributed` replaces it where processes share the tokens of a row.
        self.solve: Callable[..., Tensor] = feedback_solve

    def forward(
        self,
        a: Tensor,  # (B, T, D)
        *,
        rope: Rope | None = None,
        cache: SessaLayerCache | None = None,
        key_mask: Tensor | None = None,  # (B, P+T)
        document_starts: Tensor | None = None,  # (B, T)
    ) -> Tensor:
        """Mix a (B, T, D) over time; arguments as in `AttentionMixer`."""
        f = super().forward(
            a, rope=rope, cache=cache, key_mask=key_mask, document_starts=document_starts
        )
        q, k = self.proj_fb(a).chunk(2, -1)
        gamma = self.gain(a)
        if cache is None:
            documents = {} if document_starts is None else {"document_starts": document_starts}
            return self.solve(f, q, k, gamma, key_mask=key_mask, **documents)
        past_s = cache.s.rows
        # SessaLayerCache says why cached states stay in float32.
        wide = f.to(torch.promote_types(f.dtype, torch.float32))
        s = feedback_solve(wide, q, cache.k_fb.append(k), gamma, past_s=past_s, key_mask=key_mask)
        cache.s.append(s)
        return s.to(f.dtype)

    def gain(self, a: Tensor) -> Tensor:
        """gamma (B, T) = gamma_max tanh(<a, w> + b), in float32 at least and under any autocast."""
        logits = self.gamma_ctx(a)[..., 0]
        return self.config.gamma_max * torch.tanh(logits + self.gamma_bias.to(logits.dtype))
