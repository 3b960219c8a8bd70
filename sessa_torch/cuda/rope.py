"""Rotary positions on CUDA: one Triton kernel a tensor, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sessa_torch.cuda.launch import prepared

# Number of rows of one head that a program rotates.
ROWS = tl.constexpr(32)


@triton.jit(do_not_specialize=["H", "T"])
def rotate_kernel(
    x, cos, sin, out, sxb, sxh, sxt, sob, soh, sot, H, T, each,
    d: tl.constexpr, WIDE: tl.constexpr, BACK: tl.constexpr,
):
    """Rotate the pairs of x (B, H, T, d) into out; with BACK, by the negative angles.

    cos and sin have contiguous rows of d elements, and `each` elements from one sequence to the
    next.
    """
    head = tl.program_id(1)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, WIDE)
    inside = (rows < T)[:, None] & (columns < d)[None, :]
    table = b * each + (rows * d)[:, None] + columns[None, :]
    at = b * sxb + h * sxh + (rows * sxt)[:, None] + columns[None, :]
    c, _ = pairs(tl.load(cos + table, mask=inside, other=0.0), WIDE)
    _, s = pairs(tl.load(sin + table, mask=inside, other=0.0), WIDE)
    even, odd = pairs(tl.load(x + at, mask=inside, other=0.0).to(tl.float32), WIDE)
    if BACK:
        s = -s
    rotated = tl.join(even * c - odd * s, odd * c + even * s).reshape(ROWS, WIDE)
    to = b * sob + h * soh + (rows * sot)[:, None] + columns[None, :]
    tl.store(out + to, rotated.to(out.dtype.element_ty), mask=inside)


@triton.jit
def pairs(tile, WIDE: tl.constexpr):
    """The even and the odd columns of a tile (ROWS, WIDE)."""
    return tile.reshape(ROWS, WIDE // 2, 2).split()


class Rotation(torch.autograd.Function):
    """x (B, H, T, d) rotated by cos and sin (1 or B, 1, T, d); its gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(dy, cos, sin, back=True), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """x (B, H, T, d) rotated by the kernel, laid out like x; `back` negates the angles."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty_like(x)
    (B, H, T, d), cos, sin = x.shape, cos.contiguous(), sin.contiguous()
    each = T * d if cos.shape[0] > 1 else 0
    wide = max(2, 1 << (d - 1).bit_length())
    prepared(rotate_kernel, d=d, WIDE=wide, BACK=back, num_warps=4).launch(
        (-(-T // ROWS.value), B * H), (x, cos, sin, out), (),
        (*x.stride()[:3], *out.stride()[:3], H, T, each),
    )
    return out
