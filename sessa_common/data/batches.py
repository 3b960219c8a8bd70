"""Batches of token rows, drawn in NumPy so that every framework sees the same data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Batch:
    """Rows to learn from: inputs, targets int32 (B, T); weights float32 (B, T), 0 for no loss."""

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


class BatchSource(Protocol):
    """The data of a training run.

    `batch(i)` depends on i alone, so one integer stores how far a run has read its data;
    `validation()` gives the same rows every time; `fingerprint` changes when any row does.
    """

    fingerprint: str

    @property
    def summary(self) -> str:
        """The data in a few words, for the line that a run begins with."""

    @property
    def notes(self) -> Sequence[str]:
        """Sentences about text that was left out."""

    def batch(self, index: int) -> Batch:
        """The training batch of that number, from 0; there is no last one."""

    def validation(self) -> Sequence[Batch]:
        """The held-out batches, empty when nothing is held out."""

    def score(self, predicted: Sequence[np.ndarray]) -> dict[str, float]:
        """Entries of a validation record besides the loss, from the ids (B, T) of each batch."""


def next_token_batch(rows: np.ndarray) -> Batch:
    """Inputs and shifted targets of token rows (B, T+1), every position counted."""
    rows = rows.astype(np.int32)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    return Batch(inputs, targets, np.ones(targets.shape, np.float32))


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
            self._order = rng.permutation(self.count)
        return self._offset + int(self._order[place]) * self.sequence_length
