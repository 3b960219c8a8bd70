"""The loss of logits on CUDA: one Triton kernel that leaves the gradients in their place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_torch.cuda.launch import power_of_two, prepared

# Most logits of a row that a program holds at a time.
MOST_COLUMNS = 4096


@triton.jit(do_not_specialize=["V"])
def cross_entropy_kernel(logits, targets, weights, losses, row_stride, V, BLOCK: tl.constexpr):
    """Replace a row of logits (n, V) by its gradient and store its weighted loss (n,)."""
    row = tl.program_id(0).to(tl.int64)
    own, weight = tl.load(targets + row), tl.load(weights + row)
    start = logits + row * row_stride
    columns = tl.arange(0, BLOCK)
    # Read before anything is stored; the reductions below keep that order among the threads.
    chosen = tl.load(start + own).to(tl.float32)
    top, total = -float("inf"), 0.0
    for first in range(0, V, BLOCK):
        inside = first + columns < V
        x = tl.load(start + first + columns, mask=inside, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - larger) + tl.sum(tl.exp(x - larger), 0)
        top = larger
    sum_log = tl.log(total) + top
    tl.store(losses + row, (sum_log - chosen) * weight)
    for first in range(0, V, BLOCK):
        inside = first + columns < V
        x = tl.load(start + first + columns, mask=inside, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(x - sum_log) * weight
        gradient = tl.where(first + columns == own, gradient - weight, gradient)
        stored = gradient.to(logits.dtype.element_ty)
        tl.store(start + first + columns, stored, mask=inside)


def losses_and_gradients(
    logits: Tensor,  # (n, V)
    targets: Tensor,  # (n,)
    weights: Tensor,  # (n,)
) -> Tensor:
    """Return the weighted losses (n,), float32, and overwrite the logits with their gradients."""
    (n, V), losses = logits.shape, torch.empty_like(weights)
    block = min(MOST_COLUMNS, power_of_two(V))
    prepared(cross_entropy_kernel, BLOCK=block, num_warps=8).launch(
        (n,), (logits, targets, weights, losses), (), (logits.stride(0), V)
    )
    return losses
