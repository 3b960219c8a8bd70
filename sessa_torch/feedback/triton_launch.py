"""Launching a Triton kernel without inspecting its arguments again.

For a short solve Triton's own launch takes longer on the host than the kernel on the GPU, most of
it to find the compiled kernel. Here that is one dictionary, keyed by all that Triton specialises
for.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Lengths of sequences are among the keys: a program that has seen very many forgets them.
MOST_COMPILED = 4096

# What tensor memory descriptors ask of addresses and strides.
DESCRIPTOR_BYTES = 16

_compiled: dict[tuple, Any] = {}


@dataclass(slots=True)
class Blocks:
    """A tensor that a kernel reads in blocks, by a tensor memory descriptor.

    It has what a launch reads of Triton's TensorDescriptor, which takes longer to make.
    """

    base: Tensor
    block_shape: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str = "zero"


def blocks(tensor: Tensor, *block_shape: int) -> Blocks:
    """A tensor for a kernel that reads it in blocks of this shape; see aligned."""
    return Blocks(tensor, block_shape, tensor.shape, tensor.stride())


def aligned_empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor for `blocks`: contiguous but for the space that may lie behind each row."""
    unit = DESCRIPTOR_BYTES // dtype.itemsize
    width = -(-shape[-1] // unit) * unit
    tensor = torch.empty(*shape[:-1], width, dtype=dtype, device=device)
    return tensor if width == shape[-1] else tensor[..., : shape[-1]]


def aligned(tensor: Tensor) -> Tensor:
    """The tensor as `blocks` takes it, copied only where its address or strides do not allow it."""
    unit = DESCRIPTOR_BYTES // tensor.element_size()
    *outer, last = tensor.stride()
    fits = last == 1 and all(stride > 0 and stride % unit == 0 for stride in outer)
    if fits and tensor.data_ptr() % DESCRIPTOR_BYTES == 0:
        return tensor
    return aligned_empty(*tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    descriptors: tuple[Blocks, ...],
    numbers: tuple[float, ...],
    **constants: Any,
) -> None:
    """kernel[grid](*tensors, *descriptors, *numbers, **constants) on the first tensor's device.

    constants are the kernel's constexpr arguments and the launch options; they say what blocks the
    descriptors read.
    """
    device, pointers = tensors[0].device, 0
    for tensor in tensors:
        pointers |= tensor.data_ptr()
    # Triton compiles anew for pointers that are not aligned to 16 bytes; they are rare.
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, descriptors, numbers, **constants)
        return
    if device.type != "cuda" or pointers % 16:
        _launch_by_triton(kernel, grid, tensors, descriptors, numbers, constants)
        return
    given = len(tensors) + len(descriptors)
    special = tuple([numbers[i] for i in _special(kernel, given)])
    types = tuple([tensor.dtype for tensor in tensors])
    key = (id(kernel), device.index, special, types, *constants.values())
    found = _compiled.get(key)
    if found is None:
        if len(_compiled) >= MOST_COMPILED:
            _compiled.clear()
        compiled = _launch_by_triton(kernel, grid, tensors, descriptors, numbers, constants)
        rest = [constants[name] for name in kernel.arg_names[given + len(numbers) :]]
        _compiled[key] = compiled, rest
    else:
        compiled, rest = found
        compiled[(*grid, 1, 1)[:3]](*tensors, *descriptors, *numbers, *rest)


def _launch_by_triton(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    descriptors: tuple[Blocks, ...],
    numbers: tuple[float, ...],
    constants: dict[str, Any],
) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    described = [
        TensorDescriptor(x.base, list(x.shape), list(x.strides), list(x.block_shape))
        for x in descriptors
    ]
    return kernel[grid](*tensors, *described, *numbers, **constants)


@functools.cache
def _special(kernel: Any, given: int) -> list[int]:
    """Which of a kernel's numbers, after the given arguments, it is specialised for."""
    numbers = [p for p in kernel.params[given:] if not p.is_constexpr]
    return [i for i, p in enumerate(numbers) if not p.do_not_specialize]
