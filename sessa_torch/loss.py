"""Next-token loss from hidden states, in chunks, so that the logits of all positions never exist.

Letters: B batch, T time, N = B T, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits that exist at a time: 64 MiB in float32.
MOST_LOGITS = 2**24


def weighted_loss(
    hidden: Tensor,  # (B, T, D)
    head: Tensor,  # (V, D)
    targets: Tensor,  # (B, T)
    weights: Tensor,  # (B, T)
) -> Tensor:
    """Return the weighted sum of the losses of all positions, in nats, float32.

    Logits have the dtype of hidden, sums are float32. The gradients of hidden and head are computed
    together with the loss, so that no logits are computed twice.
    """
    flat = hidden.flatten(0, 1), head, targets.flatten().long(), weights.flatten()
    return _LossWithGradients.apply(*flat)


def loss_and_likeliest(
    hidden: Tensor,  # (B, T, D)
    head: Tensor,  # (V, D)
    targets: Tensor,  # (B, T)
    weights: Tensor,  # (B, T)
) -> tuple[Tensor, Tensor]:
    """Return `weighted_loss`, without its gradient, and `likeliest` of the same logits."""
    rows, targets, weights = hidden.flatten(0, 1), targets.flatten().long(), weights.flatten()
    head = head.to(hidden.dtype)
    loss, ids = torch.zeros((), device=hidden.device), list[Tensor]()
    for chunk in _chunks(rows.shape[0], head.shape[0]):
        logits = rows[chunk] @ head.T
        losses = F.cross_entropy(logits.float(), targets[chunk], reduction="none")
        loss = loss + (losses * weights[chunk]).sum()
        ids.append(logits.argmax(-1))
    return loss, torch.cat(ids).unflatten(0, hidden.shape[:2])


def likeliest(
    hidden: Tensor,  # (B, T, D)
    head: Tensor,  # (V, D)
) -> Tensor:
    """Return the ids (B, T) of the largest logits."""
    rows, head = hidden.flatten(0, 1), head.to(hidden.dtype)
    ids = [(rows[chunk] @ head.T).argmax(-1) for chunk in _chunks(rows.shape[0], head.shape[0])]
    return torch.cat(ids).unflatten(0, hidden.shape[:2])


class _LossWithGradients(torch.autograd.Function):
    """The loss of hidden (N, D), head (V, D), targets (N,), weights (N,); its gradients beside."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        low, V = head.to(hidden.dtype), head.shape[0]
        loss = torch.zeros((), device=hidden.device)
        dhidden: list[Tensor] = []
        dhead = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        for chunk in _chunks(hidden.shape[0], V):
            rows, own, weight = hidden[chunk], targets[chunk, None], weights[chunk, None]
            log_probs = F.log_softmax((rows @ low.T).float(), -1)
            loss = loss - (log_probs.gather(1, own) * weight).sum()
            dlogits = (log_probs.exp() * weight).scatter_add(1, own, -weight).to(hidden.dtype)
            dhidden.append(dlogits @ low)
            if dhead is not None:
                dhead += dlogits.T @ rows
        ctx.save_for_backward(torch.cat(dhidden), dhead)
        return loss

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Tensor | None, ...]:
        dhidden, dhead = ctx.saved_tensors
        (scale,) = cotangents
        scaled = None if dhead is None else dhead * scale
        return dhidden * scale.to(dhidden.dtype), scaled, None, None


def _chunks(count: int, V: int) -> Iterator[slice]:
    size = max(1, MOST_LOGITS // V)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
