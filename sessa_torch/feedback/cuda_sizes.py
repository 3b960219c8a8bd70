"""What the Triton kernels' sizes depend on: the device, the type of the operands, the widths."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of the kernels' tiles: rows, columns of scores, inner length, columns of s or k.

    A chunk is the windows of scores that one task computes; at least two, since what the second
    finds is told to the other chunks.
    """

    rows: int
    columns: int
    inner: int
    width: int
    chunk: int = 4
    warps: int = 8
    stages: int = 3


# Triton's interpreter runs on the CPU; small tiles give it several of everything.
INTERPRETED = Tiles(rows=32, columns=64, inner=32, width=64, chunk=2)
# 16-bit operands: two programs of HALF share a multiprocessor, one of WIDE reads less a product.
HALF = Tiles(rows=128, columns=128, inner=64, width=128, warps=4, chunk=2)
WIDE = Tiles(rows=128, columns=256, inner=64, width=256, stages=4)
WIDE_FROM, WIDE_SHARED = 1024, 200 * 1024
# float32: the solve holds whole tiles as operands, so its tiles are smaller than the gradients'.
SINGLE = Tiles(rows=64, columns=64, inner=32, width=128, warps=4)
SINGLE_GRADIENT = Tiles(rows=128, columns=128, inner=32, width=128)
SINGLE_SHARED = 128 * 1024


def is_interpreter() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1)."""
    import triton

    return triton.knobs.runtime.interpret


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of the device."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program can have on the device."""
    from triton.runtime import driver

    return driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The CUDA compute capability of the device."""
    return torch.cuda.get_device_capability(device)


def has_tma(device: torch.device) -> bool:
    """Whether kernels read by tensor memory descriptors, which GPUs from Hopper on have."""
    return device.type != "cuda" or capability(device) >= (9, 0)


def solve_tiles(dtype: torch.dtype, device: torch.device, width: int) -> Tiles:
    """The tile sizes of the solve for operands of this dtype; width is the smaller of K and D."""
    if device.type != "cuda":
        return INTERPRETED
    if dtype == torch.float32:
        return SINGLE
    return WIDE if width >= WIDE_FROM and shared_memory(device) >= WIDE_SHARED else HALF


def gradient_tiles(dtype: torch.dtype, device: torch.device) -> Tiles:
    """The tile sizes of the score gradients for operands of this dtype on this device."""
    if device.type != "cuda":
        return INTERPRETED
    return SINGLE_GRADIENT if dtype == torch.float32 else HALF


def precision(dtype: torch.dtype) -> str:
    """Triton's name for how products of this dtype run.

    float32 runs as three TF32 products, which keep float32's accuracy. A single one does not, not
    even where PyTorch allows TF32: its operands are cut off, and the scores lose three digits.
    """
    return "tf32x3" if dtype == torch.float32 else "ieee"
