"""Muon's update of a matrix; `sessa_common.training.muon` says what it is."""

from __future__ import annotations

import torch
from torch import Tensor

from sessa_common.training.muon import COEFFICIENTS, EPS, MOMENTUM, STEPS, step_size


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return a matrix (M, N) with its singular values brought near 1, by Newton-Schulz steps.

    The products are in the type of the matrix.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, alpha=c, beta=b)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if is_tall else x


def muon_update(
    p: Tensor,  # (M, N)
    m: Tensor,  # (M, N)
    g: Tensor,  # (M, N)
    rate: Tensor | float,
    keep: Tensor | float,
    *,
    low: bool,
) -> tuple[Tensor, Tensor]:
    """Return a matrix p and its momentum m after a step on the gradient g.

    `rate` is the learning rate, `keep` the factor by which weight decay shrinks p. The products are
    in bfloat16 if `low`.
    """
    m = MOMENTUM * m + (1 - MOMENTUM) * g
    ahead = MOMENTUM * m + (1 - MOMENTUM) * g
    step = orthogonalize(ahead.bfloat16() if low else ahead).to(p.dtype)
    return p * keep - (rate * step_size(p.shape)) * step, m
