"""Softmax weights and gradients of the scores of rows over one block of keys: Triton kernels.

The sweep over rows that several processes share makes scores block by block with matrix products;
what lies between two products is one kernel here. Letters as in `sessa_torch.distributed.sweep`:
N sequences and key heads together with g query heads, r rows, m keys of the block, D value width.
All rows read all keys of the block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_torch.cuda.launch import power_of_two, prepared

# Columns that a program of the gradients takes.
COLUMNS = 1024


@triton.jit(do_not_specialize=["r", "m", "D"])
def block_weights_kernel(
    scores,
    top,
    total,
    sums,
    weights,
    stats_stride,
    sums_stride,
    r,
    m,
    D,
    scale,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write the weights (N g, r, m) of a row; bring its top, total and sums (D,) up to date."""
    row, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, KEYS)
    at = (n * r + row) * m + columns
    inside = columns < m
    x = tl.load(scores + at, mask=inside, other=-float("inf")) * scale
    stat = n * stats_stride + row
    old = tl.load(top + stat)
    new = tl.maximum(old, tl.max(x, 0))
    weight = tl.exp(x - new)
    factor = tl.exp(old - new)
    tl.store(weights + at, weight.to(weights.dtype.element_ty), mask=inside)
    tl.store(total + stat, tl.load(total + stat) * factor + tl.sum(weight, 0))
    tl.store(top + stat, new)
    if new > old:
        start = sums + n * sums_stride + row.to(tl.int64) * D
        for first in range(0, D, WIDTH):
            places = first + tl.arange(0, WIDTH)
            value = tl.load(start + places, mask=places < D, other=0.0)
            tl.store(start + places, value * factor, mask=places < D)


def block_weights(
    scores: Tensor,  # (N, g, r, m)
    top: Tensor,  # (N, g, r, 1)
    total: Tensor,  # (N, g, r, 1)
    sums: Tensor,  # (N, g, r, D)
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return exp(scale * scores - top) (N, g, r, m) and bring top, total and sums up to the block.

    `top`, `total` and `sums` are views of contiguous float32 tensors of more rows.
    """
    N, g, r, m = scores.shape
    D, weights = sums.shape[-1], torch.empty(scores.shape, dtype=dtype, device=scores.device)
    kernel = prepared(
        block_weights_kernel, KEYS=power_of_two(m), WIDTH=min(1024, power_of_two(D)), num_warps=4
    )
    strides = top.stride(1), sums.stride(1)
    numbers = (*strides, r, m, D, scale)
    kernel.launch((r, N * g), (scores, top, total, sums, weights), (), numbers)
    return weights


@triton.jit(do_not_specialize=["r", "m"])
def block_gradients_kernel(
    scores,
    dweights,
    top,
    total,
    delta,
    weights,
    dscores,
    top_n,
    top_r,
    total_n,
    total_r,
    delta_n,
    delta_r,
    r,
    m,
    scale,
    COLUMNS: tl.constexpr,
):
    """Write the weights of a row (m,) and the gradients of its products q k."""
    row, n = tl.program_id(0), tl.program_id(2).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = (n * r + row) * m + columns
    inside = columns < m
    x = tl.load(scores + at, mask=inside, other=-float("inf")) * scale
    weight = tl.exp(x - tl.load(top + n * top_n + row * top_r))
    weight /= tl.load(total + n * total_n + row * total_r)
    dweight = tl.load(dweights + at, mask=inside, other=0.0)
    dscore = (dweight - tl.load(delta + n * delta_n + row * delta_r)) * weight * scale
    tl.store(weights + at, weight.to(weights.dtype.element_ty), mask=inside)
    tl.store(dscores + at, dscore.to(dscores.dtype.element_ty), mask=inside)


def block_gradients(
    scores: Tensor,  # (N, g, r, m)
    dweights: Tensor,  # (N, g, r, m)
    top: Tensor,  # (N, g, r, 1)
    total: Tensor,  # (N, g, r, 1)
    delta: Tensor,  # (N, g, r, 1)
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return weights exp(scale * scores - top) / total and the gradients of the scores.

    `dweights` are the gradients of the weights and `delta` (N, g, r, 1) their weighted mean.
    """
    N, g, r, m = scores.shape
    weights, dscores = (
        torch.empty(scores.shape, dtype=dtype, device=scores.device) for _ in range(2)
    )
    columns = min(COLUMNS, power_of_two(m))
    kernel = prepared(block_gradients_kernel, COLUMNS=columns, num_warps=4)
    strides = (stride for x in (top, total, delta) for stride in x.stride()[1:3])
    kernel.launch(
        (r, -(-m // columns), N * g),
        (scores, dweights, top, total, delta, weights, dscores),
        (),
        (*strides, r, m, scale),
    )
    return weights, dscores
