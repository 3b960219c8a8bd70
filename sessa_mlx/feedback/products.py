"""Matrix products of the solve: their operands, and float32 accuracy where a GPU uses TF32."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import mlx.core as mx
import numpy as np

HALVES = (mx.float16, mx.bfloat16)


def storage_type(f: mx.array, q: mx.array, precision: str = "auto") -> mx.Dtype:
    """Type of the weights and states that a GPU multiplies; sums and s stay float32.

    A model of 16 bits has f or q in 16 bits: a cache keeps f and the states in float32, and q tells
    the type. `precision` is that of `feedback_solve`.
    """
    halves = [x.dtype for x in (f, q) if x.dtype in HALVES]
    if precision == "bfloat16":
        return (halves or [mx.bfloat16])[0]
    return halves[0] if precision == "auto" and q.dtype in halves else mx.float32


def product(a: mx.array, b: mx.array, storage: mx.Dtype) -> mx.array:
    """a @ b, in float32 accuracy for float32 storage even where MLX keeps 11 bits of an operand.

    Numbers in float16 and bfloat16 fit in 11 bits. A float32 operand is split into two such parts;
    the product of the two low parts is smaller than float32's rounding and is left out.
    """
    if storage != mx.float32 or not operands_lose_bits():
        return a @ b
    high_a, high_b = high_bits(a), high_bits(b)
    return high_a @ high_b + (high_a @ (b - high_b) + (a - high_a) @ high_b)


def add_product(total: mx.array, a: mx.array, b: mx.array, storage: mx.Dtype) -> mx.array:
    """total + a @ b in float32: one launch for float32 storage, two for 16 bits."""
    if storage == mx.float32 and not operands_lose_bits():
        return mx.addmm(total.astype(mx.float32), a, b)
    return fused(_sum)(total, product(a, b, storage))


def _sum(total: mx.array, part: mx.array) -> mx.array:
    return total.astype(mx.float32) + part


@cache
def fused(function: Callable[..., Any], *constants: Any) -> Callable[..., Any]:
    """`function` of arrays behind its constants, as one launch for arrays of any shape."""
    return mx.compile(partial(function, *constants), shapeless=True)


def high_bits(x: mx.array) -> mx.array:
    """x truncated to the 11 significant bits of TF32."""
    return (x.view(mx.uint32) & 0xFFFFE000).view(mx.float32)


@cache
def operands_lose_bits() -> bool:
    """True on Apple's M5 and NVIDIA's Ampere and later, where MLX takes float32 as TF32.

    MLX_ENABLE_TF32=0 turns that off; MLX reads it when it starts.
    """
    architecture = str(mx.device_info().get("architecture", ""))
    generation = re.match(r"(applegpu_g|sm_)(\d+)", architecture)
    if generation is None or os.environ.get("MLX_ENABLE_TF32") == "0":
        return False
    return int(generation[2]) >= {"applegpu_g": 17, "sm_": 80}[generation[1]]


@cache
def lower_halves(n: int, half: int) -> mx.array:
    """True (n, n) in the lower left quarter of every diagonal block of 2 half rows."""
    index = np.arange(n) // half
    return mx.array((index[:, None] == index + 1) & (index % 2 == 0))


def diagonal_blocks(N: mx.array, size: int) -> mx.array:
    """The (B, count, size, size) blocks on the diagonal of N (B, count * size, count * size).

    mx.diagonal would compute indices and gather by them.
    """
    B, n, _ = N.shape
    strides = n * n, size * (n + 1), n, 1
    return mx.as_strided(N, (B, n // size, size, size), strides)


@cache
def identity(n: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """The unit matrix (n, n), a constant: mx.eye scatters ones in every step."""
    return mx.array(np.eye(n), dtype)
