"""Rules for the tensors that every backend returns."""

from __future__ import annotations

import torch
from torch import Tensor


def from_row(x: Tensor, first: int, dtype: torch.dtype) -> Tensor:
    """Rows `first` and later of x (B, T, D) in `dtype`: contiguous, and in memory of their own.

    The outputs of a custom op must not share memory, and a view would keep the other rows alive.
    """
    if first == 0:
        return x.to(dtype).contiguous()
    return x[:, first:].to(dtype, copy=True, memory_format=torch.contiguous_format)


def sum_type(device: torch.device) -> torch.dtype:
    """The type of a log-sum-exp on this device: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
