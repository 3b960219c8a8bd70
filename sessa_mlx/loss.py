"""Next-token loss from hidden states, in chunks, so that the logits of all positions never exist.

Letters: B batch, T time, N = B T, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from sessa_mlx._exp import exp

# Logits that exist at a time: 64 MiB in float32.
MOST_LOGITS = 2**24


def weighted_loss(
    hidden: mx.array,  # (B, T, D)
    head: mx.array,  # (V, D)
    targets: mx.array,  # (B, T)
    weights: mx.array,  # (B, T)
) -> mx.array:
    """Return the weighted sum of the losses of all positions, in nats, float32.

    Logits have the dtype of hidden, sums are float32. The gradients of hidden and head are computed
    together with the loss, so that no logits are computed twice.
    """
    flat = hidden.reshape(-1, hidden.shape[-1]), head, targets.reshape(-1), weights.reshape(-1)
    loss: mx.array = _differentiable(*flat)[0]
    return loss


def loss_and_likeliest(
    hidden: mx.array,  # (B, T, D)
    head: mx.array,  # (V, D)
    targets: mx.array,  # (B, T)
    weights: mx.array,  # (B, T)
) -> tuple[mx.array, mx.array]:
    """Return `weighted_loss`, without its gradient, and `likeliest` of the same logits."""
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    weights, head = weights.reshape(-1), head.astype(hidden.dtype)
    loss, ids = mx.array(0.0), list[mx.array]()
    for chunk in _chunks(rows.shape[0], head.shape[0]):
        logits = mx.depends(rows[chunk], [loss, *ids[-1:]]) @ head.T
        losses, _, _ = _losses(logits, targets[chunk])
        loss = loss + (losses * weights[chunk]).sum()
        ids.append(logits.argmax(-1))
    return loss, mx.concatenate(ids).reshape(hidden.shape[:2])


def likeliest(
    hidden: mx.array,  # (B, T, D)
    head: mx.array,  # (V, D)
) -> mx.array:
    """Return the ids (B, T) of the largest logits."""
    rows, head = hidden.reshape(-1, hidden.shape[-1]), head.astype(hidden.dtype)
    ids = list[mx.array]()
    for chunk in _chunks(rows.shape[0], head.shape[0]):
        ids.append((mx.depends(rows[chunk], ids[-1:]) @ head.T).argmax(-1))
    return mx.concatenate(ids).reshape(hidden.shape[:2])


def _loss_with_gradients(
    hidden: mx.array,  # (N, D)
    head: mx.array,  # (V, D)
    targets: mx.array,  # (N,)
    weights: mx.array,  # (N,)
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the loss and its gradients by hidden (N, D) and head (V, D), float32."""
    low, V = head.astype(hidden.dtype), head.shape[0]
    loss, dhead, dhidden = mx.array(0.0), mx.zeros(head.shape), list[mx.array]()
    for chunk in _chunks(hidden.shape[0], V):
        rows = mx.depends(hidden[chunk], [loss, dhead, *dhidden[-1:]])
        losses, powers, total = _losses(rows @ low.T, targets[chunk])
        weight = weights[chunk, None]
        loss = loss + (losses * weights[chunk]).sum()
        dlogits = powers * (weight / total)
        own = mx.arange(V) == targets[chunk, None]
        dlogits = mx.where(own, dlogits - weight, dlogits).astype(hidden.dtype)
        dhidden.append(dlogits @ low)
        dhead = dhead + dlogits.T @ rows
    return loss, mx.concatenate(dhidden), dhead


def _scaled_gradients(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    hidden, head, targets, weights = primals
    dhidden, dhead = (cotangents[0] * gradient for gradient in outputs[1:])
    nothing = mx.zeros_like(targets), mx.zeros_like(weights)
    return dhidden.astype(hidden.dtype), dhead.astype(head.dtype), *nothing


_differentiable: Any = mx.custom_function(_loss_with_gradients)
_differentiable.vjp(_scaled_gradients)


def _losses(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Losses (n,) of logits (n, V), and exp(logit - largest logit) (n, V) with its sums (n, 1)."""
    logits = logits.astype(mx.float32)
    top = logits.max(-1, keepdims=True)
    powers = exp(logits - top)
    total = powers.sum(-1, keepdims=True)
    chosen = mx.take_along_axis(logits, targets[:, None], -1)
    return (mx.log(total) + top - chosen).squeeze(-1), powers, total


def _chunks(count: int, V: int) -> Iterator[slice]:
    size = max(1, MOST_LOGITS // V)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
