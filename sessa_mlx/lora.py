"""LoRA: linear layers with a trained product of two narrow matrices beside their weight."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten

from sessa_common.checkpoint.adapters import A, B
from sessa_mlx.checkpoint import to_tensor


class LoraLinear(nn.Module):
    """W x + b + scale * B (A x), with the weight and the bias of a linear layer and their names."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        out, width = linear.weight.shape
        self.weight, self.scale = linear.weight, scale
        if "bias" in linear:
            self.bias = linear.bias
        self.lora_A = nn.Linear(width, rank, bias=False)
        self.lora_B = nn.Linear(rank, out, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., in) -> (..., out)."""
        y = x @ self.weight.T
        if "bias" in self:
            y = mx.addmm(self.bias, x, self.weight.T)
        return y + self.lora_B(self.lora_A(x)) * self.scale


def add_lora(model: nn.Module, arrays: Mapping[str, np.ndarray], scale: float) -> None:
    """Put a `LoraLinear` in place of every layer that has LoRA matrices among `arrays`."""
    layers = dict(model.named_modules())
    for name in [name.removesuffix(A) for name in arrays if name.endswith(A)]:
        a, b = to_tensor(arrays[name + A]), to_tensor(arrays[name + B])
        layer = LoraLinear(layers[name], len(a), scale)
        layer.lora_A.weight, layer.lora_B.weight = a, b
        model.update_modules(tree_unflatten([(name, layer)]))
