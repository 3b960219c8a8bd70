"""The deal of a sequence's rows to processes: blocks in turn, block i to process i mod size.

Later rows cost more under a causal mask, so every process gets early and late ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# A larger block makes larger products; while its owner solves it, the others wait.
MOST_ROWS = 1024


@dataclass(frozen=True)
class Deal:
    """The rows of a sequence of `length` that the process `rank` of `size` holds, in `block`s.

    A process holds its rows one behind the other; only the last block of the sequence may be
    shorter than the others.
    """

    length: int
    rank: int
    size: int
    block: int

    @classmethod
    def of(cls, length: int, rank: int, size: int) -> Deal:
        """Return the deal with two blocks for every process, or more where they would be large."""
        return cls(length, rank, size, min(MOST_ROWS, -(-length // (2 * size))))

    @property
    def count(self) -> int:
        """The number of blocks of the sequence."""
        return -(-self.length // self.block)

    @cached_property
    def places(self) -> Tensor:
        """The places of the own rows in the sequence, int64."""
        places = torch.arange(self.length)
        return places[places // self.block % self.size == self.rank]

    def height(self, i: int) -> int:
        """Return the number of rows of block i."""
        return min(self.block, self.length - i * self.block)

    def owner(self, i: int) -> int:
        """Return the process that holds block i."""
        return i % self.size

    def owns(self, i: int) -> bool:
        """Return True when this process holds block i."""
        return self.owner(i) == self.rank

    def rows(self, i: int) -> slice:
        """Return the place of block i among the own rows of its owner."""
        first = i // self.size * self.block
        return slice(first, first + self.height(i))

    def rows_through(self, i: int) -> int:
        """Return the number of own rows in blocks 0 to i."""
        return self.rows_before((i + 1) * self.block)

    def rows_before(self, place: int) -> int:
        """Return the number of own rows before a place of the sequence."""
        turns, rest = divmod(min(place, self.length), self.size * self.block)
        return turns * self.block + min(max(rest - self.rank * self.block, 0), self.block)
