"""Launching a Triton kernel without inspecting its arguments again.

For a short solve Triton's own launch takes longer on the host than the kernel on the GPU, most of
it to find the compiled kernel. Here that is one dictionary, keyed by all that Triton specialises
for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_compiled: dict[tuple, Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Tensor | float, **constants: Any) -> None:
    """kernel[grid](*args, **constants) on the device of the first argument, a tensor.

    args are all arguments that are not constexpr, in their order; constants are the rest and the
    launch options.
    """
    device = args[0].device  # type: ignore[union-attr]
    if device.type != "cuda":
        kernel[grid](*args, **constants)
        return
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, *args, **constants)
        return
    key = (kernel, device.index, *map(_mark, args), *constants.values())
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*args, **constants)
    else:
        rest = [constants[name] for name in kernel.arg_names[len(args) :]]
        compiled[(*grid, 1, 1)[:3]](*args, *rest)


def _mark(argument: Tensor | float) -> Any:
    """What Triton specialises for: alignment of pointers; of integers 1, multiples of 16, size."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if isinstance(argument, int):
        # Finer than Triton's own rule, which does no harm.
        return argument if 0 <= argument < 16 else (argument % 16, argument.bit_length() > 31)
    return None
