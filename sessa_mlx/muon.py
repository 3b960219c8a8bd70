"""Muon's update of a matrix; `sessa_common.training.muon` says what it is."""

from __future__ import annotations

import mlx.core as mx

from sessa_common.training.muon import COEFFICIENTS, EPS, MOMENTUM, STEPS, step_size


def orthogonalize(matrix: mx.array) -> mx.array:
    """Return a matrix (M, N) with its singular values brought near 1, by Newton-Schulz steps.

    The products are in the type of the matrix.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / mx.maximum(mx.linalg.norm(x), EPS)
    for _ in range(STEPS):
        gram = x @ x.T
        polynomial = mx.addmm(gram, gram, gram, alpha=c, beta=b)
        x = mx.addmm(x, polynomial, x, beta=a)
    return x.T if is_tall else x


def muon_update(
    p: mx.array,  # (M, N)
    m: mx.array,  # (M, N)
    g: mx.array,  # (M, N)
    rate: mx.array,
    keep: mx.array,
    *,
    low: bool,
) -> tuple[mx.array, mx.array]:
    """Return a matrix p and its momentum m after a step on the gradient g.

    `rate` is the learning rate, `keep` the factor by which weight decay shrinks p. The products are
    in bfloat16 if `low`.
    """
    m = MOMENTUM * m + (1 - MOMENTUM) * g
    ahead = MOMENTUM * m + (1 - MOMENTUM) * g
    step = orthogonalize(ahead.astype(mx.bfloat16) if low else ahead).astype(p.dtype)
    return p * keep - (rate * step_size(p.shape)) * step, m
