"""Linear layers that are fast on an NVIDIA GPU, for one row and in training."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx import nn

from sessa_mlx._device import on_cuda


def adds_bias_apart() -> bool:
    """Return True where MLX has matrix-vector products only without a bias, which is on CUDA.

    With one it calls cuBLAS for a single row, which costs the host far more than the product.
    """
    return on_cuda()


class Linear(nn.Linear):
    """`nn.Linear`; on CUDA a bias is added apart to one row, and has a gradient that is fast."""

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., in) -> (..., out)."""
        if "bias" not in self or not adds_bias_apart():
            return super().__call__(x)
        if x.shape[-2] == 1:
            return x @ self.weight.T + self.bias
        y: mx.array = _affine(x, self.weight, self.bias)
        return y


def _forward(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return mx.addmm(bias, x, weight.T)


def _backward(
    primals: tuple[mx.array, mx.array, mx.array], dy: mx.array, y: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of x, weight (out, in) and bias (out,); the last one as a product with ones.

    MLX's own gradient of a bias is a sum over rows, which on CUDA takes several times as long.
    """
    x, weight, bias = primals
    rows, inputs = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dbias = mx.ones((1, len(rows)), dy.dtype) @ rows
    return dy @ weight, rows.T @ inputs, dbias.squeeze(0).astype(bias.dtype)


_affine: Any = mx.custom_function(_forward)
_affine.vjp(_backward)
