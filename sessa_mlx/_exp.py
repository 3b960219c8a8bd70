"""Exponentials in float32 that are fast on the CPU too.

On x86 MLX computes exp one number at a time, in about 23 ns on the machine of the benchmarks; its
power takes 11 ns. Both are within float32's rounding of the exponent.
"""

from __future__ import annotations

import math

import mlx.core as mx


def exp(x: mx.array) -> mx.array:
    """Return e^x; 0 for -inf."""
    return mx.power(math.e, x) if _slow(x) else mx.exp(x)


def softmax(x: mx.array) -> mx.array:
    """Return the softmax over the last axis, where at least one number is finite."""
    if not _slow(x):
        return mx.softmax(x, -1)
    powers = exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _slow(x: mx.array) -> bool:
    return x.dtype == mx.float32 and mx.default_device().type == mx.DeviceType.cpu
