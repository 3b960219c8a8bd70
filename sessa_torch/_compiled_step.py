"""A training step that is compiled and, on CUDA, captured as graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn

from sessa_common.data.batches import Batch, batch_arrays
from sessa_common.training.processes import Processes
from sessa_torch._optimizer import Optimizer

# Runs before a capture: compiling, tuning and loading kernels happen then and cannot be captured.
WARM_UP = 3


def compile_training(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a function whose backward pass may compute norms and activations again.

    By default PyTorch keeps each of them that a matrix product of the backward pass reads. To
    compute them again takes little time and saves a quarter of the memory.
    """
    compiled = torch.compile(function, fullgraph=True, dynamic=False)

    @functools.wraps(function)
    def call(*args: Any, **rest: Any) -> Tensor:
        with functorch_config.patch(ban_recompute_materialized_backward=False):
            return compiled(*args, **rest)

    return call


class CompiledStep:
    """A compiled training step that waits for the device once, at its end.

    `_accumulate` adds the loss and the gradients of the batch that lies in the static buffers of
    its shape; `_update` clips, steps and sets the sums to zero. On CUDA both are captured
    as graphs and replayed. The device skips a step that is not finite. Tensors are never replaced,
    because a graph reads them at their addresses.
    """

    def __init__(
        self,
        loss_sum: Callable[..., Tensor],
        parameters: list[nn.Parameter],
        optimizer: Optimizer,
        max_grad_norm: float,
        processes: Processes,
    ) -> None:
        self.loss_sum, self.parameters, self.processes = loss_sum, parameters, processes
        self.optimizer, self.max_grad_norm = optimizer, max_grad_norm
        self.device = parameters[0].device
        self.loss, self.total, self.skip = (torch.zeros((), device=self.device) for _ in range(3))
        # The learning rates of the groups, by the factor of the run's.
        self.rates: dict[float, Tensor] = {}
        self.result = torch.zeros(2, device=self.device)
        self.gradients = [torch.zeros_like(parameter) for parameter in parameters]
        for parameter, gradient in zip(parameters, self.gradients, strict=True):
            parameter.grad = gradient
        for group in optimizer.param_groups:
            rate = torch.zeros((), device=self.device)
            group["lr"] = self.rates.setdefault(group["rate_factor"], rate)
        optimizer.skip_steps_where(self.skip)
        self.update = self._update
        self.shapes: dict[tuple[int, ...], tuple[list[Tensor], Callable[[], None]]] = {}
        self.stream = torch.cuda.Stream() if self.device.type == "cuda" else None

    def __call__(
        self, batches: Sequence[Batch], total: float, learning_rate: float
    ) -> tuple[float, float]:
        """Take one step on the sum of the batches' losses / total; (nats, gradient norm)."""
        # Every shape is made ready before the first sum, because a warm-up sets the sums to zero.
        arrays = [batch_tensors(batch, always=True) for batch in batches]
        ready = [self._ready(tensors) for tensors in arrays]
        self.total.fill_(total)
        for factor, rate in self.rates.items():
            rate.fill_(learning_rate * factor)
        for tensors, (buffers, accumulate) in zip(arrays, ready, strict=True):
            for buffer, tensor in zip(buffers, tensors, strict=True):
                buffer.copy_(tensor, non_blocking=True)
            accumulate()
        self.processes.mean([self.loss, *self.gradients])
        self.update()
        loss, norm = self.result.tolist()
        return loss, norm

    def _ready(self, tensors: list[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
        """Return the static buffers (B, T) of a batch and the function that accumulates them."""
        shape = (len(tensors), *tensors[0].shape)
        if shape not in self.shapes:
            buffers = [torch.zeros_like(tensor, device=self.device) for tensor in tensors]
            accumulate: Callable[[], None] = functools.partial(self._accumulate, *buffers)
            if self.stream is not None:
                if not self.shapes:
                    self.update = self._captured(self._update)
                accumulate = self._captured(accumulate)
            self.shapes[shape] = buffers, accumulate
        return self.shapes[shape]

    def _accumulate(self, *batch: Tensor) -> None:
        loss = self.loss_sum(*batch) / self.total
        # One kernel adds all gradients; backward() would add them parameter by parameter.
        torch._foreach_add_(self.gradients, torch.autograd.grad(loss, self.parameters))
        self.loss += loss.detach()

    def _update(self) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.result.copy_(torch.stack([self.loss, norm]))
        self.skip.copy_(~torch.isfinite(self.loss + norm))
        self.optimizer.step()
        torch._foreach_zero_(self.gradients)
        self.loss.zero_()

    def _captured(self, function: Callable[[], None]) -> Callable[[], None]:
        """Capture a function as a CUDA graph and return the call that replays it."""
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._warm_up(function)
        torch.cuda.current_stream().wait_stream(self.stream)
        # Set only now, because AdamW warns about it outside a capture.
        for group in self.optimizer.param_groups:
            group["capturable"] = True
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            function()
        return graph.replay

    def _warm_up(self, function: Callable[[], None]) -> None:
        """Run a function without changing the weights, the moments or the step count.

        The loss is set to NaN before each run, and the update skips steps whose loss is not finite.
        """
        for _ in range(WARM_UP):
            for run in (function, self.update):
                self.loss.fill_(torch.nan)
                run()


def batch_tensors(batch: Batch, *, always: bool) -> list[Tensor]:
    """Return the arrays of a batch as tensors; see `batch_arrays`."""
    arrays = batch_arrays(batch, always=always)
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
