"""Caches of texts that have ended, for prompts that begin alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sessa_common.config import SessaConfig
from sessa_common.inference.cache_contents import cache_shapes
from sessa_common.inference.generation import Decoder, reuse_prefix, shared_prefix


@dataclass(frozen=True)
class _Entry:
    ids: list[int]  # may go on behind what the decoder holds
    decoder: Decoder
    size: int


class PrefixCache:
    """The caches of the latest texts, of at most `limit` bytes in all; 0 keeps none.

    A number counts as four bytes, which is exact in float32 and too much in 16 bits.
    """

    def __init__(self, config: SessaConfig, limit: int) -> None:
        self.config, self.limit = config, limit
        self.entries: list[_Entry] = []  # the latest is the last

    def add(self, ids: Sequence[int], decoder: Decoder, row: int) -> None:
        """Copy the cache of one row of a decoder, which holds the ids or their beginning."""
        if self._size(len(ids)) > self.limit:
            return
        copied = decoder.fork([row])
        held = list(ids[: copied.length])
        # A text that goes on where another one ended takes its place.
        others = [e for e in self.entries if shared_prefix(e.ids, held) < len(e.ids)]
        self.entries = [*others, _Entry(held, copied, self._size(len(held)))]
        while sum(entry.size for entry in self.entries) > self.limit:
            self.entries.pop(0)

    def take(self, prompt: Sequence[int]) -> Decoder | None:
        """Return a decoder that holds as much of a prompt's beginning as any cache; None for none.

        At least one id of the prompt is left to read.
        """
        shared = [self._usable(entry, prompt) for entry in self.entries]
        if not any(shared):
            return None
        best = max(range(len(shared)), key=lambda i: (shared[i], i))
        entry = self.entries.pop(best)
        self.entries.append(entry)  # the latest used leaves last
        decoder = entry.decoder.fork([0])
        reuse_prefix(decoder, entry.ids, prompt)
        return decoder

    def _usable(self, entry: _Entry, prompt: Sequence[int]) -> int:
        """The number of ids that a prompt can take from an entry."""
        shared = shared_prefix(entry.ids, prompt[:-1])
        return shared if shared == len(entry.ids) or entry.decoder.trimmable else 0

    def _size(self, length: int) -> int:
        return 4 * sum(math.prod(shape) for shape in cache_shapes(self.config, 1, length).values())
