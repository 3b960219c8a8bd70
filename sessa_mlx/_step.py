"""One token through the model as one compiled function.

MLX builds the graph of every evaluation anew, which takes longer than the work of one token. Here
it is built once and used again: buffers keep their shape, the position is an array, and the step
reads a fixed number of rows, of which a mask hides those that are not cached yet. A new graph is
built when that number grows, after `ROWS` tokens.

The buffers are arguments and results of the function. MLX writes a row in place if nothing else
reads the buffer by then. Attention and the scores of the feedback read what was just written. The
states must be read before the new one is known, so it is written in the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from sessa_mlx._step_cache import Position, StepLayerCache, join_projections, on_gpu
from sessa_mlx.attention import _rope_from
from sessa_mlx.cache import GrowingBuffer, Mamba2LayerCache, SessaCache, SessaLayerCache
from sessa_mlx.model import SessaForCausalLM

# The step reads a multiple of this number of rows; fewer where no graph is kept.
ROWS, ROWS_ON_CPU = 256, 32

Arrays = dict[str, Any]
Projection = Callable[[mx.array], mx.array]


class CompiledStep:
    """Appends one token to the cache of a model, like a call of the model without a mask.

    The graph holds the weights of the model as they are when `refresh` is called. On a CPU it is
    built for every token unless `compiled` is given: MLX would call a C++ compiler for every kind
    of fused operation, which takes about a second each.
    """

    def __init__(self, model: SessaForCausalLM, compiled: bool | None = None) -> None:
        self.model = model
        self.compiled = on_gpu() if compiled is None else compiled
        self.weights: list[mx.array] = []
        self.projections: list[Projection | None] = []
        self.rows = 0
        self.run: Callable[..., tuple[mx.array, list[Arrays]]] | None = None
        self.padding: Arrays = {}
        self.padding_of: tuple[Any, int] = (None, 0)

    def refresh(self) -> None:
        """Take the weights of the model anew if any was replaced."""
        if any(a is not b for a, b in zip_longest(self.weights, self._model_weights())):
            self.run = None
            self.projections = [
                join_projections(layer.mixer) if kind.attends else None
                for layer, kind in zip(
                    self.model.model.layers, self.model.config.kinds, strict=True
                )
            ]
            self.weights = self._model_weights()

    def _model_weights(self) -> list[mx.array]:
        return list(dict(tree_flatten(self.model.parameters())).values())

    def __call__(self, ids: mx.array, cache: SessaCache) -> mx.array:
        """Append ids (B, 1) to a cache that is not empty and return the logits (B, V), float32.

        Nothing is evaluated; `held_arrays` gives what the cache holds then.
        """
        _make_room(cache)
        step = ROWS if self.compiled else ROWS_ON_CPU
        rows = -(-(cache.length + 1) // step) * step
        if rows != self.rows or self.run is None:
            self.rows, self.run = rows, mx.compile(self._step) if self.compiled else self._step
        index = mx.array([cache.length], dtype=mx.int32)
        held = [_take(layer) for layer in cache.layers]
        count = 0
        try:
            logits, held = self.run(ids, index, self._padding(cache), held)
            count = 1
        finally:
            # After an error or Ctrl-C the cache is as before.
            for layer, arrays in zip(cache.layers, held, strict=True):
                _put(layer, arrays, count)
            cache.length += count
        return logits

    def _step(
        self, ids: mx.array, index: mx.array, padding: Arrays, layers: list[Arrays]
    ) -> tuple[mx.array, list[Arrays]]:
        body, config = self.model.model, self.model.config
        x = body.embed_tokens(ids)
        first = index - padding["hidden"] if padding else index
        rope = _rope_from(config, first, x) if config.rotates else None
        position = Position.after(index, self.rows, padding.get("mask"), rope)
        held = []
        for layer, arrays, project in zip(body.layers, layers, self.projections, strict=True):
            cache = _inside(arrays, position, project)
            x = layer(x, cache=cache)
            held.append(_outside(cache))
        tied = config.tie_word_embeddings
        head = body.embed_tokens.as_linear if tied else self.model.lm_head
        return head(body.norm(x))[:, 0].astype(mx.float32), held

    def _padding(self, cache: SessaCache) -> Arrays:
        """The mask of the rows that are read and the number of hidden ones, if there are any."""
        if cache.mask is None:
            return {}
        if self.padding_of[0] is not cache.mask or self.padding_of[1] != self.rows:
            B, M = cache.mask.shape
            later = mx.ones((B, self.rows - M), dtype=mx.bool_)
            self.padding = {
                "mask": mx.concatenate([cache.mask, later], 1),
                "hidden": (~cache.mask).sum(1).astype(mx.int32),
            }
            self.padding_of = cache.mask, self.rows
        return self.padding


@contextmanager
def undo_unless_kept(cache: SessaCache) -> Iterator[Callable[[], None]]:
    """Leave the cache as it was unless the block calls what it is given.

    At most one token may be appended meanwhile, also to a layer whose state cannot be rolled back.
    """
    before, states = cache.length, [_state(layer) for layer in cache.layers]
    kept: list[bool] = []
    try:
        yield lambda: kept.append(True)
    finally:
        if not kept:
            cache.length = before
            for layer, state in zip(cache.layers, states, strict=True):
                layer.load(state) if state else layer.trim(before)


def _state(layer: SessaLayerCache | Mamba2LayerCache) -> Arrays:
    return layer.tensors() if isinstance(layer, Mamba2LayerCache) else {}


def held_arrays(cache: SessaCache) -> list[mx.array]:
    """The arrays of a cache, to be evaluated with the logits.

    A cache that is not evaluated would hold a graph that grows with each token.
    """
    return [
        array
        for layer in cache.layers
        for held in vars(layer).values()
        for array in (vars(held).values() if isinstance(held, GrowingBuffer) else [held])
        if isinstance(array, mx.array)
    ]


def _make_room(cache: SessaCache) -> None:
    """Give every buffer room for one more row."""
    grew = False
    for layer in cache.layers:
        if isinstance(layer, SessaLayerCache):
            for held in vars(layer).values():
                if held.length and held._prepare_step():
                    mx.eval(held.buffer)
                    grew = True
    if grew:
        # The old buffers are of a size that no later request has.
        mx.clear_cache()


def _take(layer: SessaLayerCache | Mamba2LayerCache) -> Arrays:
    """Take the arrays out of a layer's cache, so that the step alone holds them."""
    arrays: Arrays = {}
    if isinstance(layer, Mamba2LayerCache):
        arrays |= layer.tensors()
        layer.conv = layer.state = None
        return arrays
    for name, held in vars(layer).items():
        if held.length:
            arrays[name], held.buffer = held.buffer, None
    if layer.s.length:
        arrays["newest"], layer.s.pending = layer.s.pending, None
    return arrays


def _put(layer: SessaLayerCache | Mamba2LayerCache, arrays: Arrays, count: int) -> None:
    """Put arrays with `count` more rows into a layer's cache."""
    if isinstance(layer, Mamba2LayerCache):
        layer.load(arrays)
        return
    layer.s.pending = arrays.get("newest")
    for name, held in vars(layer).items():
        if name in arrays:
            held.buffer = arrays[name]
            held.length += count


def _inside(
    arrays: Arrays, position: Position, project: Projection | None
) -> StepLayerCache | Mamba2LayerCache:
    """The arrays of `_take` as the cache that a mixer gets inside the step."""
    if project is None:
        cache = Mamba2LayerCache()
        cache.load(arrays)
        return cache
    buffers = dict(arrays)
    return StepLayerCache(buffers, buffers.pop("newest", None), position, project)


def _outside(cache: StepLayerCache | Mamba2LayerCache) -> Arrays:
    """The arrays of a cache after a step, as the function's result."""
    if isinstance(cache, Mamba2LayerCache):
        return cache.tensors()
    return cache.buffers if cache.newest is None else {**cache.buffers, "newest": cache.newest}
