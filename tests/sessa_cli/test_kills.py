"""Commands that are killed while they write: nothing is lost, nothing is left behind.

KILLS is the number of kills in all, spread evenly over the writes of the commands; the fast tests
take a sample.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.kills import KILLED, start_commands

from sessa_common.checkpoint.folder import load_weights
from sessa_common.checkpoint.manifest import verify
from sessa_common.storage import LEFTOVER, MANIFEST

KILLS = int(os.environ.get("KILLS", "18"))
TINY = ("--layers", "1", "--width", "16", "--heads", "2", "--context", "16", "--tokenizer", "bytes",
        "--batch-size", "2", "--warmup-steps", "1", "--evaluate-every", "2", "--evaluate-batches",
        "1", "--checkpoint-every", "2", "--device", "cpu")  # fmt: skip
SOUP = ("--task-option", "max_tokens=60", "--task-option", "train_examples=4", "--task-option",
        "validation_examples=2", "--task-option", "test_examples=2")  # fmt: skip


@dataclass(frozen=True)
class Scenario:
    """Commands that prepare a folder, one to be killed, those that may follow, and its result.

    {b} stands for the backend and {w} for the folder of everything.
    """

    command: str
    prepare: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    result: str = "run"


START = "train --data {w}/d.txt OPTIONS --steps 4 --out {w}/run --backend {b}"
EXPORT = "export {w}/run {w}/onnx"
COMPARE = "compare --data {w}/d.txt --mixers sessa --scale 1m --seeds 1 --steps 1 --batch-size 1"
SCENARIOS = {
    "train": Scenario(START, again=("train --resume {w}/run --backend {b}", START)),
    "resume": Scenario("train --resume {w}/run --steps 8 --backend {b}", (START,)),
    "replace": Scenario(f"{START} --seed 1 --force", (START,)),
    "convert": Scenario("convert {w}/run {w}/out --shard-size 4KB", (START,), result="out"),
    "in-place": Scenario("convert {w}/run {w}/run --force --shard-size 4KB --dtype float16",
                         (START,)),
    "export": Scenario(EXPORT, (START,), result="onnx"),
    "export-again": Scenario(f"{EXPORT} --force", (START, EXPORT), result="onnx"),
    "data": Scenario("data symbolsoup SOUP --out {w}/soup", result="soup"),
}  # fmt: skip
CASES = [(name, "torch") for name in SCENARIOS] + [(name, "mlx") for name in ("train", "resume")]


def words(line: str, work: Path, backend: str) -> list[str]:
    found: list[str] = []
    for word in line.split():
        found += {"OPTIONS": TINY, "SOUP": SOUP}.get(word, (word,))
    return [word.format(w=work, b=backend) for word in found]


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    pytest.importorskip("mlx.core")
    pytest.importorskip("torch")
    with start_commands(tmp_path_factory.mktemp("library")) as started:
        yield started


def content(folder: Path) -> dict[str, bytes]:
    """The verified model of a folder by tensor, or the files of a folder without one."""
    verify(folder)
    if (folder / "config.json").exists() and not (folder / "model.onnx").exists():
        return {name: value.tobytes() for name, value in load_weights(folder)[1].items()}
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


def leftovers(work: Path) -> list[Path]:
    return [
        path for path in work.rglob(".*") if LEFTOVER.fullmatch(path.name) or "tmp" in path.name
    ]


@pytest.mark.parametrize(("name", "backend"), CASES, ids=["-".join(case) for case in CASES])
def test_a_kill_loses_nothing_and_leaves_nothing(name, backend, commands, tmp_path):
    scenario, work, start = SCENARIOS[name], tmp_path / "work", tmp_path / "start"
    result = work / scenario.result
    run: Callable = lambda line, **k: commands(work, *words(line, work, backend), **k)  # noqa: E731

    def fresh() -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(start, work)

    start.mkdir()
    (start / "d.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    fresh()
    for line in scenario.prepare:
        done = run(line)
        assert done.code == 0, done.output
    shutil.rmtree(start)
    shutil.copytree(work, start)
    before = content(result) if result.exists() else None
    done = run(scenario.command)
    assert done.code == 0, done.output
    after = content(result)
    count = max(1, KILLS // len(CASES))
    for number in range(count):
        kill_at = 1 + (2 * number + 1) * done.calls // (2 * count)
        fresh()
        killed = run(scenario.command, kill_at=kill_at)
        assert killed.code == KILLED, (kill_at, killed)
        where = f"killed at change {kill_at} of {done.calls}"
        if before is not None:
            assert result.exists(), where
        found = content(result) if result.exists() and any(result.iterdir()) else None
        if name not in ("train", "resume"):  # Those save in between.
            assert found in (None, before, after), where
        codes = [run(line) for line in (scenario.again or (scenario.command,))]
        assert content(result) == after, (where, codes)
        assert any(ended.code == 0 for ended in codes) or found == after, (where, codes)
        assert not leftovers(work), where
