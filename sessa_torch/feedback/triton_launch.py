"""Launching a Triton kernel without inspecting its arguments again.

For a short solve Triton's own launch takes longer on the host than the kernel on the GPU, most of
it to find the compiled kernel. Here that is one dictionary, keyed by all that Triton specialises
for.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

# Lengths of sequences are among the keys: a program that has seen very many forgets them.
MOST_COMPILED = 4096

_compiled: dict[tuple, Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    **constants: Any,
) -> None:
    """kernel[grid](*tensors, *numbers, **constants) on the device of the first tensor.

    constants are the kernel's constexpr arguments and the launch options.
    """
    device, pointers = tensors[0].device, 0
    for tensor in tensors:
        pointers |= tensor.data_ptr()
    # Triton compiles anew for pointers that are not aligned to 16 bytes; they are rare.
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, numbers, **constants)
        return
    if device.type != "cuda" or pointers % 16:
        kernel[grid](*tensors, *numbers, **constants)
        return
    special = tuple([numbers[i] for i in _special(kernel, len(tensors))])
    types = tuple([tensor.dtype for tensor in tensors])
    key = (kernel, device.index, special, types, *constants.values())
    compiled = _compiled.get(key)
    if compiled is None:
        if len(_compiled) >= MOST_COMPILED:
            _compiled.clear()
        _compiled[key] = kernel[grid](*tensors, *numbers, **constants)
    else:
        rest = [constants[name] for name in kernel.arg_names[len(tensors) + len(numbers) :]]
        compiled[(*grid, 1, 1)[:3]](*tensors, *numbers, *rest)


@functools.cache
def _special(kernel: Any, tensors: int) -> list[int]:
    """Which of a kernel's numbers it is specialised for."""
    numbers = [p for p in kernel.params[tensors:] if not p.is_constexpr]
    return [i for i, p in enumerate(numbers) if not p.do_not_specialize]
