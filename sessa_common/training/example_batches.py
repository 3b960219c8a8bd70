"""Batches of examples: one in each row, or several packed into rows of one length."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence

import numpy as np

from sessa_common.config import SessaConfig
from sessa_common.data.batches import ALL_ROWS, Batch, EpochOrder
from sessa_common.data.corpus import (
    check_ids,
    training_sequence_length,
)
from sessa_common.errors import SessaError
from sessa_common.memory import require_memory
from sessa_common.train_config import TrainConfig
from sessa_common.training.examples import Example

# Rows that are not packed are as long as a multiple of this, so that few shapes are compiled.
ROW_STEP = 64
# The order in which examples are dealt out to training and validation, in every run.
SPLIT_SEED = 0


class ExampleBatches:
    """Training and validation batches of examples (a `BatchSource`).

    A row holds one example, filled up with tokens that do not count; with `packing` it holds whole
    examples one after the other, which do not read each other unless `documents` is "joined". An
    example longer than a row loses its end. Without `held_out` examples a part of
    `validation_fraction` is held out.
    Raises SessaError when nothing is left to train on.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        config: SessaConfig,
        settings: TrainConfig,
        held_out: Sequence[Example] | None = None,
    ) -> None:
        self.sequence_length = training_sequence_length(config, settings)
        self.batch_size, self.pad_id = settings.batch_size, config.eos_token_id or 0
        row = self.sequence_length + 1
        # Inputs, targets and their weights take 4 bytes a token each.
        require_memory(12 * row * self.batch_size, f"a batch of {self.batch_size:,} rows")
        self.notes: list[str] = []
        rows = self._cut(examples, config, "the training data")
        if held_out is None:
            rows, validation = _split(rows, settings.validation_fraction)
        else:
            validation = self._cut(held_out, config, "the validation data")
        self.examples, self.tokens = len(rows), sum(len(each.tokens) for each in rows)
        self.packed = settings.packing
        self.separate = settings.packing and settings.documents == "separate"
        self.rows = pack_examples(rows, row) if settings.packing else rows
        self.held_out = validation[: settings.evaluate_batches * self.batch_size]
        self.order = EpochOrder(len(self.rows), settings.seed)
        self.fingerprint = _fingerprint(self.rows, validation)
        if self.separate:
            self.fingerprint += ", separate documents"

    @property
    def summary(self) -> str:
        """The number of examples and of their tokens, and of the rows if they are packed."""
        packed = f" in {len(self.rows):,} rows of {self.sequence_length}" if self.packed else ""
        return f"{self.examples:,} training examples, {self.tokens:,} tokens{packed}"

    def batch(self, index: int, rows: slice = ALL_ROWS) -> Batch:
        """Rows index * batch_size and following of the run's shuffled order, or some of them."""
        first = index * self.batch_size
        numbers = range(first, first + self.batch_size)
        # The length of the rows follows the longest, whichever of them are asked for.
        return self._batch([self.rows[self.order.row(i)] for i in numbers]).rows(rows)

    def validation(self) -> Sequence[Batch]:
        """The held-out examples, one in a row, evaluate_batches batches at most."""
        size = self.batch_size
        return [
            self._batch(self.held_out[i : i + size]) for i in range(0, len(self.held_out), size)
        ]

    def score(self, predicted: Sequence[np.ndarray]) -> dict[str, float]:
        """Nothing: examples have no measure besides the loss."""
        return {}

    def _cut(self, examples: Sequence[Example], config: SessaConfig, what: str) -> list[Example]:
        """Examples cut to the length of a row, those without a counted token left out."""
        row = self.sequence_length + 1
        for example in examples:
            check_ids(example.tokens, config, what)
        cut = [Example(each.tokens[:row], each.counted[:row]) for each in examples]
        long = sum(len(each.tokens) > row for each in examples)
        kept = [each for each in cut if each.counted[1:].any()]
        if long:
            self.notes.append(
                f"{what}: {long:,} of {len(examples):,} examples are longer than a row of "
                f"{self.sequence_length:,} tokens and lose their end"
            )
        if lost := len(cut) - len(kept):
            self.notes.append(f"{what}: {lost:,} examples have no answer in their row; left out")
        if not kept:
            raise SessaError("; ".join([f"{what} has no example to learn from", *self.notes]))
        return kept

    def _batch(self, rows: Sequence[Example]) -> Batch:
        longest = max(len(row.tokens) for row in rows) - 1
        length = -(-longest // ROW_STEP) * ROW_STEP
        length = self.sequence_length if self.packed else min(length, self.sequence_length)
        inputs = np.full((len(rows), length), self.pad_id, np.int32)
        targets, weights = inputs.copy(), np.zeros((len(rows), length), np.float32)
        starts = np.zeros_like(inputs) if self.separate else None
        for i, row in enumerate(rows):
            n = len(row.tokens) - 1
            inputs[i, :n], targets[i, :n] = row.tokens[:-1], row.tokens[1:]
            weights[i, :n] = row.counted[1:]
            if starts is not None and row.starts is not None:
                # The tokens that fill the row up belong to its last example.
                starts[i, :n], starts[i, n:] = row.starts[:n], row.starts[n]
        return Batch(inputs, targets, weights, starts)


def pack_examples(examples: Sequence[Example], row: int) -> list[Example]:
    """Put whole examples into as few rows of at most `row` tokens as best-fit finds.

    The longest come first, each into the row where it leaves the least room. The first token of an
    example does not count, because nothing before it tells what it is.
    """
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].tokens))
    # Rows by the room that is left, and the sizes of room that there are, ascending.
    open_rows: dict[int, list[list[int]]] = {}
    rooms: list[int] = []
    rows: list[list[int]] = []
    for i in order:
        size = len(examples[i].tokens)
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            room, members = row, list[int]()
            rows.append(members)
        else:
            room = rooms[at]
            members = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        members.append(i)
        if (left := room - size) not in open_rows:
            bisect.insort(rooms, left)
            open_rows[left] = []
        open_rows[left].append(members)
    return [_joined([examples[i] for i in members]) for members in rows]


def _joined(examples: Sequence[Example]) -> Example:
    counted = [each.counted & (np.arange(len(each.counted)) > 0) for each in examples]
    sizes = [len(each.tokens) for each in examples]
    starts = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes).astype(np.int32)
    tokens = np.concatenate([each.tokens for each in examples])
    return Example(tokens, np.concatenate(counted), starts)


def _split(examples: list[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """Training and validation examples; the same split whatever the seed of the run."""
    if fraction == 0:
        return examples, []
    count = max(round(len(examples) * fraction), 1)
    if count == len(examples):
        raise SessaError(
            f"there are {len(examples)} examples, too few to hold out {count} for validation; give "
            "more of them, a `validation_fraction` of 0, or `validation_data`"
        )
    order = np.random.default_rng(SPLIT_SEED).permutation(len(examples))
    chosen = set(order[:count].tolist())
    return (
        [each for i, each in enumerate(examples) if i not in chosen],
        [each for i, each in enumerate(examples) if i in chosen],
    )


def _fingerprint(*parts: Sequence[Example]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        for each in part:
            digest.update(len(each.tokens).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(each.tokens, np.int32).data)
            digest.update(np.ascontiguousarray(each.counted).data)
    return digest.hexdigest()
