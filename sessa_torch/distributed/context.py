"""Context parallelism: attention and the feedback solve of rows whose tokens processes share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError
from sessa_torch.attention import AttentionMixer, Rope, rope_tables
from sessa_torch.distributed.attention import shared_attention
from sessa_torch.distributed.deal import Deal
from sessa_torch.distributed.documents import Documents
from sessa_torch.distributed.sweep import (
    Exchange,
    Gradients,
    RunningSums,
    product,
    sweep_backward,
    sweep_forward,
    work_type,
)
from sessa_torch.mixer import SessaMixer
from sessa_torch.model import SessaForCausalLM


class ContextParallel:
    """The processes, `size` neighbouring ranks, that share the tokens of the same rows.

    A model that it is installed in takes and gives the own tokens of a row, in the order of
    `Deal.places`.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.group: dist.ProcessGroup = dist.new_subgroups(size)[0]
        self.exchange = Exchange(Deal.of(size, 0, size), self.group)

    def install(self, model: SessaForCausalLM) -> None:
        """Let the model mix tokens over all processes. Raises SessaError for Mamba-2 layers."""
        if any(kind.mixer == "mamba2" for kind in model.config.kinds):
            raise SessaError(
                "`context_parallel` is above 1, but layers of the kind mamba2 pass their state "
                "from token to token in one process; give 1"
            )
        model.model.rope_of = self.rope_of
        for module in model.modules():
            if isinstance(module, AttentionMixer):
                module.attend = self.attention
            if isinstance(module, SessaMixer):
                module.solve = self.feedback_solve

    def own(self, tokens: Tensor, document_starts: Tensor | None = None) -> Tensor:
        """Return the own tokens (B, T) of whole rows, which the model is to mix next.

        Documents that begin at `document_starts`, of whole rows too, do not read each other. Raises
        SessaError for rows with fewer tokens than processes.
        """
        length = tokens.shape[1]
        if length < self.size:
            raise SessaError(
                f"`context_parallel` is {self.size}, but a row has only {length} tokens; "
                f"give {length} at most"
            )
        deal = Deal.of(length, dist.get_rank(self.group), self.size)
        self.exchange = Exchange(deal, self.group, Documents(deal, document_starts))
        return tokens[:, deal.places]

    def whole(self, tokens: Tensor) -> Tensor:
        """Return whole rows, from own tokens (B, T) that may not be negative."""
        deal = self.exchange.deal
        rows = tokens.new_zeros(tokens.shape[0], deal.length)
        rows[:, deal.places] = tokens
        return self.total(rows)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes."""
        dist.all_reduce(values, group=self.group)
        return values

    def rope_of(
        self,
        config: SessaConfig,
        x: Tensor,
        past: int,
        key_mask: Tensor | None = None,
        document_starts: Tensor | None = None,  # (B, T)
    ) -> Rope | None:
        """Return `sessa_torch.attention.rope_of` of the own tokens."""
        if not config.use_forward_rope:
            return None
        places = self.exchange.deal.places.to(x.device)[None]
        if document_starts is not None:
            places = places - document_starts
        d, theta = config.head_dim, config.rope_theta
        return rope_tables(places, d, theta, x.dtype, config.rope_scaling)

    def attention(
        self,
        q: Tensor,  # (B, H, T, d)
        k: Tensor,  # (B, G, T, d)
        v: Tensor,  # (B, G, T, d)
        key_mask: Tensor | None = None,
        document_starts: Tensor | None = None,  # (B, T)
    ) -> Tensor:
        """Return `causal_attention` of the own T rows over the rows of all, (B, H, T, d).

        The documents are those that `own` was told.
        """
        return shared_attention(q, k, v, self.exchange)

    def feedback_solve(
        self,
        f: Tensor,  # (B, T, D)
        q: Tensor,  # (B, T, K)
        k: Tensor,  # (B, T, K)
        gamma: Tensor,  # (B, T)
        *,
        key_mask: Tensor | None = None,
        document_starts: Tensor | None = None,  # (B, T)
    ) -> Tensor:
        """Return the states s (B, T, D) of the own T rows of `feedback_solve` over all rows.

        The documents are those that `own` was told.
        """
        return _Solve.apply(f, q, k, gamma, self.exchange)


class _Solve(torch.autograd.Function):
    """The solve as in `sessa_torch.feedback.blocked`, with one head: sums are (B, 1, T, D).

    The means c = alpha s are saved for the backward pass, whose r = <u, c> would otherwise have to
    be summed over all processes before a gradient of a score is known.
    """

    @staticmethod
    def forward(
        ctx: Any, f: Tensor, q: Tensor, k: Tensor, gamma: Tensor, exchange: Exchange
    ) -> Tensor:
        s = torch.empty_like(f, memory_format=torch.contiguous_format)
        work = work_type(f)
        gain = gamma.to(work)[..., None]
        with torch.autocast(f.device.type, enabled=False):
            sums = RunningSums(q[:, None], f.shape[-1])

            def prepare(i: int) -> None:
                rows = exchange.deal.rows(i)
                hidden = exchange.hidden_inside(i, f.device)
                weights = sums.weigh(rows, k[:, rows], hidden)[:, 0]
                # The first row of a document reads nothing.
                total = sums.total[:, 0, rows]
                total.masked_fill_(total == 0, 1)
                rhs = f[:, rows].to(work) + gain[:, rows] * (sums.sum[:, 0, rows] / total)
                s[:, rows] = _solve_block(weights * (gain[:, rows] / total), rhs)
                sums.sum[:, 0, rows] += product(weights, s[:, rows])

            sweep_forward(exchange, sums, k, s, prepare)
            means = (sums.sum[:, 0] / sums.total[:, 0]).to(f.dtype)
        ctx.save_for_backward(q, k, gamma, s, means, sums.top, sums.total)
        ctx.exchange = exchange
        return s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Any) -> tuple[Tensor | None, ...]:
        (ds,) = cotangents
        q, k, gamma, s, means, top, total = ctx.saved_tensors
        deal, work = ctx.exchange.deal, work_type(s)
        with torch.autocast(s.device.type, enabled=False):
            u, gain = ds.to(work, copy=True), gamma.to(work)[..., None]
            dout, r = torch.empty_like(s), torch.empty_like(gain)
            delta = torch.empty_like(r)
            gradients = Gradients(q[:, None], k, s, dout[:, None], top, total, delta[:, None], u)

            def prepare(i: int) -> None:
                rows = deal.rows(i)
                hidden = ctx.exchange.hidden_inside(i, s.device)
                weights = gradients.weights(q[:, None, rows], rows, top[:, :, rows], hidden)
                weights = weights[:, 0] / total[:, 0, rows]
                u[:, rows] = _solve_block(weights * gain[:, rows], u[:, rows], transposed=True)
                r[:, rows] = (u[:, rows] * means[:, rows].to(work)).sum(-1, keepdim=True)
                dout[:, rows] = (gain[:, rows] * u[:, rows]).to(s.dtype)
                delta[:, rows] = gain[:, rows] * r[:, rows]

            sweep_backward(ctx.exchange, gradients, prepare)
        dq, dk = gradients.dq[:, 0], gradients.dk.to(k.dtype)
        return u.to(s.dtype), dq, dk, r[..., 0].to(gamma.dtype), None


def _solve_block(N: Tensor, rhs: Tensor, *, transposed: bool = False) -> Tensor:
    """(I - N)^-1 rhs, or (I - N)^-T rhs, for strictly lower triangular N (B, m, m)."""
    # One call; products of inverses would be eighty, and the other processes wait for this block.
    A = -N.mT if transposed else -N
    return torch.linalg.solve_triangular(A, rhs, upper=transposed, unitriangular=True)
