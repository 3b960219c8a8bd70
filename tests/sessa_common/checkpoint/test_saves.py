"""The saves of a run: the last one on top, older ones below, a kill mixes no two of them."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest

from sessa_common.checkpoint import saves as module
from sessa_common.checkpoint.folder import (
    INDEX,
    load_weights,
    save_weights,
    write_safetensors,
    write_weights,
)
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.checkpoint.manifest import read_manifest, verify
from sessa_common.checkpoint.remote_code import CODE_FILES
from sessa_common.checkpoint.saves import add_save, finish_save, list_saves
from sessa_common.config import SessaConfig
from sessa_common.storage import LOCK, MANIFEST, lock_folder

CONFIG = SessaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
STATE = "training_state.safetensors"


def weights_at(step: int) -> dict[str, np.ndarray]:
    return {name: value + step for name, value in initial_weights(CONFIG, 0).items()}


def save(folder, step: int, *, keep: int = 2, loss: float | None = None, shards: int = 1) -> None:
    def write(scratch):
        size = 10**9 if shards == 1 else 1000
        names = write_weights(scratch, weights_at(step), shard_size=size, framework="pt")
        write_safetensors(scratch / STATE, {"step": np.array([step], np.float32)})
        return [*names, STATE]

    add_save(folder, write, step=step, validation_loss=loss, keep=keep)


def step_of(folder) -> int:
    """The step whose weights a reader finds, all of them."""
    steps = {
        float(np.round(np.mean(value - initial_weights(CONFIG, 0)[name]), 3))
        for name, value in load_weights(folder)[1].items()
    }
    assert len(steps) == 1, steps
    return int(steps.pop())


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    save_weights(tmp_path / "run", CONFIG, weights_at(0))
    return tmp_path / "run"


def test_last_save_is_on_top_and_is_an_ordinary_checkpoint(run):
    save(run, 1)
    save(run, 2)
    assert step_of(run) == 2 and read_manifest(run).folder == "."
    (run / MANIFEST).unlink()
    assert step_of(run) == 2
    assert {path.name for path in run.iterdir()} == {
        "config.json",
        "model.safetensors",
        *CODE_FILES,
        STATE,
        "checkpoints",
    }


def test_a_kept_save_is_a_checkpoint_of_its_own(run):
    save(run, 1)
    save(run, 2)
    kept = run / "checkpoints" / "step-00000001"
    assert step_of(kept) == 1 and verify(kept) == 2


def test_a_save_takes_no_second_place_on_the_disk(run):
    save(run, 1)
    top, kept = run / "model.safetensors", run / "checkpoints/step-00000001/model.safetensors"
    assert top.samefile(kept)


def test_saves_work_without_hard_links(run, monkeypatch):
    def refuse(*arguments):
        raise OSError

    monkeypatch.setattr(module.os, "link", refuse)
    save(run, 1)
    assert step_of(run) == 1 and verify(run) == 2


def test_last_saves_and_the_best_are_kept(run):
    for step, loss in enumerate([3.0, 1.0, 2.0, math.nan, 4.0], 1):
        save(run, step, loss=loss, keep=2)
    assert [manifest.step for manifest in list_saves(run).values()] == [2, 4, 5]
    save(run, 6, loss=0.5, keep=1)
    assert [manifest.step for manifest in list_saves(run).values()] == [6]


@pytest.mark.parametrize(("first", "second"), [(1, 3), (3, 1), (3, 3)])
def test_shards_and_single_files_follow_each_other(run, first, second):
    save(run, 1, shards=first)
    save(run, 2, shards=second)
    assert step_of(run) == 2 and (run / INDEX).exists() == (second > 1)
    (run / MANIFEST).unlink()
    assert step_of(run) == 2


def test_a_step_that_is_saved_again_replaces_the_first(run):
    save(run, 1, loss=1.0)
    save(run, 1, loss=2.0)
    assert read_manifest(run).validation_loss == 2.0 and verify(run) == 2


KILL = """
import os, pathlib, sys
import test_saves
calls, last = [0], int(sys.argv[2])
def dying(function):
    def call(*arguments, **named):
        calls[0] += 1
        if calls[0] == last: os._exit(9)
        return function(*arguments, **named)
    return call
for name in ("rename", "replace", "link", "mkdir", "fsync", "unlink", "rmdir"):
    setattr(os, name, dying(getattr(os, name)))
test_saves.save(pathlib.Path(sys.argv[1]), 2, shards=3, keep=1)
"""


def test_a_kill_at_any_moment_leaves_one_whole_save(run):
    """Every call that changes names on the disk is once the last one of a process."""
    save(run, 1, shards=3)
    path = os.pathsep.join([*sys.path, os.path.dirname(__file__)])
    environment = os.environ | {"PYTHONPATH": path}
    before, last, found = step_of(run), 0, []
    while True:
        last += 7
        command = [sys.executable, "-c", KILL, str(run), str(last)]
        done = subprocess.run(command, env=environment, check=False)
        found.append(step_of(run))
        with lock_folder(run):
            finish_save(run)
            assert step_of(run) == found[-1]
        verify(run)
        if done.returncode == 0:
            break
        assert done.returncode == 9
    assert set(found) == {before, 2} and found == sorted(found)
    assert not list(run.rglob(".sessa-*")) and not (run / LOCK).exists()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002"]
