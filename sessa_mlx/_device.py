"""The device on which MLX computes."""

from __future__ import annotations

import mlx.core as mx


def on_gpu() -> bool:
    """Return True when MLX computes on a GPU."""
    return mx.default_device().type == mx.DeviceType.gpu


def on_cuda() -> bool:
    """Return True when MLX computes on an NVIDIA GPU."""
    return on_gpu() and mx.cuda.is_available()
