"""Several processes that train one model: each takes its rows of every batch.

All processes read the same data and take the same steps, with the mean of their gradients. The
process of rank 0, the main one, alone writes and reports. With `context_parallel`, that many
processes with neighbouring ranks share the tokens of the same rows.
"""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import numpy as np

from sessa_common.data.batches import Batch
from sessa_common.errors import SessaError
from sessa_common.train_config import TrainConfig


class Processes(Protocol):
    """The processes of a training run, as one of them sees them.

    Every process must make the same calls in the same order; a call waits for all others.
    """

    rank: int
    size: int

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the sum over all processes of float32 arrays of one shape."""

    def mean(self, arrays: list[Any]) -> list[Any]:
        """Return the means over all processes of arrays of the framework, of one dtype.

        MLX makes new arrays, also as part of a compiled step; PyTorch overwrites the given ones.
        """

    def is_lost(self, error: Exception) -> bool:
        """Return True for the error that a process gets when another one has ended."""


class OneProcess:
    """`Processes` of a run that is alone."""

    rank = 0
    size = 1

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the values."""
        return values

    def mean(self, arrays: list[Any]) -> list[Any]:
        """Return the arrays."""
        return arrays

    def is_lost(self, error: Exception) -> bool:
        """Return False: there is no other process."""
        return False


def check_sizes(settings: TrainConfig, processes: Processes) -> None:
    """Raise SessaError when rows, tokens or weights cannot be shared evenly by the processes."""
    size, batch_size = processes.size, settings.batch_size
    for name in ("context_parallel", "shard_processes"):
        value = getattr(settings, name)
        if value and size % value:
            raise SessaError(
                f"`{name}` is {value}, which does not divide the {size} processes of this run; "
                "give 1, or start a multiple of that many processes"
            )
    groups = size // settings.context_parallel
    if batch_size % groups:
        sharers = "processes" if groups == size else "groups of processes"
        raise SessaError(
            f"`batch_size` is {batch_size}, which {groups} {sharers} cannot share evenly; "
            f"give a multiple of {groups}"
        )


def check_sharing(settings: TrainConfig, processes: Processes) -> None:
    """Raise SessaError when a new run is to save shards, but its processes share no weights."""
    if settings.sharded_checkpoints and (settings.shard_processes or processes.size) == 1:
        raise SessaError(
            "`sharded_checkpoints` saves the part of the weights that each process holds, but in "
            "this run each holds all; give `shard_processes`, or leave it out"
        )


def own_rows(batch: Batch, processes: Processes, context_parallel: int = 1) -> Batch:
    """The rows of a batch (B, T) that this process trains on, (B context_parallel / size, T)."""
    groups = processes.size // context_parallel
    if groups == 1:
        return batch
    count, group = len(batch.inputs) // groups, processes.rank // context_parallel
    return batch.rows(slice(group * count, (group + 1) * count))


def wait_for_all(processes: Processes) -> None:
    """Return when every process has come here."""
    processes.sum(np.zeros(1, np.float32))


def any_process(processes: Processes, value: bool) -> bool:
    """Return True in every process when the value is True in one of them."""
    if processes.size == 1:
        return value
    return bool(processes.sum(np.array([value], np.float32))[0])


def require_same_data(processes: Processes, fingerprint: str) -> None:
    """Raise SessaError in every process when they have read different data."""
    digest = np.frombuffer(hashlib.sha256(fingerprint.encode()).digest(), np.uint8)
    # n numbers are equal if the square of their sum is n times the sum of their squares; sums of
    # bytes and of their squares are exact in float32.
    own = digest.astype(np.float32)
    total, squares = processes.sum(np.stack([own, own * own])).astype(np.float64)
    if not np.array_equal(total * total, squares * processes.size):
        raise SessaError(
            f"the {processes.size} processes have read different data; give every machine the same "
            "files, or the same data set"
        )
