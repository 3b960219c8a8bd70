"""Caches of decoding: for each layer the rows that attention and feedback read, or a state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from sessa_common.config import SessaConfig
from sessa_common.inference.cache_contents import require_trimmable

CHUNK = 256


class GrowingBuffer:
    """An array that grows along one axis; it grows by whole chunks, so appending rarely copies."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.length = 0
        self.buffer: mx.array | None = None

    @property
    def rows(self) -> mx.array | None:
        """The rows appended so far, or None when there are none."""
        if self.buffer is None or self.length == 0:
            return None
        return self.buffer[self._span(0, self.length)]

    def append(self, new: mx.array) -> mx.array:
        """Add rows and return all of them."""
        total = self.length + new.shape[self.axis]
        if self.buffer is None or self.buffer.shape[self.axis] < total:
            shape = list(new.shape)
            shape[self.axis] = -(-total // CHUNK) * CHUNK - self.length
            room = mx.zeros(shape, dtype=new.dtype)
            old = self.rows
            self.buffer = room if old is None else mx.concatenate([old, room], self.axis)
        self.buffer[self._span(self.length, total)] = new
        self.length = total
        return self.buffer[self._span(0, total)]

    def load(self, rows: mx.array) -> None:
        """Replace all rows."""
        self.buffer, self.length = rows, rows.shape[self.axis]

    def _span(self, start: int, stop: int) -> tuple[slice, ...]:
        return (slice(None),) * self.axis + (slice(start, stop),)


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

    def tensors(self) -> dict[str, mx.array]:
        """The rows that are not empty, by name."""
        return {name: held.rows for name, held in vars(self).items() if held.rows is not None}

    def load(self, tensors: Mapping[str, mx.array]) -> None:
        """Replace the rows by those that `tensors` gave."""
        for name, rows in tensors.items():
            getattr(self, name).load(rows)


class Mamba2LayerCache:
    """One Mamba-2 layer's past: conv (B, width-1, channels), and state (B, heads, P, N) float32.

    Both are None before the first token.
    """

    def __init__(self) -> None:
        self.conv: mx.array | None = None
        self.state: mx.array | None = None

    def trim(self, length: int) -> None:
        """Forget everything when length is 0; `SessaCache.trim` refuses any other length."""
        if length == 0:
            self.conv = self.state = None

    def tensors(self) -> dict[str, mx.array]:
        """Both tensors by name; none before the first token."""
        return {name: held for name, held in vars(self).items() if held is not None}

    def load(self, tensors: Mapping[str, mx.array]) -> None:
        """Replace both tensors."""
        self.conv, self.state = tensors["conv"], tensors["state"]


class SessaCache:
    """The cache of a whole model for inference without gradients; dropping positions is exact."""

    def __init__(self, config: SessaConfig) -> None:
        self.config = config
        self.layers = [
            SessaLayerCache() if kind.attends else Mamba2LayerCache() for kind in config.kinds
        ]
        self.mask: mx.array | None = None  # (B, P), True where a token is not padding
        self.length = 0

    def extend(self, count: int, mask: mx.array | None) -> mx.array | None:
        """Register `count` new positions and return the mask (B, P + count), None without padding.

        A mask covers the past and the new positions, or the new ones alone; without one, new
        positions are visible. Raises ValueError when the mask has another length.
        """
        if mask is not None:
            mask = mask.astype(mx.bool_)
            if self.length and mask.shape[1] == count:
                past = self.mask
                if past is None:
                    past = mx.ones((mask.shape[0], self.length), dtype=mx.bool_)
                mask = mx.concatenate([past, mask], 1)
            if mask.shape[1] != self.length + count:
                raise ValueError(
                    f"attention_mask has {mask.shape[1]} columns, "
                    f"expected {self.length} cached + {count} new"
                )
        elif self.mask is not None:
            new = mx.ones((self.mask.shape[0], count), dtype=mx.bool_)
            mask = mx.concatenate([self.mask, new], 1)
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
            self.mask = self.mask[:, : self.length]
        if count:
            for layer in self.layers:
                layer.trim(self.length)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these sequences of the batch."""
        chosen = mx.array(list(rows))
        for layer in self.layers:
            layer.load({name: held[chosen] for name, held in layer.tensors().items()})
        mask = None if self.mask is None else self.mask[chosen]
        self.mask = None if mask is None or mask.all().item() else mask

    def tensors(self) -> dict[str, mx.array]:
        """The tensors of all layers as `cache_contents.cache_shapes` names them, without mask."""
        return {
            f"layers.{i}.{name}": held
            for i, layer in enumerate(self.layers)
            for name, held in layer.tensors().items()
        }

    def load(self, tensors: Mapping[str, mx.array], mask: mx.array) -> None:
        """Replace the contents by those that `tensors` gave and their mask (B, P)."""
        for i, layer in enumerate(self.layers):
            prefix = f"layers.{i}."
            layer.load(
                {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            )
        self.length = mask.shape[1]
        self.mask = None if mask.all().item() else mask
