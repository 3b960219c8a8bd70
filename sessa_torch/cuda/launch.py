"""Launches of Triton kernels, and the layouts of the tensors that they take.

For a short solve Triton's own launch takes longer on the host than the kernel on the GPU; most of
that time is spent on finding the compiled kernel. `Prepared` finds it with one look-up.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sessa_torch.cuda.device import has_tma, is_interpreter, num_sms

# Upper limit of cached kernels and plans per kind; the cache is cleared when it is reached.
MOST_COMPILED = 4096

# Tensor memory descriptors need addresses and strides that are multiples of this.
DESCRIPTOR_BYTES = 16


@dataclass(slots=True)
class Blocks:
    """A tensor that a kernel reads in blocks, by a tensor memory descriptor.

    It has the fields of Triton's TensorDescriptor that a launch reads, and is faster to make.
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


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor with unit stride along its last axis, copied only where it has another."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    """A boolean mask as contiguous bytes."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def document_bounds(document_starts: Tensor | None) -> Tensor | None:
    """For each row the first row of its document and the row behind its last, (2, B, T) int32."""
    if document_starts is None:
        return None
    starts = document_starts.int().contiguous()
    rows = torch.arange(starts.shape[1], dtype=torch.int32, device=starts.device)
    rows = rows.expand_as(starts).contiguous()
    # Starts are sorted, so the documents that begin at a row or before it end with its document.
    ends = torch.searchsorted(starts, rows, right=True, out_int32=True)
    return torch.stack([starts, ends])


def power_of_two(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least both."""
    return 1 << (max(count, least) - 1).bit_length()


@functools.cache
def overlaps(device: torch.device) -> bool:
    """True if a kernel can start before the one before it ends, as on GPUs from Hopper on.

    It is launched by programmatic dependent launch, and waits where it needs the other's results.
    """
    return has_tma(device) and not is_interpreter()


def launch_options(device: torch.device) -> dict[str, Any]:
    """Options of a kernel that starts before the one before it ends, where that is possible."""
    early = overlaps(device)
    return {"OVERLAP": early, **({"launch_pdl": True} if early else {})}


def number_of_shares(
    sequences: int, steps: int, most: int, per_sm: int, device: torch.device
) -> int:
    """Number of shares of a past, so that the programs of all sequences end at about the same time.

    per_sm programs run on a multiprocessor at a time; there are at most `most` or `steps` shares.
    """
    programs = per_sm * num_sms(device)
    most = max(1, min(most, steps))
    for splits in range(1, most + 1):
        full = sequences * splits / programs
        if math.ceil(full) <= 1.05 * full:
            return splits
    return most


class Prepared:
    """A kernel with its constants; a launch finds the compiled kernel with one look-up."""

    def __init__(self, kernel: Any, constants: dict[str, Any]) -> None:
        self.kernel, self.constants = kernel, constants
        # The keys are everything that Triton specialises for: device, numbers and types.
        self.compiled: dict[tuple, Any] = {}
        # Places of the numbers that Triton specialises for; known at the first launch.
        self.special: list[int] | None = None

    @functools.cached_property
    def rest(self) -> list[Any]:
        """The constants in the kernel's order, in which they come last."""
        return [self.constants[p.name] for p in self.kernel.params if p.is_constexpr]

    def launch(
        self,
        grid: tuple[int, ...],
        tensors: tuple[Tensor, ...],
        descriptors: tuple[Blocks, ...],
        numbers: tuple[float, ...],
    ) -> None:
        """kernel[grid](*tensors, *descriptors, *numbers) on the device of the first tensor."""
        device, pointers = tensors[0].device, 0
        for tensor in tensors:
            pointers |= tensor.data_ptr()
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.launch(grid, tensors, descriptors, numbers)
            return
        # For pointers that are not aligned to 16 bytes Triton compiles anew; they are rare.
        if device.type != "cuda" or pointers % 16:
            self._launch_by_triton(grid, tensors, descriptors, numbers)
            return
        if self.special is None:
            given = [p for p in self.kernel.params if not p.is_constexpr][-len(numbers) :]
            self.special = [i for i, p in enumerate(given) if not p.do_not_specialize]
        special = [numbers[i] for i in self.special]
        key = (device.index, *special, *[tensor.dtype for tensor in tensors])
        compiled = self.compiled.get(key)
        if compiled is None:
            if len(self.compiled) >= MOST_COMPILED:
                self.compiled.clear()
            self.compiled[key] = self._launch_by_triton(grid, tensors, descriptors, numbers)
        else:
            compiled[(*grid, 1, 1)[:3]](*tensors, *descriptors, *numbers, *self.rest)

    def _launch_by_triton(
        self,
        grid: tuple[int, ...],
        tensors: tuple[Tensor, ...],
        descriptors: tuple[Blocks, ...],
        numbers: tuple[float, ...],
    ) -> Any:
        from triton.tools.tensor_descriptor import TensorDescriptor

        tensor_descriptors = [
            TensorDescriptor(x.base, list(x.shape), list(x.strides), list(x.block_shape))
            for x in descriptors
        ]
        return self.kernel[grid](*tensors, *tensor_descriptors, *numbers, **self.constants)


@functools.lru_cache(MOST_COMPILED)
def prepared(kernel: Any, **constants: Any) -> Prepared:
    """The kernel with its constexpr arguments, among them the shapes of blocks, and options.

    Products and sums may be fused, which Triton will not do by default from 3.10 on.
    """
    return Prepared(kernel, constants | {"enable_fp_fusion": True})
