"""The solve of documents by a backend that solves whole rows: one document after the other.

Documents that do not read each other are systems of their own, so this also saves the scores
between them. The host waits for the device once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sessa_torch._documents import document_lengths
from sessa_torch.feedback.outputs import sum_type


def solve_forward(
    solve: Callable[..., Any],
    f: Tensor,  # (B, T, D)
    q: Tensor,  # (B, T, K)
    k: Tensor,  # (B, T, K)
    gamma: Tensor,  # (B, T)
    document_starts: Tensor,  # (B, T)
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`solve` forward of every document: s (B, T, D) and the log-sum-exp (B, T)."""
    s = torch.empty_like(f, memory_format=torch.contiguous_format)
    lse = torch.empty(f.shape[:2], dtype=sum_type(f.device), device=f.device)
    for f_, q_, k_, gamma_, s_, lse_ in _documents(document_starts, f, q, k, gamma, s, lse):
        solved, sums = solve(f_, q_, k_, gamma_, **options)
        s_.copy_(solved)
        lse_.copy_(sums)
    return s, lse


def solve_backward(
    solve: Callable[..., Any],
    ds: Tensor,  # (B, T, D)
    q: Tensor,  # (B, T, K)
    k: Tensor,  # (B, T, K)
    gamma: Tensor,  # (B, T)
    s: Tensor,  # (B, T, D)
    lse: Tensor,  # (B, T)
    document_starts: Tensor,  # (B, T)
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
    """`solve` backward of every document: the gradients of f, q, k and gamma."""
    inputs = (ds, q, k, gamma, s, lse)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (s, q, k, gamma)]
    for parts in _documents(document_starts, *inputs, *grads):
        found = solve(*parts[: len(inputs)], **options)
        for grad, value in zip(parts[len(inputs) :], found, strict=False):
            grad.copy_(value)
    df, dq, dk, dgamma = grads
    return df, dq, dk, dgamma, None


def _documents(document_starts: Tensor, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """Views (1, n, ...) of each document in tensors (B, T, ...)."""
    lengths = document_lengths(document_starts)
    parts = [x.flatten(0, 1).split(lengths) for x in tensors]
    for views in zip(*parts, strict=True):
        yield [view[None] for view in views]
