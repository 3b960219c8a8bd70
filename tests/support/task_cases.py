"""Tiny versions of the tasks, for the tests."""

import dataclasses

import numpy as np

from sessa_common.config import SessaConfig
from sessa_common.data.task_registry import new_task, parse_options
from sessa_common.data.tasks import TaskBatches, make_data
from sessa_common.train_config import TrainConfig

BACKENDS = ("torch", "mlx")


def _words(text):
    return tuple(text.split())


SOUP = _words(
    "min_tokens=20 max_tokens=24 train_examples=10 validation_examples=7 test_examples=5 "
    "spaced=false"
)
# One pair, asked for once: the answer is the only other value in the example.
RECALL = _words(
    "pairs=1 queries=1 group=1 pool=1 prefix=1 key_tokens=3 value_tokens=4 filler_tokens=2 "
    "min_lag=7 max_lag=9 test_lags=8:11 density=0 validation_examples=32 test_examples=16"
)
TASKS = {"symbolsoup": SOUP, "diffuse-mqar": RECALL}
TINY = _words(
    "--layers 1 --width 32 --heads 2 --steps 3 --batch-size 4 --warmup-steps 1 --device cpu"
)


def of_task(name):
    """The command's options for a tiny version of the task."""
    return ("--task", name, *(word for text in TASKS[name] for word in ("--task-option", text)))


def tiny(name, **changed):
    """The tiny task, with options changed."""
    return new_task(name, parse_options(name, TASKS[name]) | changed)


def batches(task, batch_size=4, seed=0, data=None, **config):
    """A batch source over the task, for a model that is just large enough."""
    sizes = {"vocab_size": len(task.vocabulary), "max_position_embeddings": task.context} | config
    settings = TrainConfig.for_task(task.name)
    settings = dataclasses.replace(settings, batch_size=batch_size, seed=seed)
    return TaskBatches(data or make_data(task), SessaConfig(**sizes), settings)


def assert_same_examples(left, right):
    assert left.metadata.keys() == right.metadata.keys()
    for name in ("tokens", "weights"):
        found, expected = getattr(left, name), getattr(right, name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    for name, value in left.metadata.items():
        np.testing.assert_array_equal(value, right.metadata[name])
