"""Batches of token windows, drawn in NumPy so that every framework sees the same data."""

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
    """Where the trainer takes its rows from.

    `batch(i)` depends on i alone, which makes the data position of a run one integer;
    `validation()` gives the same rows every time; `fingerprint` changes when any row does;
    `summary` says in a few words what is trained on.
    """

    fingerprint: str

    @property
    def summary(self) -> str:
        """What is trained on, in a few words."""

    def batch(self, index: int) -> Batch:
        """The i-th training batch; there is no last one."""

    def validation(self) -> Sequence[Batch]:
        """The held-out batches, empty when nothing is held out."""

    def score(self, predicted: Sequence[np.ndarray]) -> dict[str, float]:
        """What a validation record says besides the loss, from the ids (B, T) of each batch."""


def next_token_batch(rows: np.ndarray) -> Batch:
    """Inputs and shifted targets of token rows (B, T+1), every position counted."""
    rows = rows.astype(np.int32)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    return Batch(inputs, targets, np.ones(targets.shape, np.float32))


class WindowOrder:
    """A shuffled cover of a token stream by windows of `window`+1 tokens, new in every epoch.

    Each epoch starts its windows at another offset, so that rows do not repeat between epochs.
    """

    def __init__(self, length: int, window: int, seed: int) -> None:
        self.window, self.seed = window, seed
        self.count = max((length - 1) // window - 1, 1)
        self.slack = length - 1 - self.count * window
        self._epoch = -1

    def start(self, index: int) -> int:
        """Where the index-th window of the run begins."""
        epoch, place = divmod(index, self.count)
        if self._epoch != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._offset = epoch, int(rng.integers(self.slack + 1))
            self._order = rng.permutation(self.count)
        return self._offset + int(self._order[place]) * self.window
