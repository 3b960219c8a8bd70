"""Attention and feedback of rows that processes of torchrun share, beside those of one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sessa_torch.attention import causal_attention
from sessa_torch.checkpoint import choose_device
from sessa_torch.distributed import attention
from sessa_torch.distributed.context import ContextParallel
from sessa_torch.feedback import feedback_solve
from sessa_torch.processes import open_processes

# Norms of relative errors, outputs and gradients.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
LENGTHS = (5, 16, 37)
# Keys that travel together: few blocks, and all.
CHUNKS = (8, attention.MOST_KEYS)
B, H, G, D, K = 2, 4, 2, 7, 5
# Types, head widths and keys of a chunk on GPUs. Above a width of 256 there is no flash kernel.
ON_GPUS = [
    (torch.bfloat16, 64, attention.MOST_KEYS),
    (torch.bfloat16, 20, 2048),
    (torch.bfloat16, 264, 2048),
    (torch.float32, 30, 2048),
]
ON_GPUS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def check_operators() -> None:
    """Compare outputs and gradients at lengths that do not divide, in every process."""
    context = ContextParallel(open_processes().size)
    for dtype, tolerance in TOLERANCE.items():
        for length in LENGTHS:
            shapes = [(B, H, length, D), *[(B, G, length, D)] * 2]
            for attention.MOST_KEYS in CHUNKS:
                compare(context, causal_attention, context.attention, shapes, dtype, tolerance)
            shapes = [(B, length, D), *[(B, length, K)] * 2, (B, length)]
            compare(context, feedback_solve, context.feedback_solve, shapes, dtype, tolerance)


def check_attention_on_gpus() -> None:
    """Compare attention of processes that have a GPU each, at a length that does not divide."""
    context, device = ContextParallel(open_processes().size), choose_device("cuda")
    for dtype, width, attention.MOST_KEYS in ON_GPUS:
        shapes = [(B, 16, 5000, width), *[(B, 4, 5000, width)] * 2]
        tolerance = ON_GPUS_TOLERANCE[dtype]
        compare(context, causal_attention, context.attention, shapes, dtype, tolerance, device)


def compare(
    context, alone, shared, shapes, dtype: torch.dtype, tolerance: float, device: str = "cpu"
) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(shape).tanh().to(device, dtype) for shape in shapes]
    cotangent = torch.randn(shapes[0]).to(device, dtype)
    length = shapes[0][-2]
    context.own(torch.zeros(B, length))
    places = context.exchange.deal.places.to(device)

    def own(x: Tensor) -> Tensor:
        return x.index_select(x.shape.index(length), places)

    # Errors are relative to whole tensors: of one row alone the gradient may be 0.
    expected = with_gradients(alone, inputs, cotangent)
    found = with_gradients(shared, list(map(own, inputs)), own(cotangent))
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        error = float((a - own(b)).norm() / b.norm())
        assert error < tolerance, f"{alone.__name__}, {shapes[0]}, {dtype}: {i} off by {error}"


def with_gradients(function, inputs: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
    """The output of a function and its gradients."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, cotangent)]
