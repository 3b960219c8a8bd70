"""Attention and feedback of rows that processes of torchrun share, beside those of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from support.operands import draw_starts
from torch import Tensor

from sessa_torch.attention import causal_attention
from sessa_torch.checkpoint import choose_device
from sessa_torch.distributed import attention
from sessa_torch.distributed.context import ContextParallel
from sessa_torch.distributed.deal import Deal
from sessa_torch.feedback import feedback_solve
from sessa_torch.processes import open_processes

# Norms of relative errors, outputs and gradients.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
LENGTHS = (5, 16, 37)
# Keys that travel together: few blocks, and all.
CHUNKS = (8, attention.MOST_KEYS)
B, H, G, D, K = 2, 4, 2, 7, 5
# The mean length of documents, and the least norm that an error is relative to.
DOCUMENT, SMALLEST = 6, 1.0
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
            block = Deal.of(length, 0, context.size).block
            blocks = (torch.arange(length) // block * block).repeat(B, 1)
            for documents in (None, torch.from_numpy(draw_starts(1, B, length, DOCUMENT)), blocks):
                shapes = [(B, H, length, D), *[(B, G, length, D)] * 2]
                rest = (dtype, tolerance, "cpu", documents)
                for attention.MOST_KEYS in CHUNKS:
                    compare(context, causal_attention, context.attention, shapes, *rest)
                shapes = [(B, length, D), *[(B, length, K)] * 2, (B, length)]
                compare(context, feedback_solve, context.feedback_solve, shapes, *rest)


def check_attention_on_gpus() -> None:
    """Compare attention of processes that have a GPU each, at a length that does not divide."""
    context, device = ContextParallel(open_processes().size), choose_device("cuda")
    for dtype, width, attention.MOST_KEYS in ON_GPUS:
        shapes = [(B, 16, 5000, width), *[(B, 4, 5000, width)] * 2]
        tolerance = ON_GPUS_TOLERANCE[dtype]
        compare(context, causal_attention, context.attention, shapes, dtype, tolerance, device)


def compare(
    context: ContextParallel,
    alone: Callable[..., Tensor],
    shared: Callable[..., Tensor],
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    tolerance: float,
    device: str = "cpu",
    starts: Tensor | None = None,
) -> None:
    """Compare a function of whole rows with one of shared rows, outputs and gradients."""
    torch.manual_seed(0)
    inputs = [torch.randn(shape).tanh().to(device, dtype) for shape in shapes]
    cotangent = torch.randn(shapes[0]).to(device, dtype)
    length = shapes[0][-2]
    context.own(torch.zeros(B, length), starts)
    places = context.exchange.deal.places.to(device)

    def own(x: Tensor) -> Tensor:
        return x.index_select(x.shape.index(length), places)

    # Errors are relative to whole tensors: a row that reads one key has gradients of 0.
    whole = alone if starts is None else partial(alone, document_starts=starts)
    expected = with_gradients(whole, inputs, cotangent)
    found = with_gradients(shared, list(map(own, inputs)), own(cotangent))
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        error = float((a - own(b)).norm() / b.norm().clamp_min(SMALLEST))
        assert error < tolerance, f"{alone.__name__}, {shapes[0]}, {dtype}: {i} off by {error}"


def with_gradients(function, inputs: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
    """The output of a function and its gradients."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, cotangent)]
