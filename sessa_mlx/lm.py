"""Sessa as a model of mlx-lm, whose commands load it through the `model_file` of a folder.

mlx-lm keeps its own caches: it merges, pads, trims, copies and saves them by their class. So the
rows of a layer lie in these, and the model reads them through views that look like `SessaCache`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx import nn

from sessa_common.checkpoint.folder import channels_first
from sessa_common.checkpoint.stored_types import is_exact
from sessa_common.config import SessaConfig
from sessa_common.extras import install
from sessa_common.layer_kinds import OLD_KEYS
from sessa_mlx._linear import Linear, adds_bias_apart
from sessa_mlx.model import SessaForCausalLM

try:
    from mlx_lm.models.cache import ArraysCache, CacheList, KVCache
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; {install('mlx-lm')}", name=error.name) from None


class ModelArgs(SessaConfig):
    """The configuration of a model, read as mlx-lm gives it."""

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], where: str = "config.json") -> ModelArgs:
        """Read the keys that describe the model; mlx-lm and its commands add keys of their own.

        Raises SessaError when the values cannot make a model.
        """
        fields = {field.name for field in dataclasses.fields(SessaConfig)}
        names = fields | {"rope_parameters", "torch_dtype", *OLD_KEYS}
        known = {name: value for name, value in given.items() if name in names}
        # mlx-lm stops at the ids of generation_config.json itself, which may be several.
        if isinstance(known.get("eos_token_id"), list):
            del known["eos_token_id"]
        return super().from_dict(known, where)  # type: ignore[return-value]


class Model(SessaForCausalLM):
    """The language model, called as mlx-lm calls its own models."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        self.args = args
        self.model_type = args.model_type
        if not adds_bias_apart():
            _make_plain(self)

    def __call__(  # type: ignore[override]
        self,
        inputs: mx.array,  # (B, T)
        cache: Sequence[Any] | None = None,
    ) -> mx.array:
        """Logits (B, T, V) for token ids (B, T) behind those in a cache of `make_cache`."""
        if cache is None or cache[0] is None:
            return super().__call__(inputs)
        view: Any = _CacheView(cache, self.config.hidden_size)
        logits = super().__call__(inputs, cache=view)
        view.advance(inputs.shape[1])
        return logits

    @property
    def layers(self) -> list[Any]:
        """The layers, of which mlx-lm trains the last ones."""
        return self.model.layers

    def make_cache(self) -> list[Any]:
        """Make an empty cache: one of mlx-lm's cache objects for each layer.

        An attention layer has keys and values in the first pair of a list; the second pair has the
        feedback's keys and states. A Mamba-2 layer has the rows of its convolution and its state.
        """
        return [
            CacheList(*(KVCache() for _ in range(1 + kind.feeds_back)))
            if kind.attends
            else ArraysCache(2)
            for kind in self.config.kinds
        ]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Bring convolutions into the layout of this model, whichever the file has."""
        return channels_first(weights)  # type: ignore[arg-type,return-value]

    @property
    def cast_predicate(self) -> Callable[[str], bool]:
        """Return whether `mlx_lm.convert --dtype` may cast a parameter; gains and decays stay."""
        return lambda name: not is_exact(name)


def _make_plain(model: nn.Module) -> None:
    """Turn every `Linear` into the `nn.Linear` that it equals here.

    `mlx_lm.gptq` quantises layers of exactly this class.
    """
    for module in model.modules():
        if type(module) is Linear:
            object.__setattr__(module, "__class__", nn.Linear)


class _CacheView:
    """The caches of all layers as `SessaModel` reads them from a `SessaCache`."""

    def __init__(self, held: Sequence[Any], width: int) -> None:
        self.layers = [
            _LayerView(width, *entry.caches) if isinstance(entry, CacheList) else _StateView(entry)
            for entry in held
        ]
        self.attention = next((entry[0] for entry in held if isinstance(entry, CacheList)), None)
        self.states = [entry for entry in held if isinstance(entry, ArraysCache)]

    @property
    def length(self) -> int:
        """The number of cached positions, padding included; 0 when no layer has positions."""
        return 0 if self.attention is None else int(self.attention.size())

    def extend(self, count: int, mask: None) -> mx.array | None:
        """The mask (B, P + count) of the cached and the new positions, None without padding.

        mlx-lm pads prompts on the right while it reads them, and moves the padding to the left
        afterwards. Only a state must not read padding on the right: no token attends to it.
        """
        past = self.length
        padding = getattr(self.attention, "left_padding", None)
        seen = None if padding is None else mx.arange(past + count) >= padding[:, None]
        new = self.states[0].make_mask(count) if self.states else None
        if new is None:
            return seen
        new = mx.concatenate([mx.ones((len(new), past), dtype=mx.bool_), new], 1)
        return new if seen is None else seen & new

    def advance(self, count: int) -> None:
        """Tell the caches that count their positions apart from their rows of new positions."""
        for entry in self.states:
            entry.advance(count)


class _LayerView:
    """The rows of an attention layer as its mixer reads them from a `SessaLayerCache`.

    width is that of the states, which the feedback's keys need not have.
    """

    def __init__(self, width: int, attention: Any, feedback: Any = None) -> None:
        self.kv = _Rows(attention)
        self.k_fb = _Keys(feedback, width)
        self.s = _Values(feedback)

    def _append_heads(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        k, v = self.kv.pair.update_and_fetch(k, v)
        return k, v


class _Rows:
    """Rows of a pair of mlx-lm, whose arrays (B, heads, P, width) have one head for feedback."""

    def __init__(self, pair: Any) -> None:
        self.pair = pair

    @property
    def length(self) -> int:
        """The number of rows."""
        return int(self.pair.size())


class _Keys(_Rows):
    def __init__(self, pair: Any, width: int) -> None:
        super().__init__(pair)
        self.width = width  # of the values of the pair

    def append(self, new: mx.array) -> mx.array:
        """Add rows and return all; the values of the pair have zeros until they are appended."""
        zeros = mx.zeros((len(new), 1, new.shape[1], self.width), new.dtype)
        rows: mx.array = self.pair.update_and_fetch(new[:, None], zeros)[0][:, 0]
        return rows


class _Values(_Rows):
    @property
    def rows(self) -> mx.array | None:
        """The rows appended so far, or None when there are none."""
        return self._all() if self.length else None

    def append(self, new: mx.array) -> mx.array:
        """Replace the zeros that the last keys came with, and return all rows."""
        end = self.length
        self.pair.values[..., end - new.shape[-2] : end, :] = new[:, None]
        return self._all()

    def _all(self) -> mx.array:
        rows: mx.array = self.pair.keys_and_values()[1][:, 0]
        return rows


class _StateView:
    """The past of a Mamba-2 layer as its mixer reads it from a `Mamba2LayerCache`."""

    def __init__(self, held: ArraysCache) -> None:
        self.held = held

    @property
    def conv(self) -> mx.array | None:
        return self.held[0]

    @property
    def state(self) -> mx.array | None:
        return self.held[1]

    @state.setter
    def state(self, state: mx.array) -> None:
        self.held[1] = state

    def keep_conv(self, rows: mx.array, count: int) -> None:
        """Keep `count` of rows (B, count + T, channels): those before a row's padding."""
        T = rows.shape[1] - count
        if self.held.lengths is None:
            self.held[0] = rows[:, T:]
            return
        first = mx.clip(self.held.lengths, 0, T)[:, None]
        chosen = first + mx.arange(count)
        self.held[0] = mx.take_along_axis(rows, chosen[..., None], axis=1)
