"""Sessa's cache inside a cache of transformers, so that `generate` can crop and reorder it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError
from sessa_common.inference.cache_contents import is_trimmable, require_trimmable
from sessa_torch.cache import Mamba2LayerCache, SessaCache, SessaLayerCache


class CacheLayer(CacheLayerMixin):
    """One layer's cache (`held`) under the methods that transformers calls; `keys` stays None.

    Cropping is exact for every layer except Mamba-2. In a model that has one, `crop` raises
    SessaError before any layer is changed.
    """

    is_compileable = False
    supports_early_init = False

    def __init__(self, config: SessaConfig, held: SessaLayerCache | Mamba2LayerCache) -> None:
        super().__init__()
        self.config, self.held, self.length = config, held, 0
        self.is_croppable = is_trimmable(config)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the layer's mixer makes the buffers."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raise SessaError: the layer's mixer writes the cache."""
        raise SessaError("the cache of a Sessa layer is written by its mixer, not by `update`")

    def get_seq_length(self) -> int:
        """The number of cached positions, padding included."""
        return self.length

    def get_max_length(self) -> int:
        """-1, because the cache has no limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of keys that `query_length` new tokens see, and an offset of 0."""
        return self.length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last positions; their number is given as a negative integer."""
        count = -tokens_to_remove
        require_trimmable(self.config, count, self.length)
        self.length -= count
        self.held.trim(self.length)

    def reset(self) -> None:
        """Drop all positions."""
        self.length = 0
        self.held.trim(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences beam_idx (B,) of the batch."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these sequences of the batch."""
        self._replace(lambda rows: rows[indices.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch."""
        self._replace(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Move the rows to the CPU."""
        self._replace(Tensor.cpu)

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        held: Mapping[str, Tensor] = self.held.tensors()
        self.held.load({name: change(rows) for name, rows in held.items()})


def adopt(cache: Cache, config: SessaConfig) -> None:
    """Fill an empty cache of transformers with Sessa's layers; one that has them is left alone.

    Raises SessaError for a cache that another model has filled and for a quantised one.
    """
    layers = cache.layers
    if len(layers) == len(config.kinds) and all(isinstance(x, CacheLayer) for x in layers):
        return
    for layer in layers:
        if type(layer) not in (DynamicLayer, StaticLayer):
            raise SessaError(
                f"past_key_values has a {type(layer).__name__}, expected an empty DynamicCache; "
                "quantised and sliding caches cannot hold Sessa's feedback"
            )
        assert isinstance(layer, CacheLayerMixin)
        if layer.is_initialized and int(layer.get_seq_length()) > 0:
            raise SessaError(
                "past_key_values was filled by another model; give an empty DynamicCache"
            )
    cache.layers = [CacheLayer(config, held) for held in SessaCache(config).layers]
    cache.layer_class_to_replicate = None


def view(cache: Cache, config: SessaConfig) -> SessaCache:
    """The rows of a cache that `adopt` filled as the cache that `SessaModel` takes."""
    found = SessaCache(config)
    found.layers = [layer.held for layer in _layers(cache)]
    found.length = cache.get_seq_length()
    return found


def advance(cache: Cache, count: int) -> None:
    """Count the positions that the model has just appended to the rows."""
    for layer in _layers(cache):
        layer.length += count
        layer.is_initialized = True


def _layers(cache: Cache) -> list[CacheLayer]:
    """The layers that `adopt` put into the cache."""
    return cast(list[CacheLayer], cache.layers)


def visible_mask(mask: Tensor | None) -> Tensor | None:
    """The mask (B, P+T) as booleans, or None when it hides nothing, as fused attention wants it."""
    if mask is None:
        return None
    if mask.ndim != 2:
        raise SessaError(
            f"attention_mask has {mask.ndim} axes, expected 2: (batch, positions), 0 for padding"
        )
    seen = mask != 0
    return None if not torch.compiler.is_compiling() and bool(seen.all()) else seen
