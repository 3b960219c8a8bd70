"""Forward attention of an exported graph: rotary positions, caches and the softmax read.

Letters as in `graph`: B batch, T new tokens, P past tokens, S = P + T, D width, H query heads, G
key/value heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from onnx import TensorProto

from sessa_common.config import SessaConfig
from sessa_export.builder import Builder, Weights
from sessa_export.cache_layout import pair_numbers, row_heads

# The score of a hidden key is lowered by this: finite, so that a row without a visible key is not
# NaN, and so large that no finite score makes up for it.
HIDDEN = np.finfo(np.float32).min


class Shared(NamedTuple):
    """Tensors that every layer reads."""

    bias: str  # (B, 1, T, S) 0 or HIDDEN
    key_mask: str  # (B, S) bool
    rotation: tuple[str, str] | None  # cosines and sines, as `_rotation` says
    fused: bool  # whether there are Attention and RotaryEmbedding
    past: str  # [P]
    total: str  # [S]
    single: str  # whether T is 1, in the buffer layout; else empty
    pairs: list[range]  # numbers of the cached pairs of each layer
    layout: str
    row_heads: int  # heads that hold a row of feedback keys or states together


def shared_tensors(g: Builder, config: SessaConfig, layout: str, fused: bool) -> Shared:
    past, total = g.size("past_key_values.0.key", 2), g.size("attention_mask", 1)
    key_mask = g.add("Cast", "attention_mask", to=TensorProto.BOOL)
    columns = g.add("Range", g.scalar(g.ints(0)), g.scalar(total), g.scalar(g.ints(1)))
    rows = g.add("Slice", columns, past, total)
    causal = g.add("LessOrEqual", columns, g.add("Unsqueeze", rows, g.ints(1)))  # (T, S)
    seen = g.add("And", causal, g.add("Unsqueeze", key_mask, g.ints(1, 2)))  # (B, 1, T, S)
    bias = g.add("Where", seen, g.number(0.0), g.number(float(HIDDEN)))
    rotation = _rotation(g, config, past, total, fused) if config.use_forward_rope else None
    single = ""
    if layout == "buffer":
        single = g.add("Equal", g.scalar(g.size("input_ids", 1)), g.scalar(g.ints(1)))
    pairs, heads = pair_numbers(config, layout), row_heads(config, layout)
    return Shared(bias, key_mask, rotation, fused, past, total, single, pairs, layout, heads)


def _rotation(
    g: Builder, config: SessaConfig, past: str, total: str, fused: bool
) -> tuple[str, str]:
    """Cosines and sines of RoPE: (B, T, d/2) for RotaryEmbedding, else (B, 1, T, d), twice each.

    A token's position is the number of real tokens before it.
    """
    count = g.add("CumSum", "attention_mask", g.scalar(g.ints(1)))
    position = g.add("Max", g.add("Sub", count, g.ints(1)), g.ints(0))
    position = g.add("Slice", position, past, total, g.ints(1))
    axes = g.ints(2) if fused else g.ints(1, 3)
    position = g.add("Cast", g.add("Unsqueeze", position, axes), to=TensorProto.FLOAT)
    d = config.head_dim
    scaling = config.rope_scaling
    if scaling is None:
        frequency = config.rope_theta ** (-np.arange(0, d, 2, dtype=np.float64) / d)
    else:
        frequency = scaling.frequencies(d, config.rope_theta)
    frequency = frequency if fused else np.repeat(frequency, 2)
    angle = g.add("Mul", position, g.weight("rope_frequency", frequency))
    cosines, sines = g.add("Cos", angle), g.add("Sin", angle)
    if scaling is None or scaling.amplitude == 1:
        return cosines, sines
    amplitude = g.number(scaling.amplitude)
    return g.add("Mul", cosines, amplitude), g.add("Mul", sines, amplitude)


def _rotate(g: Builder, config: SessaConfig, x: str, shared: Shared) -> str:
    """RoPE of interleaved pairs; x (B, heads, T, d).

    Without RotaryEmbedding the rotated pair (-x1, x0) is a product with a constant matrix, because
    Split and Concat of single columns are slower in ONNX Runtime.
    """
    if shared.rotation is None:
        return x
    cosines, sines = shared.rotation
    if shared.fused:
        return g.add("RotaryEmbedding", x, cosines, sines, interleaved=1)
    turn = np.kron(np.eye(config.head_dim // 2), np.array([[0.0, 1.0], [-1.0, 0.0]]))
    turned = g.add("MatMul", x, g.weight("rope_turn", turn))
    return g.add("Add", g.add("Mul", x, cosines), g.add("Mul", turned, sines))


def heads_of(g: Builder, x: str, heads: int) -> str:
    """(B, T, heads * width) -> (B, heads, T, width)."""
    if heads == 1:
        return g.add("Unsqueeze", x, g.ints(1))
    return g.add("Transpose", g.add("Reshape", x, g.ints(0, 0, heads, -1)), perm=[0, 2, 1, 3])


def join_heads(g: Builder, x: str, heads: int, width: int) -> str:
    """(B, heads, T, width / heads) -> (B, T, width); T may be 0."""
    if heads == 1:
        return g.add("Squeeze", x, g.ints(1))
    turned = g.add("Transpose", x, perm=[0, 2, 1, 3])
    return g.add("Reshape", turned, g.ints(0, 0, width))


def extend(g: Builder, j: int, part: str, new: str) -> str:
    """Append (B, heads, T, width) to the cached tensor `part` of pair j."""
    past = f"past_key_values.{j}.{part}"
    return g.add("Concat", past, new, axis=2, output=f"present.{j}.{part}")


def attention(
    g: Builder, config: SessaConfig, weights: Weights, i: int, rows: str, shared: Shared
) -> str:
    """Forward attention of `rows` (B, T, (H + 2 G) d), queries, keys and values: f (B, T, D)."""
    H = config.num_attention_heads
    prefix, j = f"model.layers.{i}.mixer.", shared.pairs[i][0]
    q, k, v = _positioned(g, config, weights, prefix, rows, shared)
    if shared.single:
        read = _buffered_read(g, config, j, q, k, v, shared)
    else:
        k, v = extend(g, j, "key", k), extend(g, j, "value", v)
        read = _softmax_read(g, config, q, k, v, shared)
        read = _finite_read(g, config, read, q, lambda: (k, v), shared)
    f = join_heads(g, read, H, H * config.head_dim)
    # The release has no out_proj with one head.
    has_projection = f"{prefix}out_proj.weight" in weights
    return g.linear(weights, prefix + "out_proj", f) if has_projection else f


def _positioned(
    g: Builder, config: SessaConfig, weights: Weights, prefix: str, rows: str, shared: Shared
) -> list[str]:
    """Queries, keys and values (B, heads, T, d) of `rows`, with positions."""
    H, G = config.num_attention_heads, config.num_key_value_heads
    heads = heads_of(g, rows, H + 2 * G)
    if config.qk_norm:
        q, k, v = g.split(heads, (H, G, G), 1)
        q = g.norm(weights, prefix + "q_norm", q, config.layer_norm_eps)
        k = g.norm(weights, prefix + "k_norm", k, config.layer_norm_eps)
        return [_rotate(g, config, q, shared), _rotate(g, config, k, shared), v]
    if shared.rotation is None:
        return g.split(heads, (H, G, G), 1)
    together, v = g.split(heads, (H + G, G), 1)
    return [*g.split(_rotate(g, config, together, shared), (H, G), 1), v]


def _softmax_read(g: Builder, config: SessaConfig, q: str, k: str, v: str, shared: Shared) -> str:
    """q (B, H, T, d), k and v (B, G, S, d) -> (B, H, T, d)."""
    H, G, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if shared.fused:
        return g.add("Attention", q, k, v, shared.bias, scale=d**-0.5)

    def regroup(x: str, heads: int, width: int | None = None) -> str:
        # The H/G query heads of one key head are stacked along the rows, so no key is repeated.
        if G == H:
            return x
        last = g.ints(width) if width else shared.total
        return g.add("Reshape", x, g.add("Concat", g.ints(0, heads, -1), last, axis=0))

    q = regroup(g.add("Mul", q, g.number(d**-0.5)), G, d)
    scores = g.add("MatMul", q, g.add("Transpose", k, perm=[0, 1, 3, 2]))
    scores = g.add("Add", regroup(scores, H), shared.bias)
    probabilities = regroup(g.add("Softmax", scores, axis=-1), G)
    return regroup(g.add("MatMul", probabilities, v), H, d)


def _finite_read(
    g: Builder,
    config: SessaConfig,
    read: str,
    q: str,
    keys_and_values: Callable[[], tuple[str, str]],
    shared: Shared,
) -> str:
    """The result of `_softmax_read`, read again where hidden keys or values made it NaN.

    A weight of 0 does not hide NaN or infinity, and selecting the visible rows of every cache would
    cost more than the read itself.
    """

    def again() -> str:
        seen = g.add("Unsqueeze", shared.key_mask, g.ints(1, 3))  # (B, 1, S, 1)
        k, v = (g.add("Where", seen, x, g.number(0.0)) for x in keys_and_values())
        return _softmax_read(g, config, q, k, v, shared)

    zeros = g.add("ReduceSum", g.add("Sub", read, read), keepdims=0)
    is_finite = g.add("Equal", zeros, g.scalar(g.number(0.0)))
    return g.either(is_finite, lambda: g.add("Identity", read), again)


def _buffered_read(
    g: Builder, config: SessaConfig, j: int, q: str, k: str, v: str, shared: Shared
) -> str:
    """`_softmax_read` of past and new rows; a single token reads the buffers where they are."""
    H, G, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    past_k, past_v = f"past_key_values.{j}.key", f"past_key_values.{j}.value"
    for part, new in (("key", k), ("value", v)):
        g.add("Identity", new, output=f"new.{j}.{part}")

    def keys_and_values() -> tuple[str, str]:
        keys, values = (g.add("Concat", *pair, axis=2) for pair in ((past_k, k), (past_v, v)))
        return keys, values

    def several() -> str:
        return _softmax_read(g, config, q, *keys_and_values(), shared)

    def single() -> str:
        rows = g.add("Reshape", g.add("Mul", q, g.number(d**-0.5)), g.ints(0, G, -1, d))
        turned = (g.add("Transpose", x, perm=[0, 1, 3, 2]) for x in (past_k, k))
        scores = g.add("Concat", *(g.add("MatMul", rows, x) for x in turned), axis=-1)
        p = g.add("Softmax", g.add("Add", scores, shared.bias), axis=-1)  # (B, G, H/G, C + 1)
        past = g.add("Slice", p, g.ints(0), shared.past, g.ints(3))
        own = g.add("Slice", p, shared.past, shared.total, g.ints(3))
        read = g.add("Add", g.add("MatMul", past, past_v), g.add("MatMul", own, v))
        return g.add("Reshape", read, g.ints(0, H, -1, d))

    read = g.either(shared.single, single, several)
    return _finite_read(g, config, read, q, keys_and_values, shared)
