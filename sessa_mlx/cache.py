"""Caches of decoding: for each layer the rows that attention and feedback read, or a state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from sessa_common.config import SessaConfig
from sessa_common.inference.cache_contents import position_axis, require_trimmable

# A buffer has room for a multiple of this number of rows.
CHUNK = 256
# A full buffer grows by this factor, so that growing costs little per row.
GROWTH = 1.5


class GrowingBuffer:
    """An array that grows along one axis, by half of its size at a time.

    Rows that are hidden, were dropped or were never appended are zero: a weight of 0 hides zeros,
    but neither NaN nor infinity.
    """

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
        count = new.shape[self.axis]
        if self.buffer is None:
            self.buffer = self._empty(new, 0)
        self._reserve(count)
        self.buffer[self._span(self.length, self.length + count)] = new
        self.length += count
        return self.buffer[self._span(0, self.length)]

    def load(self, rows: mx.array) -> None:
        """Replace all rows."""
        self.buffer, self.length = rows, rows.shape[self.axis]

    def _has_room(self, count: int) -> bool:
        """Return True if `count` more rows fit into the buffer."""
        return self.buffer is not None and self.length + count <= self.buffer.shape[self.axis]

    def _reserve(self, count: int) -> None:
        """Make room for `count` more rows."""
        assert self.buffer is not None
        if not self._has_room(count):
            room, needed = self.buffer.shape[self.axis], _whole_chunks(self.length + count)
            more = max(needed, _whole_chunks(int(GROWTH * room))) - room
            self.buffer = mx.concatenate([self.buffer, self._empty(self.buffer, more)], self.axis)

    def _drop(self, length: int) -> None:
        """Drop all but the first `length` rows."""
        if length == 0:  # The next batch may have another number of rows.
            self.buffer, self.length = None, 0
        elif self.buffer is not None and length < self.length:
            self.buffer[self._span(length, self.length)] = 0
            self.length = length

    def _empty(self, like: mx.array, size: int) -> mx.array:
        shape = (*like.shape[: self.axis], size, *like.shape[self.axis + 1 :])
        return mx.zeros(shape, dtype=like.dtype)

    def _span(self, start: int, stop: int) -> tuple[slice, ...]:
        return (slice(None),) * self.axis + (slice(start, stop),)


def _hide_rows(rows: mx.array, mask: mx.array | None) -> mx.array:
    """Zero the rows (B, T, D) or (B, G, T, d) that the last T columns of a mask (B, S) hide."""
    if mask is None:
        return rows
    mask = mask[:, -rows.shape[-2] :, None]
    return mx.where(mask[:, None] if rows.ndim == 4 else mask, rows, 0)


def _whole_chunks(rows: int) -> int:
    return -(-rows // CHUNK) * CHUNK


class _StateBuffer(GrowingBuffer):
    """The states of a layer; those appended last are written when the next ones are asked for.

    The solve reads the past states and gives the new ones. Writing these in the same evaluation
    would copy the buffer, because MLX writes in place only what nothing else reads.
    """

    def __init__(self, axis: int) -> None:
        super().__init__(axis)
        self.pending: mx.array | None = None  # the last rows, counted in `length`

    @property
    def rows(self) -> mx.array | None:
        """The rows appended so far, or None when there are none."""
        self._write()
        return super().rows

    def append(self, new: mx.array) -> mx.array:
        """Add rows and return them, without those before."""
        self._write()
        self.pending = new
        self.length += new.shape[self.axis]
        return new

    def load(self, rows: mx.array) -> None:
        """Replace all rows."""
        self.pending = None
        super().load(rows)

    def _reserve(self, count: int) -> None:
        self._write()
        super()._reserve(count)

    def _write(self) -> None:
        if self.pending is not None:
            new, self.pending = self.pending, None
            self.length -= new.shape[self.axis]
            super().append(new)

    def _drop(self, length: int) -> None:
        self._write()
        super()._drop(length)


class SessaLayerCache:
    """One layer's rows: kv (2, B, G, P, d), k_fb (B, P, K) and s (B, P, D) float32.

    kv are the keys after RoPE and the values; both rows of a token are written at once. The states
    stay in float32 in any model dtype: bfloat16 could distinguish only the first 15 positions of
    the positional code (Lemma 4.10 at gain 0.76). The feedback's keys have the values of the
    model's dtype, but are held in float32 too: MLX has no product of 16-bit numbers with a float32
    result, and converting all keys for every token would read more bytes than it saves. Without
    feedback, k_fb and s stay empty.
    """

    def __init__(self) -> None:
        self.kv = GrowingBuffer(3)
        self.k_fb, self.s = GrowingBuffer(1), _StateBuffer(1)

    def _append_heads(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Add keys and values (B, G, T, d) and return those of all positions."""
        k, v = self.kv.append(mx.stack([k, v]))
        return k, v

    def trim(self, length: int) -> None:
        """Keep the first `length` positions."""
        for held in vars(self).values():
            held._drop(length)

    def _has_room(self, count: int) -> bool:
        """Return True if `count` more rows fit into the buffers that hold any."""
        return all(held._has_room(count) for held in vars(self).values() if held.length)

    def _arrays(self) -> tuple[mx.array | None, ...]:
        """All arrays that are held; None for one that is empty."""
        return self.kv.buffer, self.k_fb.buffer, self.s.buffer, self.s.pending

    def _reserve(self, count: int) -> None:
        """Make room for `count` more rows in the buffers that hold any."""
        for held in vars(self).values():
            if held.length:
                held._reserve(count)

    def tensors(self) -> dict[str, mx.array]:
        """The rows that are not empty, by name; all but `s` in the dtype of the model."""
        if self.kv.rows is None:
            return {}
        k, v = self.kv.rows
        found = {"k": k, "v": v}
        if self.k_fb.rows is not None and self.s.rows is not None:
            found |= {"k_fb": self.k_fb.rows.astype(k.dtype), "s": self.s.rows}
        return found

    def load(self, tensors: Mapping[str, mx.array]) -> None:
        """Replace the rows by those that `tensors` gave."""
        if not tensors:
            return
        self.kv.load(mx.stack([tensors["k"], tensors["v"]]))
        if "s" in tensors:
            keys = tensors["k_fb"]
            self.k_fb.load(keys if keys.dtype == mx.float64 else keys.astype(mx.float32))
            self.s.load(tensors["s"])


class Mamba2LayerCache:
    """One Mamba-2 layer's past: conv (B, width-1, channels), and state (B, heads, P, N) float32.

    Both are None before the first token.
    """

    def __init__(self) -> None:
        self.conv: mx.array | None = None
        self.state: mx.array | None = None

    def _arrays(self) -> tuple[mx.array | None, ...]:
        """All arrays that are held; None for one that is empty."""
        return self.conv, self.state

    def keep_conv(self, rows: mx.array, count: int) -> None:
        """Keep the last `count` rows of the convolution's input (B, count + T, channels)."""
        self.conv = rows[:, rows.shape[1] - count :]

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
        # (B, M), True where a token is not padding; the positions from M on are no padding.
        self.mask: mx.array | None = None
        self.length = 0

    def extend(self, count: int, mask: mx.array | None) -> mx.array | None:
        """Register `count` new positions and return the mask (B, P + count), None without padding.

        A mask covers the past and the new positions, or the new ones alone; without one, new
        positions are visible. Raises ValueError when the mask has another length.
        """
        if mask is not None:
            mask = mask.astype(mx.bool_)
            if self.length and mask.shape[1] == count:
                past = self._full_mask(self.length)
                if past is None:
                    past = mx.ones((mask.shape[0], self.length), dtype=mx.bool_)
                mask = mx.concatenate([past, mask], 1)
            if mask.shape[1] != self.length + count:
                raise ValueError(
                    f"attention_mask has {mask.shape[1]} columns, "
                    f"expected {self.length} cached + {count} new"
                )
        else:
            mask = self._full_mask(self.length + count)
        self.mask = mask
        self.length += count
        return mask

    def _full_mask(self, columns: int) -> mx.array | None:
        """The mask (B, columns), None without padding."""
        if self.mask is None:
            return None
        B, M = self.mask.shape
        if columns == M:
            return self.mask
        return mx.concatenate([self.mask, mx.ones((B, columns - M), dtype=mx.bool_)], 1)

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
        chosen = mx.array(list(rows))
        for layer in self.layers:
            layer.load({name: held[chosen] for name, held in layer.tensors().items()})
        mask = None if self.mask is None else self.mask[chosen]
        self.mask = None if mask is None or mask.all().item() else mask

    def fork(self, rows: Sequence[int]) -> SessaCache:
        """A copy of these sequences, without leading positions that are padding in all of them."""
        found = SessaCache(self.config)
        if len(rows):
            chosen = mx.array(list(rows))
            mask = self._whole_mask()[chosen]
            start = np.array(mask.any(0)).argmax().item()
            copied = {name: held[chosen] for name, held in self.tensors().items()}
            found.load(
                {name: _skip(name, held, start) for name, held in copied.items()}, mask[:, start:]
            )
        return found

    def join(self, other: SessaCache) -> None:
        """Append the sequences of another cache; the shorter ones get padding on the left."""
        length = max(self.length, other.length)
        (mine, seen), (more, seen_more) = self._padded(length), other._padded(length)
        joined = {name: mx.concatenate([held, more[name]]) for name, held in mine.items()}
        self.load(joined, mx.concatenate([seen, seen_more]))

    def _padded(self, length: int) -> tuple[dict[str, mx.array], mx.array]:
        """The arrays and the mask with padding on the left, `length` positions long."""
        count = length - self.length
        padded = {name: _pad(name, held, count) for name, held in self.tensors().items()}
        return padded, mx.pad(self._whole_mask(), [(0, 0), (count, 0)])

    def _whole_mask(self) -> mx.array:
        """The mask (B, P) also where there is no padding."""
        mask = self._full_mask(self.length)
        if mask is None:
            B = len(next(iter(self.tensors().values())))
            mask = mx.ones((B, self.length), dtype=mx.bool_)
        return mask

    def tensors(self) -> dict[str, mx.array]:
        """The tensors of all layers as `cache_contents.cache_shapes` names them, without mask."""
        return {
            f"layers.{i}.{name}": held
            for i, layer in enumerate(self.layers)
            for name, held in layer.tensors().items()
        }

    def load(self, tensors: Mapping[str, mx.array], mask: mx.array) -> None:
        """Replace the contents by those that `tensors` gave and their mask (B, P)."""
        self.length = mask.shape[1]
        self.mask = None if mask.all().item() else mask
        for i, layer in enumerate(self.layers):
            prefix = f"layers.{i}."
            own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            if isinstance(layer, SessaLayerCache) and self.mask is not None:
                own = {name: _hide_rows(rows, mask) for name, rows in own.items()}
            layer.load(own)


def _skip(name: str, held: mx.array, count: int) -> mx.array:
    """An array without its first `count` positions."""
    axis = position_axis(name)
    return held if axis is None else held[(slice(None),) * axis + (slice(count, None),)]


def _pad(name: str, held: mx.array, count: int) -> mx.array:
    """An array with `count` positions of zeros before its first."""
    axis = position_axis(name)
    if axis is None:
        return held
    return mx.pad(held, [(count if i == axis else 0, 0) for i in range(held.ndim)])
