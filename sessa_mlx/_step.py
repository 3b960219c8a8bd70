"""One token through the model: the step that decoding repeats.

The rows that a token reads are a part of each buffer, and its own rows are written into the buffer
in place. MLX can do so if nothing else reads the buffer by then. Attention and the scores of the
feedback read what was just written. The states must be read before the new one is known, so
`SessaLayerCache` writes it in the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from sessa_mlx._step_layers import HEAD, Position, step_layer
from sessa_mlx.attention import Rope, _rope_from
from sessa_mlx.cache import Mamba2LayerCache, SessaCache, SessaLayerCache
from sessa_mlx.model import SessaForCausalLM

# Rows for which each buffer has room behind those of the next token.
SPARE = HEAD


class TokenStep:
    """Appends one token to the cache of a model, like a call of the model without a mask.

    The layers have the weights of the model as they are when `refresh` is called.
    """

    def __init__(self, model: SessaForCausalLM) -> None:
        self.model = model
        self.weights: list[mx.array] = []
        self.layers: list[Callable[..., mx.array]] = []

    def refresh(self) -> None:
        """Take the weights of the model anew if any was replaced."""
        if any(a is not b for a, b in zip_longest(self.weights, self._model_weights())):
            body = self.model.model
            self.layers = list(map(step_layer, body.layers, self.model.config.kinds))
            self.weights = self._model_weights()

    def _model_weights(self) -> list[mx.array]:
        return list(dict(tree_flatten(self.model.parameters())).values())

    def __call__(self, ids: mx.array, cache: SessaCache) -> mx.array:
        """Append ids (B, 1) to a cache that is not empty and return the logits (B, V), float32.

        Nothing is evaluated; `held_arrays` gives what the cache holds then. After an error the
        layers may hold different numbers of tokens; `undo_unless_kept` repairs that.
        """
        body, config = self.model.model, self.model.config
        _make_room(cache)
        x = body.embed_tokens(ids)
        mask = cache._full_mask(cache.length + 1)
        hidden = 0 if mask is None else (~mask).sum(1).astype(mx.int32)
        position = Position(
            past=cache.length,
            seen=None if mask is None else mask[:, None, None],
            rope=self._rope(cache.length - hidden, x) if config.rotates else None,
        )
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = layer(x, layer_cache, position)
        tied = config.tie_word_embeddings
        head = body.embed_tokens.as_linear if tied else self.model.lm_head
        logits = head(body.norm(x))[:, 0].astype(mx.float32)
        cache.length += 1
        return logits

    def _rope(self, first: mx.array | int, x: mx.array) -> Rope:
        """The rotation of all heads of a token, each as a row of its own: (B * heads, 1, 1, d).

        Heads of values have position 0, so that one operation takes all heads and leaves them as
        they are. first, the token's position, is a number or (B,).
        """
        config = self.model.config
        attending = config.num_attention_heads + config.num_key_value_heads
        heads = np.arange(attending + config.num_key_value_heads)
        turned = mx.array(heads < attending)
        at = mx.where(turned, mx.array(first, dtype=mx.int32)[..., None], 0)
        rope = _rope_from(config, mx.broadcast_to(at, (len(x), len(heads))).flatten(), x)
        if isinstance(rope, tuple):
            # With YaRN, cosines have an amplitude also at position 0.
            cos, sin = rope
            every = mx.tile(turned, len(x))[:, None, None, None]
            rope = mx.where(every, cos, 1), sin
        return rope


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


def _state(layer: SessaLayerCache | Mamba2LayerCache) -> dict[str, Any]:
    return layer.tensors() if isinstance(layer, Mamba2LayerCache) else {}


def held_arrays(cache: SessaCache) -> list[mx.array]:
    """The arrays of a cache, to be evaluated with the logits.

    A cache that is not evaluated would hold a graph that grows with each token.
    """
    return [array for layer in cache.layers for array in layer._arrays() if array is not None]


def _make_room(cache: SessaCache) -> None:
    """Give every buffer room for the next token and the rows behind it.

    The buffers of all layers grow together, so one layer is looked at.
    """
    attending = [layer for layer in cache.layers if isinstance(layer, SessaLayerCache)]
    if not attending or attending[0]._has_room(1 + SPARE):
        return
    for layer in attending:
        layer._reserve(1 + SPARE)
    mx.eval(held_arrays(cache))
    # The old buffers are of a size that no later request has.
    mx.clear_cache()
