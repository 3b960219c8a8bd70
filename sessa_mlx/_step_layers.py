"""Single rows through a layer behind a cache, in few operations that are one launch each on a GPU.

The host needs longer to describe an operation than a GPU to compute it for one row. Each layer's
weights are therefore arranged once: projections of the same row are one product, and a bias, a
gate or a change of the dtype joins the operation that reads the result. MLX's CUDA backend has a
fast product of one row only with a transposed matrix and without a bias; for any other it calls
cuBLAS, which takes the host longer than ten launches.

Letters as in `attention` and `mixer`; P is the number of cached positions, B the number of rows.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from sessa_common.layer_kinds import LayerKind
from sessa_mlx._device import on_cuda, on_gpu
from sessa_mlx._linear import Linear
from sessa_mlx.attention import Rope, apply_rope
from sessa_mlx.cache import GrowingBuffer, Mamba2LayerCache, SessaLayerCache

# The score of a hidden row. It is finite, so that a token that sees no row gets the mean of rows
# that are zero, not NaN.
HIDDEN = -1e30
# A width of heads for which MLX's CUDA backend has a fused attention.
HEAD = 64

Product = Callable[[mx.array], mx.array]


Index = tuple[slice | int, ...]


class Position:
    """The place of the new token behind P cached ones.

    `rows` are two indices of an array whose rows are on axis 1: of the new row, and of the P+1 rows
    up to it; `before` are those of the row before. Of the array with keys and values, whose rows
    are on axis 3, `heads` is the new row, and `keys` and `values` are the rows up to it. `scored`
    are the feedback's keys of the P rows, with and without further ones.
    """

    def __init__(self, past: int, seen: mx.array | None, rope: Rope | None) -> None:
        self.past, self.rope = past, rope
        self.seen = seen  # (B, 1, 1, P+1) bool, False for padding; None without padding
        self.before, self.rows = _indices(1, past - 1), _indices(1, past)
        self.heads, (_, *every, rows) = _indices(3, past)
        self.keys, self.values = (0, *every, rows), (1, *every, rows)
        self.scored = (slice(None), slice(0, past)), (0, slice(0, past + HEAD))


def _indices(axis: int, row: int) -> tuple[Index, Index]:
    every = (slice(None),) * axis
    return (*every, slice(row, row + 1)), (*every, slice(0, row + 1))


def _write(held: GrowingBuffer, row: mx.array, indices: tuple[Index, Index]) -> mx.array:
    """Write a row into a buffer that has room for it; return the rows up to it."""
    assert held.buffer is not None
    held.buffer[indices[0]] = row
    return held.buffer[indices[1]]


def _states(cache: SessaLayerCache, position: Position) -> mx.array:
    """The past states (B, P, D), with the one that the step before left to be written."""
    row, held = cache.s.pending, cache.s
    # Several rows are those of a prompt, and a first row has no buffer yet.
    if row is None or row.shape[1] != 1 or not held._has_room(0):
        states = held.rows
        assert states is not None
        return states
    held.pending = None
    return _write(held, row, position.before)


def step_layer(layer: nn.Module, kind: LayerKind) -> Callable[..., mx.array]:
    """A function of (x (B, 1, D), cache of the layer, position), with the layer's weights."""
    if kind.block == "mamba2":
        return _Mamba2Step(layer)
    return (_GatedStep if kind.block == "gated" else _StandardStep)(layer)


class _GatedStep:
    def __init__(self, layer: nn.Module) -> None:
        self.norm, self.mixer = _norm(layer.ln), _MixerStep(layer.mixer)
        self.expand, bias = split_bias(layer.W_in)
        self.biases = mx.split(bias, 2) if bias.ndim else [bias, bias]
        self.contract, self.bias = split_bias(layer.W_out)
        self.activate, self.add = _fused(_activated), _fused(_sum)
        mx.eval(self.biases)

    def __call__(self, x: mx.array, cache: SessaLayerCache, position: Position) -> mx.array:
        a, g = mx.split(self.expand(self.norm(x)), 2, -1)
        a, wide = self.activate(a, self.biases[0])
        s = self.mixer(a, wide, cache, position, g, self.biases[1])
        return self.add(self.contract(s), self.bias, x)


class _StandardStep:
    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.mixer = layer, _MixerStep(layer.mixer)

    def __call__(self, x: mx.array, cache: SessaLayerCache, position: Position) -> mx.array:
        a = self.layer.ln(x)
        x = x + self.mixer(a, _wide(a), cache, position)
        return x + self.layer.mlp(self.layer.ln_mlp(x))


class _Mamba2Step:
    """The call of the layer, whose state has a fixed shape, as one compiled function on a GPU."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.run = mx.compile(self._run) if on_gpu() else self._run

    def __call__(self, x: mx.array, cache: Mamba2LayerCache, position: Position) -> mx.array:
        x, held = self.run(x, cache.tensors())
        cache.load(held)
        return x

    def _run(self, x: mx.array, held: dict[str, mx.array]) -> tuple[mx.array, Any]:
        cache = Mamba2LayerCache()
        cache.load(held)
        return self.layer(x, cache=cache), cache.tensors()


class _MixerStep:
    """Attention and, in a Sessa mixer, the feedback of one row."""

    def __init__(self, mixer: nn.Module) -> None:
        config = mixer.config
        self.config, self.d = config, config.head_dim
        self.H, self.G = config.num_attention_heads, config.num_key_value_heads
        self.scale = self.d**-0.5
        width = (self.H + 2 * self.G) * self.d
        self.attention_part = (slice(None), slice(None), slice(0, width))
        self.norms = (mixer.q_norm, mixer.k_norm) if config.qk_norm else None
        self.project, self.bias = split_bias(join_projections(mixer))
        self.out, self.out_bias = None, None
        if mixer.projects:
            self.out, bias = split_bias(mixer.out_proj)
            self.out_bias = bias if bias.ndim else None
        self.gate = _fused(_gated)
        self.feeds_back = "proj_fb" in mixer
        if self.feeds_back:
            self._prepare_feedback(mixer, width)

    def _prepare_feedback(self, mixer: nn.Module, width: int) -> None:
        """Arrange what the feedback needs; its part of the projections begins at `width`."""
        config, K = self.config, self.config.feedback_key_dim
        self.parts = [width, width + K]
        weight = _wide(mixer.gamma_ctx.weight)
        self.gain_weight, self.gain_bias = weight.T, _wide(mixer.gamma_bias)
        self.widen, self.finish = _fused(_widened), _fused(_finished, config.gamma_max)
        # Scales the feedback's queries and nothing else.
        columns = mx.arange(width + 2 * K)
        scaled = (columns >= width) & (columns < width + K)
        self.scales = mx.where(scaled, K**-0.5, 1).astype(weight.dtype)
        # Queries whose score is the first number of a key. MLX would copy a broadcast array.
        first = np.zeros((1, config.hidden_size // HEAD, 1, HEAD), np.float32)
        first[..., 0] = 1
        self.first = mx.array(first)
        mx.eval(self.gain_weight, self.gain_bias, self.scales, self.first)

    def __call__(
        self,
        a: mx.array,  # (B, 1, D)
        wide: mx.array,  # a in float32 at least
        cache: SessaLayerCache,
        position: Position,
        *gate: mx.array,  # g (B, 1, D) without its bias, and the bias
    ) -> mx.array:
        """The mixer of a, times the gate if there is one."""
        rows = self.project(a)
        if not self.feeds_back:
            f = self._attend(rows + self.bias, cache, position)
            return self.gate(f, *gate) if gate else f
        rows, wide_rows = self.widen(rows, self.bias, self.scales)
        f = self._attend(rows, cache, position)
        mean = self._mean_state(wide_rows, cache, position)
        newest, s = self.finish(f, mean, wide @ self.gain_weight, self.gain_bias, *gate)
        cache.s.append(newest)
        return s

    def _attend(self, rows: mx.array, cache: SessaLayerCache, position: Position) -> mx.array:
        """Attention f (B, 1, D); rows (B, 1, ...) begin with queries, keys and values."""
        B, H, G, d = len(rows), self.H, self.G, self.d
        heads = rows[self.attention_part].reshape(B, H + 2 * G, 1, d)
        if self.norms:
            q, k, v = mx.split(heads, [H, H + G], 1)
            heads = mx.concatenate([self.norms[0](q), self.norms[1](k), v], 1)
        q, kv = mx.split(self._rotated(heads, position.rope), [H], 1)
        held = cache.kv.buffer
        assert held is not None
        held[position.heads] = kv.reshape(B, 2, G, 1, d).swapaxes(0, 1)
        cache.kv.length += 1
        k, v = held[position.keys], held[position.values]
        # Without a mask there is a fused kernel on every GPU.
        f = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask=position.seen)
        f = f.reshape(B, 1, H * d)
        if self.out is not None:
            f = self.out(f)
        return f if self.out_bias is None else f + self.out_bias

    def _rotated(self, heads: mx.array, rope: Rope | None) -> mx.array:
        """Heads (B, H + 2G, 1, d) after RoPE, which changes the queries and keys among them."""
        if rope is None:
            return heads
        return apply_rope(heads.reshape(-1, 1, 1, self.d), rope).reshape(heads.shape)

    def _mean_state(self, rows: mx.array, cache: SessaLayerCache, position: Position) -> mx.array:
        """The past states (B, 1, D), weighted by the softmax of the scores q k (B, 1, P).

        `rows` end with the feedback's query and key.
        """
        _, q, k = mx.split(rows, self.parts, -1)
        _write(cache.k_fb, k, position.rows)
        cache.k_fb.length += 1
        keys, states = cache.k_fb.buffer, _states(cache, position)
        assert keys is not None
        past, further = position.scored
        if position.seen is None and fits_strided_attention(states):
            # MLX would copy q, a part of a longer row, but for the strides of this shape.
            return self._strided_attention(q.reshape(1, -1) @ keys[further].T, states)
        scores = q @ keys[past].swapaxes(1, 2)
        if position.seen is not None:
            scores = mx.where(position.seen[:, 0, :, : position.past], scores, HIDDEN)
        return mx.softmax(scores, -1, precise=True) @ states

    def _strided_attention(self, scores: mx.array, states: mx.array) -> mx.array:
        """The states (1, P, D), weighted by the softmax of the first P scores (1, P + HEAD).

        The states are the values of attention with D / HEAD heads. Key j of every head is the part
        of the scores that begins at the jth one, without a copy, and the query is (1, 0, 0, ...),
        so that the score of attention is the jth score. The numbers behind it are multiplied by
        zero; those behind the first P are scores of zero keys or of the newest one, which are
        finite.
        """
        _, P, D = states.shape
        values = states.reshape(1, P, D // HEAD, HEAD).swapaxes(1, 2)
        keys = mx.as_strided(scores, values.shape, (0, 0, 1, 1))
        mean = mx.fast.scaled_dot_product_attention(self.first, keys, values, scale=1.0)
        return mean.reshape(1, 1, D)


def fits_strided_attention(states: mx.array) -> bool:
    """Return True where `_strided_attention` is one or two launches and fits states (B, P, D).

    On CUDA the product of one row of weights with the states would be a call of cuBLAS.
    """
    return (
        on_cuda() and states.dtype == mx.float32 and len(states) == 1 and not states.shape[2] % HEAD
    )


def _norm(layer: nn.Module) -> Callable[[mx.array], mx.array]:
    """A normalisation; that of MLX looks its arrays up, which takes as long as the launch."""
    if type(layer) is not nn.LayerNorm or "weight" not in layer:
        return layer
    weight, bias, eps = layer.weight, layer.get("bias"), layer.eps
    return lambda x: mx.fast.layer_norm(x, weight, bias, eps)


def split_bias(layer: nn.Module) -> tuple[Product, mx.array]:
    """The product of a linear layer, and its bias, which is a scalar 0 for a layer without one.

    A layer of another kind than `nn.Linear` and its quantised form keeps its bias.
    """
    dtype = layer.scales.dtype if "scales" in layer else layer.weight.dtype
    bias = layer.get("bias", mx.zeros((), dtype))
    if type(layer) in (Linear, nn.Linear):
        transposed = layer.weight.T
        mx.eval(transposed, bias)
        return lambda x: x @ transposed, bias
    if type(layer) is nn.QuantizedLinear:
        mx.eval(bias)
        given = {name: layer[name] for name in ("weight", "scales", "biases") if name in layer}
        form = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
        weight = given.pop("weight")
        return lambda x: mx.quantized_matmul(x, weight, transpose=True, **given, **form), bias
    return layer, mx.zeros((), dtype)


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "proj_fb")


def join_projections(mixer: nn.Module) -> Any:
    """One linear layer whose output is that of the mixer's projections side by side.

    Their arrays become parts of the joined ones, so that nothing is held twice. Projections that
    are quantised in different ways stay apart, and so do those of which only some have a bias.
    """
    layers = [mixer[name] for name in PROJECTIONS if name in mixer]
    forms = {
        (type(x), getattr(x, "bits", 0), getattr(x, "group_size", 0), "bias" in x) for x in layers
    }
    if len(forms) > 1:
        return _SideBySide(layers)
    joined = copy.copy(layers[0])
    for name in list(joined.parameters()):
        joined[name] = mx.concatenate([layer[name] for layer in layers])
        mx.eval(joined[name])
        ends = itertools.accumulate(len(layer[name]) for layer in layers[:-1])
        for layer, part in zip(layers, mx.split(joined[name], list(ends)), strict=True):
            layer[name] = part
            mx.eval(part)
    return joined


class _SideBySide(nn.Module):
    """The outputs of several linear layers side by side."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers, self.weight = layers, layers[0].weight
        if "scales" in layers[0]:
            self.scales = layers[0].scales

    def __call__(self, x: mx.array) -> mx.array:
        return mx.concatenate([layer(x) for layer in self.layers], -1)


def _fused(function: Callable[..., Any], *constants: Any) -> Callable[..., Any]:
    """`function` of arrays behind its constants, as one launch on a GPU.

    A CPU computes the operations one by one, because MLX would call a C++ compiler there.
    """
    return _compiled(function, *constants) if on_gpu() else partial(function, *constants)


@cache
def _compiled(function: Callable[..., Any], *constants: Any) -> Callable[..., Any]:
    # For each of the few shapes of a step; `products.fused` infers shapes anew in every call.
    return mx.compile(partial(function, *constants))


def _wide(x: mx.array) -> mx.array:
    return x if x.dtype == mx.float64 else x.astype(mx.float32)


def _activated(a: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
    """gelu(a + bias), also in float32."""
    a = nn.gelu(a + bias)
    return a, _wide(a)


def _widened(rows: mx.array, bias: mx.array, scales: mx.array) -> tuple[mx.array, mx.array]:
    """rows + bias, also in float32 and scaled."""
    rows = rows + bias
    return rows, _wide(rows) * scales


def _sum(y: mx.array, bias: mx.array, x: mx.array) -> mx.array:
    return x + (y + bias)


def _gated(s: mx.array, gate: mx.array, bias: mx.array) -> mx.array:
    return s * (gate + bias)


def _finished(
    gamma_max: float,
    f: mx.array,
    mean: mx.array,
    gain: mx.array,
    gain_bias: mx.array,
    *gate: mx.array,
) -> tuple[mx.array, mx.array]:
    """The state f + gamma_max tanh(gain + bias) mean, and in the dtype of f, times the gate."""
    state = _wide(f) + gamma_max * mx.tanh(gain + gain_bias) * mean
    s = state.astype(f.dtype)
    return state, _gated(s, *gate) if gate else s
