"""The order in which a run reads its rows: a function of the seed and the row's number alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sessa_common.errors import SessaError

# Rows of an epoch whose shuffled order is held as an array; longer orders are computed row by row.
LARGEST_ARRAY = 2**22
ROUNDS = 4
WORD = 2**64 - 1
# Rows of a mixture that have exactly the shares of its weights, rounded to whole rows.
PERIOD = 10_000


class RowOrder:
    """The order in which a run reads rows of sequence_length+1 tokens from a packed sequence.

    An epoch reads adjoining rows in shuffled order; neighbours share one token, the last target of
    the one and the first input of the other. Each epoch begins its rows at another offset, so that
    no row comes twice.
    """

    def __init__(self, length: int, sequence_length: int, seed: int) -> None:
        self.sequence_length, self.seed = sequence_length, seed
        self.count = max((length - 1) // sequence_length - 1, 1)
        self.slack = length - 1 - self.count * sequence_length
        self._epoch = -1

    def start(self, index: int) -> int:
        """The place in the packed sequence where the run's row of that number begins."""
        epoch, place = divmod(index, self.count)
        if self._epoch != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._offset = epoch, int(rng.integers(self.slack + 1))
            self._permuted = permutation(self.count, rng)
        return self._offset + self._permuted(place) * self.sequence_length


def permutation(
    count: int, rng: np.random.Generator, largest_array: int = LARGEST_ARRAY
) -> Callable[[int], int]:
    """A random one-to-one map of 0 ... count-1 onto itself, in bounded memory for any count.

    Above `largest_array` it is a Feistel network on the next even number of bits, applied again
    until the result is below count (Black and Rogaway, Ciphers with arbitrary finite domains).
    """
    if count <= largest_array:
        order = rng.permutation(count)
        return lambda place: int(order[place])
    half = -(-(count - 1).bit_length() // 2)
    keys = [int(key) for key in rng.integers(2**63, size=ROUNDS)]

    def permuted(place: int) -> int:
        while True:
            left, right = place >> half, place & ((1 << half) - 1)
            for key in keys:
                left, right = right, left ^ (_mixed(right ^ key) >> (64 - half))
            place = left << half | right
            if place < count:
                return place

    return permuted


def _mixed(x: int) -> int:
    """A 64-bit hash of a 64-bit number, the finalizer of splitmix64."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
    return x ^ x >> 31


class MixtureOrder:
    """The part of a mixture that each row of a run is taken from.

    Of every PERIOD rows each part has the share of its weight, in an order drawn from the seed.
    Raises SessaError when a share is less than one row of a period.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        shares = np.asarray(weights, np.float64) / sum(weights) * PERIOD
        counts = np.floor(shares).astype(int)
        largest = np.argsort(counts - shares, kind="stable")
        counts[largest[: PERIOD - counts.sum()]] += 1
        if counts.min() < 1:
            raise SessaError(
                f"a part of the data has a share of less than 1/{PERIOD:,} of the rows; leave it "
                "out, or give it a larger weight"
            )
        self.counts, self.seed, self._period = counts, seed, -1

    def locate(self, index: int) -> tuple[int, int]:
        """The part of the run's row of that number, and the number of the row within the part."""
        period, place = divmod(index, PERIOD)
        if self._period != period:
            parts = np.repeat(np.arange(len(self.counts)), self.counts)
            # The third number keeps these draws apart from those of RowOrder.
            self._parts = np.random.default_rng([self.seed, period, 1]).permutation(parts)
            self._period = period
        part = int(self._parts[place])
        earlier = int(np.count_nonzero(self._parts[:place] == part))
        return part, period * int(self.counts[part]) + earlier
