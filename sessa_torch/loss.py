"""Next-token loss from hidden states, in chunks, so that the logits of all positions never exist.

Letters: B batch, T time, N = B T, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sessa_torch.cuda.device import unavailable_reason

# Logits that exist at a time: 64 MiB in float32.
MOST_LOGITS = 2**24
# The same for the kernel, which needs no second copy of them: 128 MiB in bfloat16.
KERNEL_LOGITS = 2**26


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
    with_head = torch.is_grad_enabled() and head.requires_grad
    loss: Tensor = _differentiable(*flat, with_head)[0]
    return loss


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
    for chunk in _chunks(rows.shape[0], head.shape[0], MOST_LOGITS):
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
    ids = [
        (rows[chunk] @ head.T).argmax(-1)
        for chunk in _chunks(rows.shape[0], head.shape[0], MOST_LOGITS)
    ]
    return torch.cat(ids).unflatten(0, hidden.shape[:2])


def _loss_with_gradients(
    hidden: Tensor,  # (N, D)
    head: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    weights: Tensor,  # (N,)
    with_head: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and its gradients by hidden (N, D) and head (V, D), or (0, D) without it."""
    low, V = head.to(hidden.dtype), head.shape[0]
    loss = torch.zeros((), device=hidden.device)
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    dhead = torch.zeros_like(head if with_head else head[:0])
    has_kernel = unavailable_reason(hidden.device, hidden.dtype) is None
    for chunk in _chunks(hidden.shape[0], V, KERNEL_LOGITS if has_kernel else MOST_LOGITS):
        rows = hidden[chunk]
        differentiate = _by_kernel if has_kernel else _by_operations
        losses, dlogits = differentiate(rows @ low.T, targets[chunk], weights[chunk])
        loss += losses.sum()
        torch.mm(dlogits, low, out=dhidden[chunk])
        if with_head:
            dhead += dlogits.T @ rows
    return loss, dhidden, dhead


def _by_kernel(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The result of `_by_operations`, whose gradients take the place of the logits."""
    from sessa_torch.cuda.cross_entropy import losses_and_gradients

    return losses_and_gradients(logits, targets, weights), logits


def _by_operations(
    logits: Tensor,  # (n, V)
    targets: Tensor,  # (n,)
    weights: Tensor,  # (n,)
) -> tuple[Tensor, Tensor]:
    """Return the weighted losses (n, 1) and the gradients (n, V) of their sum."""
    own, weight = targets[:, None], weights[:, None]
    log_probs = F.log_softmax(logits.float(), -1)
    losses = -log_probs.gather(1, own) * weight
    return losses, (log_probs.exp() * weight).scatter_add(1, own, -weight).to(logits.dtype)


# An operator of its own, because a compiler that saw the chunks would add up the gradients of the
# head in one kernel and hold those of all chunks for it.
_differentiable = torch.library.custom_op(
    "sessa::loss_with_gradients", _loss_with_gradients, mutates_args=()
)


@_differentiable.register_fake
def _(hidden, head, targets, weights, with_head):
    dhead = torch.empty_like(head if with_head else head[:0])
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    return hidden.new_empty((), dtype=torch.float32), dhidden, dhead


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.with_head = inputs[-1]


def _scale_gradients(ctx: Any, scale: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    dhidden, dhead = ctx.saved_tensors
    scaled = dhead * scale if ctx.with_head else None
    return dhidden * scale.to(dhidden.dtype), scaled, None, None, None


_differentiable.register_autograd(_scale_gradients, setup_context=_save)


def _chunks(count: int, V: int, most: int) -> Iterator[slice]:
    size = max(1, most // V)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
