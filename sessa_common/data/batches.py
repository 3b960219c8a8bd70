"""Batches of token rows, drawn in NumPy so that every framework sees the same data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

ALL_ROWS = slice(None)


@dataclass(frozen=True)
class Batch:
    """Rows to learn from: inputs, targets int32 (B, T); weights float32 (B, T), 0 for no loss.

    `document_starts` int32 (B, T) is, for each position, the first one of its document in the row;
    None where the documents of a row read each other.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    document_starts: np.ndarray | None = None

    def rows(self, rows: slice) -> Batch:
        """The batch of some of the rows."""
        starts = None if self.document_starts is None else self.document_starts[rows]
        return Batch(self.inputs[rows], self.targets[rows], self.weights[rows], starts)


class BatchSource(Protocol):
    """The data of a training run.

    `batch(i)` depends on i alone, so one integer stores how far a run has read its data; its rows
    are those of all processes, of which each may ask for its part alone. `validation()` gives the
    same rows every time; `fingerprint` changes when any row does.
    """

    fingerprint: str

    @property
    def summary(self) -> str:
        """The data in a few words, for the line that a run begins with."""

    @property
    def notes(self) -> Sequence[str]:
        """Sentences about text that was left out."""

    def batch(self, index: int, rows: slice = ALL_ROWS) -> Batch:
        """The training batch of that number, from 0, or some of its rows; there is no last one."""

    def validation(self) -> Sequence[Batch]:
        """The held-out batches, empty when nothing is held out."""

    def score(self, predicted: Sequence[np.ndarray]) -> dict[str, float]:
        """Entries of a validation record besides the loss, from the ids (B, T) of each batch."""


def next_token_batch(rows: np.ndarray, end_id: int | None = None) -> Batch:
    """Inputs and shifted targets of token rows (B, T+1), every position counted.

    With `end_id` the documents that this token ends are separate: the first token of a document is
    no target.
    """
    rows = rows.astype(np.int32)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    weights = np.ones(targets.shape, np.float32)
    if end_id is None:
        return Batch(inputs, targets, weights)
    weights[inputs == end_id] = 0
    return Batch(inputs, targets, weights, find_document_starts(inputs, end_id))


def batch_arrays(batch: Batch, *, always: bool = False) -> list[np.ndarray]:
    """Inputs, targets and weights of a batch, and the starts of its documents if they matter.

    They do where a row has several documents; `always` gives them wherever the batch has them, so
    that all batches of a run have as many arrays.
    """
    arrays = [batch.inputs, batch.targets, batch.weights]
    starts = batch.document_starts
    if starts is not None and (always or starts.any()):
        arrays.append(starts)
    return arrays


def find_document_starts(ids: np.ndarray, end_id: int) -> np.ndarray:
    """The first position int32 (B, T) of the document of each position of rows (B, T)."""
    starts = np.zeros(ids.shape, np.int32)
    starts[:, 1:] = np.where(ids[:, :-1] == end_id, np.arange(1, ids.shape[1]), 0)
    return np.maximum.accumulate(starts, axis=1)


class EpochOrder:
    """The order in which a run reads a fixed number of examples: each epoch shuffled anew."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch = -1

    def row(self, index: int) -> int:
        """The example that the run reads at that place, counted from 0."""
        epoch, place = divmod(index, self.count)
        if self._epoch != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._order = epoch, rng.permutation(self.count)
        return int(self._order[place])
