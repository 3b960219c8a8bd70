"""Tile sizes of the Triton kernels, by device, type of the operands and widths."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sessa_torch.cuda.device import shared_memory


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of the kernels' tiles: rows, columns of scores, inner length, columns of s or k.

    A chunk is the number of score windows that one task computes. It is at least two, because the
    other chunks need the maximum that the first chunk finds in its second window.
    """

    rows: int
    columns: int
    inner: int
    width: int
    chunk: int = 4
    warps: int = 8
    stages: int = 3


# Triton's interpreter runs on the CPU; with small tiles short inputs have several of everything.
INTERPRETED = Tiles(rows=32, columns=64, inner=32, width=64, chunk=2)
# 16-bit operands: two programs of HALF share a multiprocessor; WIDE reads less for each product.
HALF = Tiles(rows=128, columns=128, inner=64, width=128, warps=4, chunk=2)
WIDE = Tiles(rows=128, columns=256, inner=64, width=256, stages=4)
WIDE_FROM, WIDE_SHARED = 1024, 200 * 1024
# float32: the solve holds whole tiles as operands, so its tiles are smaller than the gradients'.
SINGLE = Tiles(rows=64, columns=64, inner=32, width=128, warps=4)
SINGLE_GRADIENT = Tiles(rows=128, columns=128, inner=32, width=128)
SINGLE_SHARED = 128 * 1024
# Number of new rows up to which cuda_decode.py solves those behind a past.
DECODE_ROWS = 16


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


def operand_types(
    f: torch.dtype, q: torch.dtype, precision: str
) -> tuple[torch.dtype, torch.dtype]:
    """Types of the operands of two products: queries with keys, and weights with states.

    float32 is rounded to bfloat16, whose range it has, where 16 bits are asked for.
    """
    if precision == "float32" or (precision == "auto" and q == torch.float32):
        return torch.float32, torch.float32
    scores, states = (x if x.itemsize == 2 else torch.bfloat16 for x in (q, f))
    return scores, states


def product_precision(dtype: torch.dtype) -> str:
    """Triton's name for how products of this dtype run.

    float32 runs as three TF32 products, which keep float32's accuracy. A single one does not, not
    even where PyTorch allows TF32: its operands are cut off, and the scores lose three digits.
    """
    return "tf32x3" if dtype == torch.float32 else "ieee"
