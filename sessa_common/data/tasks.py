"""Synthetic tasks: examples with loss weights, the folder that stores them, and their batches.

The tasks themselves are `symbolsoup.py` and `mqar.py`; `task_registry.py` lists them by name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from sessa_common.checkpoint.folder import read_safetensors, write_safetensors
from sessa_common.config import SessaConfig
from sessa_common.data.batches import ALL_ROWS, Batch, EpochOrder
from sessa_common.errors import SessaError
from sessa_common.storage import new_folder, write_json
from sessa_common.train_config import TrainConfig

SPLITS = ("train", "validation", "test")
TASK = "task.json"
METADATA = "metadata."
# Before version 0.2 the tensors of `Examples.metadata` were stored under this prefix.
OLD_METADATA = "facts."
# Maps token ids (B, T) to the likeliest next ids (B, T), in any framework.
Predict = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Examples:
    """N examples of a task, padded to T tokens."""

    tokens: np.ndarray  # (N, T) int32, 0 after the end of an example
    weights: np.ndarray  # (N, T) float32, 1 where the token is a target of the loss, else 0
    metadata: dict[str, np.ndarray]  # by name, first axis N; the task measures answers with it

    def first(self, count: int) -> Examples:
        """Return the first `count` examples."""
        metadata = {name: value[:count] for name, value in self.metadata.items()}
        return Examples(self.tokens[:count], self.weights[:count], metadata)


class Task(Protocol):
    """A frozen dataclass whose fields are the task's options; it draws and measures examples.

    An endless task has `train_examples` 0 and draws every batch anew. The first token of the
    vocabulary is the padding. `context` is the length of the longest example of any split.
    `easy_options` are "name=value" options that make the task so easy that every working model
    learns it; `sessa compare` trains such a control.
    """

    name: ClassVar[str]
    easy_options: ClassVar[tuple[str, ...]]

    @property
    def train_examples(self) -> int:
        """Number of training examples; 0 for an endless task."""

    @property
    def validation_examples(self) -> int:
        """Number of held-out examples."""

    @property
    def test_examples(self) -> int:
        """Number of test examples."""

    @property
    def data_seed(self) -> int:
        """Seed of the examples."""

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Text of each token, in the order of the ids."""

    @property
    def context(self) -> int:
        """Length of the longest example, in tokens."""

    def make(self, split: str, count: int, seed: Sequence[int]) -> Examples:
        """Draw `count` examples of a split; the same seed gives the same examples."""

    def measure(self, examples: Examples, predicted: np.ndarray) -> dict[str, Any]:
        """Return the accuracy and the task's other measures of the predicted ids (N, T)."""


def require(task: Task, option: str, holds: bool, expected: str) -> None:
    """Raise SessaError, naming the option of the task and its value, unless the condition holds."""
    if not holds:
        given = getattr(task, option)
        raise SessaError(f"{task.name}: {option} is {given!r}; it must be {expected}")


@dataclass(frozen=True)
class TaskData:
    """The examples of a task for one run; `train` is None for an endless task."""

    task: Task
    train: Examples | None
    validation: Examples
    test: Examples

    @property
    def fingerprint(self) -> str:
        """Hash of the options, the tokens and the weights."""
        about = json.dumps([self.task.name, options_of(self.task)])
        digest = hashlib.blake2b(about.encode(), digest_size=16)
        for part in (self.train, self.validation, self.test):
            if part is not None:
                for array in (part.tokens, part.weights):
                    digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def options_of(task: Task) -> dict[str, Any]:
    """Return the task's options by name."""
    fields: Any = task
    return dataclasses.asdict(fields)


def make_data(task: Task, train_examples: int | None = None) -> TaskData:
    """Draw all splits; `train_examples` gives an endless task a fixed training set.

    Raises SessaError for a number below 1 and for a task that has a training set already.
    """
    if train_examples is not None:
        _check_train_examples(task, train_examples)
    counts = (train_examples or task.train_examples, task.validation_examples, task.test_examples)
    parts = [
        task.make(split, count, [task.data_seed, i]) if count else None
        for i, (split, count) in enumerate(zip(SPLITS, counts, strict=True))
    ]
    assert parts[1] is not None and parts[2] is not None
    return TaskData(task, parts[0], parts[1], parts[2])


def _check_train_examples(task: Task, train_examples: int) -> None:
    if train_examples < 1:
        raise SessaError(f"`train_examples` is {train_examples}, expected 1 or more")
    if task.train_examples:
        raise SessaError(
            f"{task.name} has a training set; set its size with the task option "
            f"train_examples={train_examples}"
        )


def write_task(
    task: Task, folder: Path, train_examples: int | None = None, *, force: bool = False
) -> TaskData:
    """Draw all splits as `make_data` does, write them into a new folder and return them.

    Raises SessaError, before anything is drawn, for an endless task without `train_examples`.
    """
    if not task.train_examples and train_examples is None:
        raise SessaError(f"{task.name} is endless: give the number of `train_examples`")
    data = make_data(task, train_examples)
    write_data(data, folder, force=force)
    return data


def write_data(data: TaskData, folder: Path, *, force: bool = False) -> None:
    """Write task.json and one safetensors file per split into a new folder."""
    if data.train is None:
        raise SessaError(f"{data.task.name} is endless: give the number of `train_examples`")
    with new_folder(folder, force=force) as scratch:
        for split, part in zip(SPLITS, (data.train, data.validation, data.test), strict=True):
            arrays = {"tokens": part.tokens, "weights": part.weights}
            arrays |= {f"{METADATA}{name}": value for name, value in part.metadata.items()}
            write_safetensors(scratch / f"{split}.safetensors", arrays)
        stored = {
            "task": data.task.name,
            "options": options_of(data.task),
            "vocabulary": list(data.task.vocabulary),
        }
        write_json(scratch / TASK, stored)


def read_examples(path: Path, task: Task) -> Examples:
    """Read a split that `write_data` wrote; SessaError when it does not fit the task."""
    arrays = read_safetensors(path)
    if missing := {"tokens", "weights"} - arrays.keys():
        raise SessaError(f"{path}: no tensor {sorted(missing)[0]}; make the data again")
    tokens, weights = arrays["tokens"], arrays["weights"]
    whole = tokens.ndim == 2 and tokens.size > 0 and weights.shape == tokens.shape
    if not whole or tokens.shape[1] > task.context:
        raise SessaError(
            f"{path}: tokens {tokens.shape} and weights {weights.shape} are not rows of up to "
            f"{task.context} tokens; make the data again"
        )
    if tokens.min() < 0 or tokens.max() >= len(task.vocabulary):
        raise SessaError(f"{path}: a token is not in the vocabulary; make the data again")
    metadata = {
        name.removeprefix(prefix): value
        for prefix in (METADATA, OLD_METADATA)
        for name, value in arrays.items()
        if name.startswith(prefix)
    }
    return Examples(tokens, weights, metadata)


class TaskBatches:
    """Training, validation and test batches of a task (a `BatchSource`).

    Every training row is as long as the longest, so that all batches have one shape. Raises
    SessaError when the model has fewer positions or fewer tokens than the task needs.
    """

    def __init__(self, data: TaskData, config: SessaConfig, settings: TrainConfig) -> None:
        task = data.task
        # The last token of an example is a target only, so the model never reads it.
        if task.context - 1 > config.max_position_embeddings:
            raise SessaError(
                f"{task.name} has examples of {task.context} tokens, but the model has "
                f"max_position_embeddings {config.max_position_embeddings}; choose a larger "
                "`max_position_embeddings`, or make shorter examples by `task_options`"
            )
        if len(task.vocabulary) > config.vocab_size:
            raise SessaError(
                f"{task.name} has {len(task.vocabulary)} tokens, but the model's embedding has "
                f"vocab_size {config.vocab_size} rows"
            )
        self.data, self.batch_size, self.seed = data, settings.batch_size, settings.seed
        if data.train is not None:
            self.order = EpochOrder(len(data.train.tokens), settings.seed)
        self.fingerprint = data.fingerprint
        self.held_out = data.validation.first(settings.evaluate_batches * settings.batch_size)
        self.notes: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """Name of the task and size of its training set."""
        count = "endless" if self.data.train is None else f"{len(self.data.train.tokens):,}"
        return f"{self.data.task.name}, {count} training examples"

    def batch(self, index: int, rows: slice = ALL_ROWS) -> Batch:
        """Return batch `index` of the run's shuffled order; an endless task draws it anew."""
        task, train = self.data.task, self.data.train
        if train is None:
            made = task.make("train", self.batch_size, [task.data_seed, 0, self.seed, index])
            return as_batch(made, rows)
        first = index * self.batch_size
        numbers = range(first, first + self.batch_size)[rows]
        return as_batch(train, [self.order.row(i) for i in numbers])

    def validation(self) -> Sequence[Batch]:
        """Return the first `evaluate_batches` batches of the held-out examples."""
        return self._batches(self.held_out)

    def score(self, predicted: Sequence[np.ndarray]) -> dict[str, float]:
        """Return the share of held-out targets that the ids (B, T) of each batch predict."""
        part = self.held_out
        hits = (_at_targets(predicted) == part.tokens) * part.weights
        return {"validation_accuracy": float(hits.sum() / part.weights.sum())}

    def test(self, predict: Predict) -> dict[str, Any]:
        """Return the task's measures on its test examples."""
        part = self.data.test
        predicted = [predict(batch.inputs) for batch in self._batches(part)]
        try:
            return self.data.task.measure(part, _at_targets(predicted))
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise SessaError(
                f"{self.data.task.name}: the test examples cannot be measured, so their metadata "
                f"is damaged; make the data again ({error})"
            ) from None

    def _batches(self, part: Examples) -> list[Batch]:
        return [
            as_batch(part, slice(i, i + self.batch_size))
            for i in range(0, len(part.tokens), self.batch_size)
        ]


def _at_targets(predicted: Sequence[np.ndarray]) -> np.ndarray:
    """Shift predictions to the positions they are for: ids (N, T), 0 at the first position."""
    return np.pad(np.concatenate(predicted), ((0, 0), (1, 0)))


def as_batch(part: Examples, rows: slice | Sequence[int] = slice(None)) -> Batch:
    """Return the inputs, the shifted targets and the targets' weights of some rows."""
    tokens, weights = part.tokens[rows], part.weights[rows]
    return Batch(tokens[:, :-1], tokens[:, 1:], weights[:, 1:].astype(np.float32))
