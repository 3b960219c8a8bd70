"""Caches of decoding: for each layer the rows that attention and feedback read, or a state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sessa_common.config import SessaConfig
from sessa_common.inference.cache_contents import require_trimmable

CHUNK = 256


class GrowingBuffer:
    """A tensor that grows along one axis; it grows by whole chunks, so appending rarely copies."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.length = 0
        self.buffer: Tensor | None = None

    @property
    def rows(self) -> Tensor | None:
        """The rows appended so far, or None when there are none."""
        if self.buffer is None or self.length == 0:
            return None
        return self.buffer.narrow(self.axis, 0, self.length)

    def append(self, new: Tensor) -> Tensor:
        """Add rows and return all of them."""
        count = new.shape[self.axis]
        total = self.length + count
        if self.buffer is None or self.buffer.shape[self.axis] < total:
            shape = list(new.shape)
            shape[self.axis] = -(-total // CHUNK) * CHUNK
            grown = new.new_empty(shape)
            if self.buffer is not None:
                grown.narrow(self.axis, 0, self.length).copy_(
                    self.buffer.narrow(self.axis, 0, self.length)
                )
            self.buffer = grown
        self.buffer.narrow(self.axis, self.length, count).copy_(new)
        self.length = total
        return self.buffer.narrow(self.axis, 0, total)

    def load(self, rows: Tensor) -> None:
        """Replace all rows."""
        self.buffer, self.length = rows, rows.shape[self.axis]


class SessaLayerCache:
    """One layer's rows: k, v (B, G, P, d) after RoPE, k_fb (B, P, D) and s (B, P, D) float32.

    The states stay in float32 in any model dtype: bfloat16 could distinguish only the first 15
    positions of the positional code (Lemma 4.10 at gain 0.76). Without feedback, k_fb and s stay
    empty.
    """

    def __init__(self) -> None:
        self.k, self.v = GrowingBuffer(2), GrowingBuffer(2)
        self.k_fb, self.s = GrowingBuffer(1), GrowingBuffer(1)

    def trim(self, length: int) -> None:
        """Keep the first `length` positions."""
        for rows in vars(self).values():
            rows.length = min(rows.length, length)
            if length == 0:  # The next batch may have another number of rows.
                rows.buffer = None

    def tensors(self) -> dict[str, Tensor]:
        """The rows that are not empty, by name."""
        return {name: held.rows for name, held in vars(self).items() if held.rows is not None}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the rows by those that `tensors` gave."""
        for name, rows in tensors.items():
            getattr(self, name).load(rows)


class Mamba2LayerCache:
    """One Mamba-2 layer's past: conv (B, width-1, channels), and state (B, heads, P, N) float32.

    Both are None before the first token.
    """

    def __init__(self) -> None:
        self.conv: Tensor | None = None
        self.state: Tensor | None = None

    def trim(self, length: int) -> None:
        """Forget everything when length is 0; `SessaCache.trim` refuses any other length."""
        if length == 0:
            self.conv = self.state = None

    def tensors(self) -> dict[str, Tensor]:
        """Both tensors by name; none before the first token."""
        return {name: held for name, held in vars(self).items() if held is not None}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace both tensors."""
        self.conv, self.state = tensors["conv"], tensors["state"]


class SessaCache:
    """The cache of a whole model for inference without gradients; dropping positions is exact."""

    def __init__(self, config: SessaConfig) -> None:
        self.config = config
        self.layers = [
            SessaLayerCache() if kind.attends else Mamba2LayerCache() for kind in config.kinds
        ]
        self.mask: Tensor | None = None  # (B, P), True where a token is not padding
        self.length = 0

    def extend(self, count: int, mask: Tensor | None) -> Tensor | None:
        """Register `count` new positions and return the mask (B, P + count), None without padding.

        A mask covers the past and the new positions, or the new ones alone; without one, new
        positions are visible. Raises ValueError when the mask has another length.
        """
        if mask is not None:
            mask = mask.bool()
            if self.length and mask.shape[1] == count:
                past = mask.new_ones(mask.shape[0], self.length) if self.mask is None else self.mask
                mask = torch.cat([past, mask], 1)
            if mask.shape[1] != self.length + count:
                raise ValueError(
                    f"attention_mask has {mask.shape[1]} columns, "
                    f"expected {self.length} cached + {count} new"
                )
        elif self.mask is not None:
            mask = torch.cat([self.mask, self.mask.new_ones(self.mask.shape[0], count)], 1)
        self.mask = mask
        self.length += count
        return mask

    def trim(self, count: int) -> None:
        """Drop the last `count` positions, which is exact: no row depends on a later position.

        Raises SessaError, before anything is changed, for more positions than are cached, and for
        a part of them when a layer is Mamba-2, whose state cannot be rolled back.
        """
        require_trimmable(self.config, count, self.length)
        self.length -= count
        if self.mask is not None:
            self.mask = self.mask[:, : self.length] if self.length else None
        if count:
            for layer in self.layers:
                layer.trim(self.length)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these sequences of the batch."""
        for layer in self.layers:
            layer.load({name: held[list(rows)] for name, held in layer.tensors().items()})
        mask = None if self.mask is None else self.mask[list(rows)]
        self.mask = None if mask is None or bool(mask.all()) else mask

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of all layers as `cache_contents.cache_shapes` names them, without mask."""
        return {
            f"layers.{i}.{name}": held
            for i, layer in enumerate(self.layers)
            for name, held in layer.tensors().items()
        }

    def load(self, tensors: Mapping[str, Tensor], mask: Tensor) -> None:
        """Replace the contents by those that `tensors` gave and their mask (B, P)."""
        for i, layer in enumerate(self.layers):
            prefix = f"layers.{i}."
            layer.load(
                {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            )
        self.length = mask.shape[1]
        self.mask = None if bool(mask.all()) else mask
