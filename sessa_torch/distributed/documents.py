"""Documents in rows that are dealt to several processes: which rows of a block read which keys.

Documents of a row lie one behind the other. So the rows that read any key of an earlier block come
first among those behind it, and first of all those that read every key. Every process knows all
documents, so all agree on the blocks that nobody has to send.

Letters: B batch, m rows of a block, r own rows or keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from sessa_torch.distributed.deal import Deal

# The mask, True where a key is hidden, of a part of the own rows or keys, on a device.
Hide = Callable[[slice, torch.device], Tensor]


class Documents:
    """The documents of the rows of a deal.

    `document_starts` (B, length) has for each place the first one of its document; without it a row
    is one document.
    """

    def __init__(self, deal: Deal, document_starts: Tensor | None = None) -> None:
        self.deal = deal
        if document_starts is None:
            document_starts = torch.zeros(1, deal.length, dtype=torch.int32)
        self.starts = document_starts.cpu().contiguous()
        self.are_several = bool(self.starts.any())

    @cached_property
    def _readers(self) -> list[tuple[int, int]]:
        """For each block the places before which rows read all of its keys, and any of them."""
        first, last = self._bounds
        # Starts rise along a row, so the number of those up to a place is its document's end.
        ends = [
            torch.searchsorted(self.starts, places.repeat(len(self.starts), 1), right=True)
            for places in (first, last)
        ]
        return list(zip(ends[0].amin(0).tolist(), ends[1].amax(0).tolist(), strict=True))

    @cached_property
    def _read(self) -> list[tuple[int, int]]:
        """For each block the places from which keys are read by any of its rows, and by all."""
        first, last = self._bounds
        starts = self.starts
        pairs = zip(
            starts[:, first].amin(0).tolist(), starts[:, last].amax(0).tolist(), strict=True
        )
        return list(pairs)

    @property
    def _bounds(self) -> tuple[Tensor, Tensor]:
        """The first and the last place of each block."""
        first = torch.arange(0, self.deal.length, self.deal.block, dtype=self.starts.dtype)
        return first, (first + self.deal.block).clamp_max(self.deal.length) - 1

    def by_sequence(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield sequences of the batch with equal documents, and the starts (length,) of these."""
        for b, starts in enumerate(self.starts):
            yield slice(b, b + 1) if len(self.starts) > 1 else slice(None), starts

    def is_read(self, i: int) -> bool:
        """Return True when rows behind block i read keys of it."""
        return self._readers[i][1] > i * self.deal.block + self.deal.height(i)

    def reads(self, i: int) -> bool:
        """Return True when rows of block i read keys before it."""
        return self._read[i][0] < i * self.deal.block

    def readers(self, i: int, rows: slice) -> Iterator[tuple[slice, Hide | None]]:
        """Yield those of the own `rows`, all behind block i, that read keys of the block.

        The mask (B, 1, r, m) is that of their scores; rows without one read all keys.
        """
        every, some = map(self.deal.rows_before, self._readers[i])
        if rows.start < min(rows.stop, every):
            yield slice(rows.start, min(rows.stop, every)), None
        if max(rows.start, every) < min(rows.stop, some):
            yield (
                slice(max(rows.start, every), min(rows.stop, some)),
                lambda part, device: _hidden(self._starts(part), self._places(i), device),
            )

    def keys_read(self, i: int, keys: slice) -> Iterator[tuple[slice, Hide | None]]:
        """Yield those of the own `keys`, all before block i, that rows of the block read.

        The mask (B, 1, m, r) is that of the rows' scores; keys without one are read by all rows.
        """
        some, every = map(self.deal.rows_before, self._read[i])
        if max(keys.start, every) < keys.stop:
            yield slice(max(keys.start, every), keys.stop), None
        if max(keys.start, some) < min(keys.stop, every):
            yield (
                slice(max(keys.start, some), min(keys.stop, every)),
                lambda part, device: _hidden(self._starts_in(i), self.deal.places[part], device),
            )

    def hidden_inside(self, i: int, device: torch.device) -> Tensor:
        """Return True (B, 1, m, m) at keys of earlier documents than a row's, all of block i."""
        return _hidden(self._starts_in(i), self._places(i), device)

    def _starts(self, rows: slice) -> Tensor:
        return self.starts[:, self.deal.places[rows]]

    def _starts_in(self, i: int) -> Tensor:
        return self.starts[:, self._places(i)]

    def _places(self, i: int) -> Tensor:
        first = i * self.deal.block
        return torch.arange(first, first + self.deal.height(i))


def _hidden(starts: Tensor, places: Tensor, device: torch.device) -> Tensor:
    """True (B, 1, r, m) where a key's place (m,) is before the start (B, r) of a row's document."""
    starts, places = starts.to(device), places.to(device)
    return (places < starts[..., None])[:, None]
