"""Saves in shards: parts are joined, a save waits for the one before, a failed one ends the run."""

from __future__ import annotations

import json
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sessa_common.checkpoint.finite import NotFiniteError
from sessa_common.checkpoint.folder import write_safetensors
from sessa_common.checkpoint.manifest import read_manifest, write_manifest
from sessa_common.checkpoint.run_files import STATE_INDEX
from sessa_common.checkpoint.sharded_state import read_sharded_state
from sessa_common.config import SessaConfig
from sessa_common.data.tokenizer import BYTES_END_ID, byte_tokenizer
from sessa_common.errors import SessaError
from sessa_common.train_config import TrainConfig
from sessa_common.training.processes import OneProcess, check_sharing
from sessa_common.training.run_folder import Run, create_run_folder
from sessa_common.training.saved_state import read_state_metadata
from sessa_common.training.sharded_saves import ShardedSaves

MATRIX = np.arange(12, dtype=np.float32).reshape(6, 2)
SOURCE: Any = type("Source", (), {"fingerprint": "of the data"})()


class OneShard:
    """A state of one process, whose file is written when `go` is set."""

    def __init__(self, error: Exception | None = None, *, finite: bool = True) -> None:
        self.error, self.finite, self.go = error, finite, threading.Event()

    def is_finite(self) -> bool:
        return self.finite

    def start(self, folder: Path | None) -> Future[list[str]]:
        assert folder is not None
        written: Future[list[str]] = Future()

        def write() -> None:
            self.go.wait(60)
            if self.error is not None:
                return written.set_exception(self.error)
            write_shard(folder, 1, {"weights.a": (0, MATRIX)})
            written.set_result(["shard-1.safetensors"])

        threading.Thread(target=write).start()
        return written


def write_shard(
    folder: Path, number: int, parts: dict[str, tuple[int, np.ndarray]], column: int = 0
) -> None:
    places = {name: {"saved_offsets": [row, column]} for name, (row, _) in parts.items()}
    arrays = {name: array for name, (_, array) in parts.items()}
    about = {"DCP_SHARDING_INFO": json.dumps(places)}
    write_safetensors(folder / f"shard-{number}.safetensors", arrays, about)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = SessaConfig(vocab_size=257, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    settings = TrainConfig(keep_checkpoints=1)
    made = Run(
        folder=tmp_path / "run",
        config=config,
        settings=settings,
        weights={},
        source=SOURCE,
        tokenizer=byte_tokenizer(),
        end_id=BYTES_END_ID,
    )
    first = OneShard()
    first.go.set()
    create_run_folder(made, first, "float32")
    return made


def test_a_save_waits_for_the_one_before_and_replaces_it(run: Run) -> None:
    one, two = OneShard(), OneShard()
    with ShardedSaves(run, OneProcess()) as saves:
        saves.start(one, 1, None)
        assert read_state_metadata(run.folder)[0] == 0
        threading.Timer(0.1, one.go.set).start()
        saves.start(two, 2, None)
        assert read_state_metadata(run.folder) == (1, "of the data")
        two.go.set()
    assert read_state_metadata(run.folder)[0] == 2
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["step-00000002"]
    np.testing.assert_array_equal(read_sharded_state(run.folder)["weights.a"], MATRIX)


def test_a_failed_save_is_told_and_leaves_the_last_one(run: Run) -> None:
    broken, saves = OneShard(SessaError("the disk is full")), ShardedSaves(run, OneProcess())
    saves.start(broken, 1, None)
    assert not saves.has_failed()
    broken.go.set()
    with pytest.raises(SessaError, match="the disk is full"), saves:
        while not saves.has_failed():
            threading.Event().wait(0.01)
    assert read_state_metadata(run.folder)[0] == 0
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["step-00000000"]


def test_what_is_not_finite_is_not_saved(run: Run) -> None:
    with pytest.raises(NotFiniteError, match="step 3"):
        ShardedSaves(run, OneProcess()).start(OneShard(finite=False), 3, None)
    assert read_state_metadata(run.folder)[0] == 0


def read_parts(folder: Path, *parts: tuple[int, np.ndarray], column: int = 0) -> np.ndarray:
    """Write parts of one tensor in a shard each, and read it."""
    for number, part in enumerate(parts):
        write_shard(folder, number, {"weights.a": part}, column)
    (folder / STATE_INDEX).write_text("{}")
    write_manifest(folder, [path.name for path in folder.iterdir()])
    manifest = read_manifest(folder)
    assert manifest is not None and manifest.is_sharded
    return read_sharded_state(folder)["weights.a"]


def test_parts_are_joined_in_the_order_of_their_rows(tmp_path: Path) -> None:
    empty = (6, MATRIX[6:])
    found = read_parts(tmp_path, (2, MATRIX[2:]), empty, (0, MATRIX[:2]))
    np.testing.assert_array_equal(found, MATRIX)


@pytest.mark.parametrize("parts", [[(2, MATRIX[2:])], [(0, MATRIX[:2]), (3, MATRIX[3:])]])
def test_a_tensor_without_a_part_is_refused(tmp_path: Path, parts: list[Any]) -> None:
    with pytest.raises(SessaError, match=r"weights\.a has no part that begins at row (0|2)"):
        read_parts(tmp_path, *parts)


def test_parts_that_are_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SessaError, match=r"shard-0.*weights\.a is cut by another axis"):
        read_parts(tmp_path, (0, MATRIX), column=1)


def test_shards_are_refused_where_every_process_holds_all() -> None:
    settings = TrainConfig(sharded_checkpoints=True, shard_processes=0)
    with pytest.raises(SessaError, match="give `shard_processes`"):
        check_sharing(settings, OneProcess())
    with pytest.raises(SessaError, match="saves a small adapter"):
        TrainConfig(sharded_checkpoints=True, train="lora")
