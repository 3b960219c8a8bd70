"""LoRA: linear layers with a trained product of two narrow matrices beside their weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from sessa_common.checkpoint.adapters import A, B
from sessa_torch.checkpoint import to_tensor


class LoraLinear(nn.Module):
    """W x + b + scale * B (A x), with the weight and the bias of a linear layer and their names."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        device = linear.weight.device
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        y = F.linear(x, self.weight, self.bias)
        return y + self.lora_B(self.lora_A(x)) * self.scale


def add_lora(model: nn.Module, arrays: Mapping[str, np.ndarray], scale: float) -> None:
    """Put a `LoraLinear` in place of every layer that has LoRA matrices among `arrays`."""
    for name in [name.removesuffix(A) for name in arrays if name.endswith(A)]:
        parent, _, own = name.rpartition(".")
        a, b = to_tensor(arrays[name + A]), to_tensor(arrays[name + B])
        linear: Any = model.get_submodule(name)
        layer = LoraLinear(linear, len(a), scale)
        layer.lora_A.weight.data.copy_(a)
        layer.lora_B.weight.data.copy_(b)
        setattr(model.get_submodule(parent), own, layer)
