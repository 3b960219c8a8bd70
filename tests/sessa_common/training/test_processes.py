"""Several processes share the rows of a batch, agree on the end, and notice different data."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from sessa_common.checkpoint.run_files import TRAINING
from sessa_common.data.batches import Batch
from sessa_common.errors import SessaError
from sessa_common.train_config import TrainConfig
from sessa_common.training.preparation import read_settings
from sessa_common.training.processes import (
    OneProcess,
    any_process,
    check_sizes,
    own_rows,
    require_same_data,
)


def group(rank: int, size: int, others=()) -> SimpleNamespace:
    """Processes whose others call with the given values, each in turn."""
    waiting = list(others)
    return SimpleNamespace(rank=rank, size=size, sum=lambda own: own + waiting.pop(0))


def test_the_rows_of_all_processes_are_the_batch() -> None:
    rows = np.arange(24).reshape(6, 4)
    batch = Batch(rows, rows + 1, (rows * 0.5).astype(np.float32))
    parts = [own_rows(batch, group(rank, 3)) for rank in range(3)]
    for name in ("inputs", "targets", "weights"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(batch, name))
    assert {len(part.inputs) for part in parts} == {2}
    assert own_rows(batch, OneProcess()) is batch


def test_processes_that_share_the_tokens_of_a_row_get_the_same_rows() -> None:
    batch = Batch(*(np.arange(8).reshape(4, 2) for _ in range(3)))
    firsts = [own_rows(batch, group(rank, 4), 2).inputs[0, 0] for rank in range(4)]
    assert firsts == [0, 0, 4, 4]
    assert own_rows(batch, group(3, 4), 4) is batch


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 7}, r"`batch_size` is 7.*6 processes.*multiple of 6"),
        ({"batch_size": 2, "context_parallel": 2}, r"`batch_size` is 2.*3 groups of processes"),
        ({"context_parallel": 4}, r"`context_parallel` is 4, which does not divide the 6"),
        ({"shard_processes": 5}, r"`shard_processes` is 5, which does not divide the 6"),
    ],
)
def test_sizes_that_do_not_divide(fields: dict[str, int], message: str) -> None:
    check_sizes(TrainConfig(batch_size=6), group(0, 3))
    check_sizes(TrainConfig(batch_size=3, context_parallel=2, shard_processes=0), group(0, 6))
    with pytest.raises(SessaError, match=message):
        check_sizes(TrainConfig(**{"batch_size": 6} | fields), group(0, 6))


@pytest.mark.parametrize(("own", "other", "answer"), [(0, 0, False), (1, 0, True), (0, 1, True)])
def test_one_process_ends_all(own: bool, other: bool, answer: bool) -> None:
    assert any_process(group(0, 2, [np.array([other], np.float32)]), bool(own)) is answer


def test_muon_needs_whole_matrices() -> None:
    for shared in (0, 2):
        message = f"needs whole matrices, but `shard_processes` is {shared}"
        with pytest.raises(SessaError, match=message):
            TrainConfig(optimizer="muon", shard_processes=shared)
    TrainConfig(optimizer="muon", context_parallel=2)


@pytest.mark.parametrize(
    ("stored", "documents"),
    [
        ({}, "joined"),
        ({"documents": None}, "separate"),
        ({"documents": None, "context_parallel": 2}, "joined"),
        ({"documents": "separate", "context_parallel": 2}, "separate"),
    ],
)
def test_older_runs_go_on_with_their_documents(stored, documents, tmp_path) -> None:
    (tmp_path / TRAINING).write_text(json.dumps(stored))
    assert read_settings(tmp_path).documents == documents


def test_different_data_are_noticed() -> None:
    sent: list[np.ndarray] = []
    for text in ("a", "b"):
        require_same_data(SimpleNamespace(size=1, sum=lambda own: sent.append(own) or own), text)
    require_same_data(group(0, 2, [sent[0]]), "a")
    with pytest.raises(SessaError, match="different data"):
        require_same_data(group(0, 2, [sent[1]]), "a")
