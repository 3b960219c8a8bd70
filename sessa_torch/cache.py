"""Caches of decoding: for each layer the rows that attention and feedback read, or a state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sessa_common.config import SessaConfig
from sessa_common.inference.cache_contents import position_axis, require_trimmable

CHUNK = 256


class GrowingBuffer:
    """A tensor that grows along one axis, in a buffer with room for more.

    A buffer that is full is replaced by one of at least 1.5 times its size, so that appending one
    row at a time copies each row a bounded number of times. Booleans behind the rows are True.
    """

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
        if self.length == 0 and not self._takes(new):
            self._make(new, self._rounded(count))
        total = self.length + count
        self._reserve(total)
        assert self.buffer is not None
        self.buffer.narrow(self.axis, self.length, count).copy_(new)
        self.length = total
        return self.buffer.narrow(self.axis, 0, total)

    def _reserve(self, total: int) -> None:
        """Make room for `total` rows, if there are any rows yet."""
        old = self.buffer
        if old is None or old.shape[self.axis] >= total:
            return
        self._make(old, self._rounded(max(total, old.shape[self.axis] * 3 // 2)))
        assert self.buffer is not None
        self.buffer.narrow(self.axis, 0, self.length).copy_(old.narrow(self.axis, 0, self.length))

    def _has_room(self, count: int) -> bool:
        """True if `count` more rows fit into the buffer."""
        return self.buffer is not None and self.buffer.shape[self.axis] >= self.length + count

    def load(self, rows: Tensor) -> None:
        """Replace all rows."""
        self.buffer, self.length = rows, rows.shape[self.axis]

    def _takes(self, new: Tensor) -> bool:
        """True if an empty buffer is there that rows like these can be written to."""
        if self.buffer is None or self.buffer.dtype != new.dtype:
            return False
        pairs = zip(self.buffer.shape, new.shape, strict=True)
        return all(a == b for i, (a, b) in enumerate(pairs) if i != self.axis)

    def _make(self, like: Tensor, capacity: int) -> None:
        shape = list(like.shape)
        shape[self.axis] = capacity
        self.buffer = like.new_ones(shape) if like.dtype == torch.bool else like.new_empty(shape)

    def _rounded(self, count: int) -> int:
        return -(-count // CHUNK) * CHUNK


class SessaLayerCache:
    """One layer's rows: k, v (B, G, P, d) after RoPE, k_fb (B, P, K) and s (B, P, D) float32.

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

    def keep_conv(self, rows: Tensor, count: int) -> None:
        """Keep the last `count` rows of the convolution's input (B, count + T, channels)."""
        self.conv = rows[:, rows.shape[1] - count :]

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
        # True where a token is not padding; empty while there is no padding.
        self.seen = GrowingBuffer(1)
        self.mask: Tensor | None = None  # (B, P), the rows of `seen`
        self.length = 0

    def extend(self, count: int, mask: Tensor | None) -> Tensor | None:
        """Register `count` new positions and return the mask (B, P + count), None without padding.

        A mask covers the past and the new positions, or the new ones alone; without one, new
        positions are visible. Raises ValueError when the mask has another length.
        """
        total, seen = self.length + count, self.seen
        if mask is not None:
            if self.length and mask.shape[1] == count:
                if self.mask is None:
                    seen.append(mask.new_ones(mask.shape[0], self.length, dtype=torch.bool))
            elif mask.shape[1] == total:
                seen.length = 0
            else:
                raise ValueError(
                    f"attention_mask has {mask.shape[1]} columns, "
                    f"expected {self.length} cached + {count} new"
                )
            seen.append(mask.bool())
        elif self.mask is not None:
            seen._reserve(total)
            seen.length = total
        self.mask = seen.rows
        self.length = total
        return self.mask

    def _reserve(self, count: int) -> None:
        """Make room for `count` more positions, where there are any, so that no step has to."""
        for buffer in [*self._buffers(), self.seen]:
            buffer._reserve(self.length + count)

    def _buffers(self) -> list[GrowingBuffer]:
        """The buffers of all layers that hold rows."""
        rows = (held for layer in self.layers for held in vars(layer).values())
        return [x for x in rows if isinstance(x, GrowingBuffer) and x.buffer is not None]

    def trim(self, count: int) -> None:
        """Drop the last `count` positions, which is exact: no row depends on a later position.

        Raises SessaError, before anything is changed, for more positions than are cached, and for
        a part of them when a layer is Mamba-2, whose state cannot be rolled back.
        """
        require_trimmable(self.config, count, self.length)
        self.length -= count
        if self.length == 0:
            self.seen = GrowingBuffer(1)
        elif self.seen.buffer is not None:
            self.seen.length = self.length
            self.seen.buffer[:, self.length :] = True
        self.mask = self.seen.rows
        if count:
            for layer in self.layers:
                layer.trim(self.length)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these sequences of the batch."""
        for layer in self.layers:
            layer.load({name: held[list(rows)] for name, held in layer.tensors().items()})
        if self.mask is not None:
            self._set_mask(self.mask[list(rows)])

    def fork(self, rows: Sequence[int]) -> SessaCache:
        """A copy of these sequences, without leading positions that are padding in all of them."""
        found = SessaCache(self.config)
        if len(rows):
            mask = self._whole_mask()[list(rows)]
            start = int(mask.any(0).int().argmax())
            copied = {name: held[list(rows)] for name, held in self.tensors().items()}
            found.load(
                {name: _skip(name, held, start) for name, held in copied.items()}, mask[:, start:]
            )
        return found

    def join(self, other: SessaCache) -> None:
        """Append the sequences of another cache; the shorter ones get padding on the left."""
        length = max(self.length, other.length)
        (mine, seen), (more, seen_more) = self._padded(length), other._padded(length)
        joined = {name: torch.cat([held, more[name]]) for name, held in mine.items()}
        self.load(joined, torch.cat([seen, seen_more]))

    def _padded(self, length: int) -> tuple[dict[str, Tensor], Tensor]:
        """The tensors and the mask with padding on the left, `length` positions long."""
        count = length - self.length
        padded = {name: _pad(name, held, count) for name, held in self.tensors().items()}
        return padded, F.pad(self._whole_mask(), (count, 0))

    def _whole_mask(self) -> Tensor:
        """The mask (B, P) also where there is no padding."""
        if self.mask is not None:
            return self.mask
        held = next(iter(self.tensors().values()))
        return held.new_ones(len(held), self.length, dtype=torch.bool)

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
        self._set_mask(mask)

    def _set_mask(self, mask: Tensor) -> None:
        self.seen = GrowingBuffer(1)
        self.mask = None if bool(mask.all()) else self.seen.append(mask)


def _skip(name: str, held: Tensor, count: int) -> Tensor:
    """A tensor without its first `count` positions."""
    axis = position_axis(name)
    return held if axis is None else held.narrow(axis, count, held.shape[axis] - count)


def _pad(name: str, held: Tensor, count: int) -> Tensor:
    """A tensor with `count` positions of zeros before its first."""
    axis = position_axis(name)
    if axis is None:
        return held
    return F.pad(held, [0, 0] * (held.ndim - axis - 1) + [count, 0])
