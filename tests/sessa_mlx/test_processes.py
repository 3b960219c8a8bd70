"""Two processes of mlx.launch train as one does with the whole batch."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.in_process import sessa

ROOT = Path(__file__).parents[2]
LAUNCH = Path(sys.executable).with_name("mlx.launch")
TEXT = "A short text that is read again and again, by every process. " * 40
MODEL = "--layers 1 --width 16 --heads 1 --context 16 --tokenizer bytes --data text.txt"
SETTINGS = "--backend mlx --device cpu --precision float32 --batch-size 4 --evaluate-batches 1"
OPTIONS = [*MODEL.split(), *SETTINGS.split()]

pytestmark = pytest.mark.skipif(not LAUNCH.is_file(), reason="mlx.launch is not installed")


def free_port() -> int:
    """The first of two adjoining ports on which nobody listens."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def launch(folder: Path, *command: str) -> tuple[str, str]:
    """Run a Python command in two processes; return what they print on stdout and on stderr."""
    launcher = [LAUNCH, "--backend", "ring", "-n", "2", "-p", str(free_port()), "--"]
    running = subprocess.Popen(
        [*launcher, sys.executable, *command],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "export", "cli"))},
        start_new_session=True,
    )
    try:
        return running.communicate(timeout=300)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def losses(run: Path) -> np.ndarray:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return np.array([[r["loss"], r["gradient_norm"]] for r in records if "loss" in r])


def files(run: Path) -> set[str]:
    return {path.relative_to(run).as_posix() for path in run.rglob("*")}


def test_two_processes_train_as_one_and_one_writes(folder: Path) -> None:
    command = ["train", *OPTIONS, "--steps", "20", "--out"]
    assert sessa(*command, "one") == 0
    out, err = launch(folder, "-m", "sessa_cli.main", *command, "two")
    assert out.count("by 2 processes") == 1 and out.count("wrote two") == 1, out + err
    one, two = losses(folder / "one"), losses(folder / "two")
    assert len(two) == 20
    np.testing.assert_allclose(two, one, rtol=1e-5)
    assert files(folder / "one") == files(folder / "two")


def test_a_batch_that_cannot_be_shared(folder: Path) -> None:
    command = ["train", *OPTIONS, "--batch-size", "3", "--out", "run"]
    _, err = launch(folder, "-m", "sessa_cli.main", *command)
    assert "error: --batch-size is 3, which 2 processes cannot share evenly" in err
    assert not (folder / "run").exists()


FAILING = """
import sys
import sessa_mlx.training as training
from sessa_cli.main import main

right = training.TrainBackend.step
def step(self, batches, learning_rate):
    if self.processes.rank == 1 and self.steps == 4:
        raise SystemExit(3)
    return right(self, batches, learning_rate)

training.TrainBackend.step = step
main(sys.argv[1:])
"""


def test_when_one_process_ends_so_does_the_other_and_the_run_can_go_on(folder: Path) -> None:
    (folder / "failing.py").write_text(FAILING)
    rest = [*OPTIONS, "--steps", "20", "--checkpoint-every", "2", "--out", "run"]
    _, err = launch(folder, "failing.py", "train", *rest)
    assert "another process of this run has ended" in err
    assert len(losses(folder / "run")) == 4
    again = ("train", "--backend", "mlx", "--device", "cpu", "--resume", "run", "--steps", 6)
    assert sessa(*again) == 0
    assert len(losses(folder / "run")) == 6


CALLS = """
import mlx.core as mx
import numpy as np
from sessa_common.errors import SessaError
from sessa_common.training.processes import any_process, require_same_data
from sessa_mlx.processes import open_processes

here = open_processes()
compiled = mx.compile(lambda a, b: here.mean([a * 2, b]))
a, b = compiled(mx.array([1.0, 2.0]) + here.rank, mx.array(float(here.rank)))
assert a.tolist() == [3.0, 5.0] and b.item() == 0.5
assert here.sum(np.ones(3, np.float32)).tolist() == [2.0] * 3
assert any_process(here, here.rank == 1)
require_same_data(here, "the same")
try:
    require_same_data(here, f"another in {here.rank}")
except SessaError:
    print(f"fine {here.rank}")
"""


def test_calls_inside_and_outside_of_compiled_functions(folder: Path) -> None:
    (folder / "calls.py").write_text(CALLS)
    out, err = launch(folder, "calls.py")
    assert sorted(out.split()) == ["0", "1", "fine", "fine"], err
