"""Linear layers whose product with one row is a matrix-vector product on every GPU."""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from sessa_mlx._device import on_cuda


def adds_bias_apart() -> bool:
    """Return True where MLX has matrix-vector products only without a bias, which is on CUDA.

    With one it calls cuBLAS for a single row, which costs the host far more than the product.
    """
    return on_cuda()


class Linear(nn.Linear):
    """`nn.Linear`, with the bias added apart where that makes one row faster."""

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., in) -> (..., out)."""
        if "bias" in self and x.shape[-2] == 1 and adds_bias_apart():
            return x @ self.weight.T + self.bias
        return super().__call__(x)
