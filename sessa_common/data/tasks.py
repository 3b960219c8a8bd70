"""Synthetic tasks: examples with a loss mask, as batches for the trainer and as a data folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from sessa_common.checkpoint.folder import (
    new_folder,
    read_safetensors,
    write_json,
    write_safetensors,
)
from sessa_common.config import SessaConfig, TrainConfig, read_json
from sessa_common.data.batches import Batch
from sessa_common.errors import SessaError

SPLITS = ("train", "validation", "test")
TASK = "task.json"
# Token ids (B, T) to the likeliest next ids (B, T): a model, whatever framework is behind it.
Predict = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Examples:
    """Rows of a task: tokens int32 (N, T), 0 after their end; weights float32 (N, T), 1 where the
    token is to be predicted; facts by name, first axis N, for the task's own measures."""

    tokens: np.ndarray
    weights: np.ndarray
    facts: dict[str, np.ndarray]

    def first(self, count: int) -> Examples:
        """The first `count` examples."""
        facts = {name: value[:count] for name, value in self.facts.items()}
        return Examples(self.tokens[:count], self.weights[:count], facts)


class Task(Protocol):
    """A frozen dataclass whose fields are the task's options; it draws examples and measures.

    `train_examples` 0 means endless: every batch is drawn anew. The vocabulary's first token is the
    padding; `context` is the length of the longest example of any split.
    """

    name: ClassVar[str]

    @property
    def train_examples(self) -> int:
        """Training examples, or 0."""

    @property
    def validation_examples(self) -> int:
        """Held-out examples."""

    @property
    def test_examples(self) -> int:
        """Test examples."""

    @property
    def data_seed(self) -> int:
        """What the examples are drawn from."""

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The tokens, by id."""

    @property
    def context(self) -> int:
        """Tokens in the longest example."""

    def make(self, split: str, count: int, seed: Sequence[int]) -> Examples:
        """Draw `count` examples of a split; the same for the same seed."""

    def measure(self, examples: Examples, predicted: np.ndarray) -> dict[str, Any]:
        """Accuracy and what else the task reports; predicted (N, T) are ids for each position."""


def known_tasks() -> dict[str, Callable[..., Task]]:
    """The tasks by name."""
    # The tasks import this module.
    from sessa_common.data.mqar import DiffuseMqar
    from sessa_common.data.symbolsoup import SymbolSoup

    tasks: tuple[type[Task], ...] = (SymbolSoup, DiffuseMqar)
    return {task.name: task for task in tasks}


def new_task(name: str, options: Mapping[str, Any]) -> Task:
    """The task of that name; SessaError for an unknown name, option or value."""
    tasks = known_tasks()
    if name not in tasks:
        raise SessaError(
            f"task is {name!r}, expected {', '.join(tasks)} or a folder written by sessa data"
        )
    defaults = options_of(tasks[name]())
    if unknown := sorted(options.keys() - defaults.keys()):
        raise SessaError(f"{name}: unknown option {unknown[0]}; known: {', '.join(defaults)}")
    for option, value in options.items():
        default = defaults[option]
        if not isinstance(value, (int, float) if isinstance(default, float) else type(default)):
            raise SessaError(f"{name}: {option} is {value!r}, expected a value like {default!r}")
    return tasks[name](**options)


def parse_options(name: str, given: Sequence[str]) -> dict[str, Any]:
    """Options from "name=value" texts, in the types of the task's defaults."""
    defaults = options_of(new_task(name, {}))
    options = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise SessaError(f"task option is {text!r}, expected name=value")
        # new_task refuses the unknown ones.
        options[key] = _parse(value, defaults.get(key, ""), text)
    return options


def _parse(value: str, default: Any, text: str) -> Any:
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        if isinstance(default, tuple):
            return tuple(int(part) for part in re.split("[,:]", value))
        return type(default)(value)
    except (KeyError, ValueError):
        kind = "true or false" if isinstance(default, bool) else f"a value like {default!r}"
        raise SessaError(f"task option is {text!r}, expected {kind}") from None


@dataclass(frozen=True)
class TaskData:
    """A task with the examples of a run; train is None for an endless task."""

    task: Task
    train: Examples | None
    validation: Examples
    test: Examples

    @property
    def fingerprint(self) -> str:
        """Changes when any example does."""
        about = json.dumps([self.task.name, options_of(self.task)])
        digest = hashlib.blake2b(about.encode(), digest_size=16)
        for part in (self.train, self.validation, self.test):
            if part is not None:
                for array in (part.tokens, part.weights):
                    digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def options_of(task: Task) -> dict[str, Any]:
    """The task's options by name."""
    fields: Any = task
    return dataclasses.asdict(fields)


def make_data(task: Task, train_examples: int | None = None) -> TaskData:
    """Draw all splits; train_examples makes an endless task finite."""
    counts = (train_examples or task.train_examples, task.validation_examples, task.test_examples)
    parts = [
        task.make(split, count, [task.data_seed, i]) if count else None
        for i, (split, count) in enumerate(zip(SPLITS, counts, strict=True))
    ]
    assert parts[1] is not None and parts[2] is not None
    return TaskData(task, parts[0], parts[1], parts[2])


def read_task(spec: str, options: Sequence[str] = ()) -> Task:
    """The task of a name and options, or of a folder written by `write_data`."""
    if not (Path(spec) / TASK).is_file():
        return new_task(spec, parse_options(spec, options))
    if options:
        raise SessaError(f"{spec} has its options in {TASK}; leave --task-option out")
    folder = Path(spec)
    stored = read_json(folder / TASK)
    if not isinstance(found := stored.get("options"), dict):
        raise SessaError(f"{folder / TASK}: no options in it, so sessa data did not write it")
    given = {
        name: tuple(value) if isinstance(value, list) else value for name, value in found.items()
    }
    task = new_task(str(stored.get("task")), given)
    if list(task.vocabulary) != stored.get("vocabulary"):
        raise SessaError(f"{folder / TASK}: the vocabulary is not that of {task.name}; "
                         "make the data again with sessa data")  # fmt: skip
    return task


def load_data(spec: str, options: Sequence[str] = ()) -> TaskData:
    """The data of a task's name and options, or of a folder written by `write_data`."""
    task, folder = read_task(spec, options), Path(spec)
    if not (folder / TASK).is_file():
        return make_data(task)
    train, validation, test = (
        _read_examples(folder / f"{split}.safetensors", task) for split in SPLITS
    )
    return TaskData(task, train, validation, test)


def write_data(data: TaskData, folder: Path, *, force: bool = False) -> None:
    """Write task.json and one safetensors file a split into a new folder."""
    if data.train is None:
        raise SessaError(f"{data.task.name} is endless: say how many training examples to write")
    with new_folder(folder, force=force) as scratch:
        for split, part in zip(SPLITS, (data.train, data.validation, data.test), strict=True):
            arrays = {"tokens": part.tokens, "weights": part.weights}
            arrays |= {f"facts.{name}": value for name, value in part.facts.items()}
            write_safetensors(scratch / f"{split}.safetensors", arrays)
        stored = {"task": data.task.name, "options": options_of(data.task),
                  "vocabulary": list(data.task.vocabulary)}  # fmt: skip
        write_json(scratch / TASK, stored)


def _read_examples(path: Path, task: Task) -> Examples:
    arrays = read_safetensors(path)
    if missing := {"tokens", "weights"} - arrays.keys():
        raise SessaError(f"{path}: no tensor {sorted(missing)[0]}; make the data again")
    tokens, weights = arrays["tokens"], arrays["weights"]
    whole = tokens.ndim == 2 and tokens.size > 0 and weights.shape == tokens.shape
    if not whole or tokens.shape[1] > task.context:
        raise SessaError(f"{path}: tokens {tokens.shape} and weights {weights.shape} are not rows "
                         f"of up to {task.context} tokens; make the data again")  # fmt: skip
    if tokens.min() < 0 or tokens.max() >= len(task.vocabulary):
        raise SessaError(f"{path}: a token is not in the vocabulary; make the data again")
    facts = {name[6:]: value for name, value in arrays.items() if name.startswith("facts.")}
    return Examples(tokens, weights, facts)


class TaskBatches:
    """Training, validation and test rows of a task (a `BatchSource`).

    Every training row is as long as the longest, so that all batches have one shape. Raises
    SessaError when the model reads fewer positions or has fewer tokens than the task.
    """

    def __init__(self, data: TaskData, config: SessaConfig, settings: TrainConfig) -> None:
        task = data.task
        # The last token of an example is predicted, never read.
        if task.context - 1 > config.max_position_embeddings:
            raise SessaError(
                f"{task.name} has examples of {task.context} tokens, but the model has "
                f"max_position_embeddings {config.max_position_embeddings}; choose a larger "
                "--context, or shorter examples with --task-option"
            )
        if len(task.vocabulary) > config.vocab_size:
            raise SessaError(f"{task.name} has {len(task.vocabulary)} tokens, but the model's "
                             f"embedding has vocab_size {config.vocab_size} rows")  # fmt: skip
        self.data, self.batch_size, self.seed = data, settings.batch_size, settings.seed
        self.fingerprint = data.fingerprint
        self.held_out = data.validation.first(settings.evaluate_batches * settings.batch_size)
        self._epoch = -1

    @property
    def summary(self) -> str:
        """What is trained on, in a few words."""
        count = "endless" if self.data.train is None else f"{len(self.data.train.tokens):,}"
        return f"{self.data.task.name}, {count} training examples"

    def batch(self, index: int) -> Batch:
        """Rows index * batch_size and following of the run's shuffled order, or freshly drawn."""
        task, train = self.data.task, self.data.train
        if train is None:
            return as_batch(
                task.make("train", self.batch_size, [task.data_seed, 0, self.seed, index])
            )
        first = index * self.batch_size
        return as_batch(train, [self._row(i) for i in range(first, first + self.batch_size)])

    def validation(self) -> Sequence[Batch]:
        """The first evaluate_batches of the held-out batches."""
        return self._batches(self.held_out)

    def score(self, predicted: Sequence[np.ndarray]) -> dict[str, float]:
        """The share of held-out targets that the ids (B, T) of each batch have."""
        part = self.held_out
        hits = (_by_place(predicted) == part.tokens) * part.weights
        return {"validation_accuracy": float(hits.sum() / part.weights.sum())}

    def test(self, predict: Predict) -> dict[str, Any]:
        """The task's measures on its test examples."""
        part = self.data.test
        predicted = [predict(batch.inputs) for batch in self._batches(part)]
        return self.data.task.measure(part, _by_place(predicted))

    def _row(self, index: int) -> int:
        assert self.data.train is not None
        epoch, place = divmod(index, len(self.data.train.tokens))
        if self._epoch != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._order = epoch, rng.permutation(len(self.data.train.tokens))
        return int(self._order[place])

    def _batches(self, part: Examples) -> list[Batch]:
        return [
            as_batch(part, slice(i, i + self.batch_size))
            for i in range(0, len(part.tokens), self.batch_size)
        ]


def _by_place(predicted: Sequence[np.ndarray]) -> np.ndarray:
    """Ids (N, T): at each position what the model expects there; the first is never asked."""
    return np.pad(np.concatenate(predicted), ((0, 0), (1, 0)))


def as_batch(part: Examples, rows: slice | Sequence[int] = slice(None)) -> Batch:
    """Inputs, shifted targets and their weights of some rows."""
    tokens, weights = part.tokens[rows], part.weights[rows]
    return Batch(tokens[:, :-1], tokens[:, 1:], weights[:, 1:].astype(np.float32))
