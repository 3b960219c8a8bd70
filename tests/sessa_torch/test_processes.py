"""Processes of torchrun train as one does with the whole batch, in every way to share the work."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sessa_common import convert
from sessa_common.checkpoint.folder import load_weights
from sessa_common.checkpoint.lazy_tensors import rows_of
from sessa_common.checkpoint.manifest import read_manifest
from sessa_common.errors import SessaError
from sessa_common.training.saved_state import read_state
from sessa_torch.training import train

ROOT = Path(__file__).parents[2]
# "cuda" where two GPUs are, to send by NCCL.
DEVICE = os.environ.get("DEVICE", "cpu")
TEXT = "A short text that is read again and again, by every process. " * 40
# A row has several of them, which do not read each other.
DOCUMENTS = [TEXT[i : i + 4 + i % 19] for i in range(0, 600, 3)]
FIELDS = {
    "data": "documents.jsonl",
    "tokenizer": "bytes",
    "num_hidden_layers": 3,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 15,
    "batch_size": 4,
    "evaluate_batches": 1,
    "steps": 20,
    "precision": "float32",
    "device": DEVICE,
}
# Ways to share the work, by the name of the run.
WAYS: dict[str, dict[str, Any]] = {
    "data": {},
    "shard": {
        "shard_processes": 0,
        "checkpoint_activations": "layers",
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
    },
    "context": {"context_parallel": 2},
    "context-shard": {
        "context_parallel": 2,
        "shard_processes": 0,
        "checkpoint_activations": "selective",
    },
}
SAVED_IN_SHARDS = {"sharded_checkpoints": True, "checkpoint_every": 8}
# Ways that need four processes.
MORE_WAYS = {
    "hybrid": {"shard_processes": 2},
    "context-4": {"context_parallel": 4},
    "context-4-hybrid": {"context_parallel": 4, "shard_processes": 2},
    "hybrid-saved": {"shard_processes": 2} | SAVED_IN_SHARDS,
}
HERE = ["--backend", "torch", "--device", DEVICE]
REFUSED = ["train", *HERE, "--data", "text.txt", "--tokenizer", "bytes", "--out", "refused"]
RESUME = ["train", *HERE, "--resume"]


def environment() -> dict[str, str]:
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "export", "cli", "tests"))
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def start(folder: Path, count: int, *command: str) -> subprocess.Popen[str]:
    """Start a Python command in several processes of torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.Popen(
        [sys.executable, *launcher, *command],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def launch(folder: Path, count: int, *command: str) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error of a command in several processes."""
    running = start(folder, count, *command)
    try:
        out, err = running.communicate(timeout=600)
    finally:
        if running.poll() is None:
            running.send_signal(signal.SIGTERM)
    return running.returncode, out, err


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    documents = "\n".join(json.dumps({"text": text}) for text in DOCUMENTS)
    (tmp_path / "documents.jsonl").write_text(documents)
    return tmp_path


def losses(run: Path) -> np.ndarray:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return np.array([[r["loss"], r["gradient_norm"]] for r in records if "loss" in r])


def gains(run: Path) -> np.ndarray:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kinds = [f"layer_0_gain_{kind}" for kind in ("mean", "max", "used")]
    return np.array([[r[kind] for kind in kinds] for r in records if "validation_loss" in r])


def files(run: Path) -> set[str]:
    return {path.relative_to(run).as_posix() for path in run.rglob("*")}


COMMANDS = """
import json, os, signal
from support.in_process import sessa
from support.shared_rows import check_operators
from sessa_common.checkpoint import sharded_state as shards
from sessa_common.errors import SessaError
from sessa_torch.distributed import sharded_state, sharding
from sessa_torch.training import TrainBackend, train

check_operators()

def join(parts):
    assert len(parts) == 1, "a process reads more of a matrix than it holds"
    return parts[0][1]

shards._join = join
# Two layers are gathered together, and the third one alone.
sharding.LEAST_PARAMETERS = 3000
runs, commands, last = json.load(open("commands.json"))
for fields in runs:
    train(**fields)
codes = [sessa(*arguments) for arguments in commands]
# One write, because the processes share the output.
print(f"codes {codes}\\n", end="", flush=True)

def fill_disk(plan, planner):
    raise OSError(28, "No space left on device")

right, writers = sharded_state._new_writer, []
def new_writer(folder):
    writers.append(right(folder))
    if sharded_state.dist.get_rank() == 1 and len(writers) == 2:
        writers[-1].write_data = fill_disk
    return writers[-1]

sharded_state._new_writer = new_writer
try:
    train(**last)
except SessaError as error:
    print(f"refused: {error}\\n", end="", flush=True)
sharded_state._new_writer = right

step, steps = TrainBackend.step, []
def lost(self, batches, learning_rate):
    steps.append(self)
    if self.processes.rank == 1 and len(steps) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batches, learning_rate)

TrainBackend.step = lost
train(**last | {"out": "lost"})
"""


def check_ways(folder: Path, count: int, ways: dict[str, dict[str, Any]]) -> None:
    """Train 20 steps in each way, and go on with runs of another number of processes.

    Two more runs end early: one whose disk is full, and one that loses a process at its fifth step.
    """
    train("one", **FIELDS)
    train("begun", **FIELDS | {"steps": 8})
    shutil.copytree("begun", "begun-again")
    saved = FIELDS | ways["shard"] | SAVED_IN_SHARDS
    runs = [{"out": name} | FIELDS | way for name, way in ways.items()]
    runs += [{"out": "saved"} | saved | {"steps": 8}]
    runs += [{"resume": "saved", "steps": 20, "device": DEVICE}]
    commands = [
        [*RESUME, "begun-again", "--steps", "20", "--shard-processes", "0"],
        [*REFUSED, "--batch-size", str(count + 1)],
    ]
    full = {"out": "full"} | saved | {"checkpoint_every": 1}
    (folder / "commands.json").write_text(json.dumps([runs, commands, full]))
    (folder / "commands.py").write_text(COMMANDS)
    code, out, err = launch(folder, count, "commands.py")
    assert code == 1, out + err
    # Either the other process sees it first, or torchrun ends that one: always so with NCCL.
    assert "another process of this run has ended" in err or "closing signal" in err, out + err
    assert out.count("codes [0, 2]") == count, out + err
    assert out.count(f"by {count} processes") == out.count("wrote begun-again ") == 1
    assert f"--batch-size is {count + 1}, which {count} processes cannot share evenly" in err
    assert not Path("refused").exists()
    for name, way in ways.items():
        if "sharded_checkpoints" not in way:
            assert files(Path(name)) == files(Path("one"))
        np.testing.assert_allclose(losses(Path(name)), losses(Path("one")), rtol=1e-5)
        # Gains are those of the first batch, which has other rows where it is smaller.
        limit = 0.05 if "batch_size" in way else 1e-4
        np.testing.assert_allclose(gains(Path(name)), gains(Path("one")), rtol=limit)
    assert gains(Path("one")).size
    check_shards(out, count)
    assert len(losses(Path("lost"))) == 4
    train(resume="lost", steps=6, device=DEVICE)
    assert len(losses(Path("lost"))) == 6
    for run, steps in (("begun", 20), ("one", 24), ("shard", 24), ("saved", 24)):
        train(resume=run, steps=steps, shard_processes=1, device=DEVICE)
    for one, more in (("begun", "begun-again"), ("one", "shard"), ("one", "saved")):
        np.testing.assert_allclose(losses(Path(more)), losses(Path(one)), rtol=1e-5)


def check_shards(out: str, count: int) -> None:
    """Compare runs saved in shards with those that one process has saved, and export one."""
    expect_same_state("saved", "shard")
    state = read_state(Path("saved"))
    whole, parts = state["weights.model.embed_tokens.weight"], (slice(0, 3), slice(100, 256))
    for rows in parts:
        found = rows_of(state, "weights.model.embed_tokens.weight", rows)
        np.testing.assert_array_equal(found, whole[rows])
    assert convert("saved", "exported").exact
    with pytest.raises(SessaError, match="sessa convert saved OUT"):
        load_weights("saved")
    whole = load_weights("shard")[1]
    for name, value in load_weights("exported")[1].items():
        np.testing.assert_array_equal(value, whole[name], err_msg=name)
    assert out.count("refused: a save failed: process 1: [Errno 28] No space left") == count, out
    assert read_manifest(Path("full")).step == 0
    assert [path.name for path in Path("full/checkpoints").iterdir()] == ["step-00000000"]
    shutil.copytree("saved", "damaged")
    (shard,) = Path("damaged/checkpoints/step-00000020").glob("shard-00002-*")
    shard.unlink()
    with pytest.raises(SessaError, match=f"{shard}.*step-00000016 is good"):
        train(resume="damaged", steps=24, device=DEVICE)


def expect_same_state(run: str, other: str) -> None:
    """Require weights and moments of two runs that are equal bit for bit."""
    state, wanted = read_state(Path(run)), read_state(Path(other))
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)


def test_two_processes_train_as_one_and_one_writes(folder: Path) -> None:
    check_ways(folder, 2, WAYS)


@pytest.mark.slow
def test_four_processes_train_as_one(folder: Path) -> None:
    # Four processes need a row each.
    shard = WAYS["shard"] | {"batch_size": 4, "gradient_accumulation_steps": 1}
    check_ways(folder, 4, WAYS | MORE_WAYS | {"shard": shard})


KILLS = int(os.environ.get("KILLS", "3"))


def long_run(*options: str) -> list[str]:
    """The options of a run of two processes that share the weights."""
    model = "--layers 1 --width 16 --heads 1 --context 16 --tokenizer bytes --data text.txt"
    settings = (
        f"--backend torch --device {DEVICE} --precision float32 --steps 200 --shard-processes 0"
    )
    return [*model.split(), *settings.split(), "--checkpoint-every", "5", *options]


def wait_for_step(folder: Path, step: int, running: subprocess.Popen[str]) -> None:
    while running.poll() is None:
        if (folder / "metrics.jsonl").exists() and len(losses(folder)) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(running.communicate())


SAVES = [(), ("--sharded-checkpoints",)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("saves", SAVES, ids=["whole", "sharded"])
def test_a_signal_saves_the_step_under_way(
    folder: Path, number: int, saves: tuple[str, ...]
) -> None:
    options = long_run("--out", "run", *saves)
    running = start(folder, 2, "-m", "sessa_cli.main", "train", *options)
    wait_for_step(Path("run"), 20, running)
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert running.returncode != 0
    assert "stopped at step" in out, out + err
    done = len(losses(Path("run")))
    train(resume="run", steps=done + 2, shard_processes=1, device=DEVICE)
    assert len(losses(Path("run"))) == done + 2


def processes_of(running: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun has started."""
    return [
        int(pid)
        for pid in Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    ]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("saves", SAVES, ids=["whole", "sharded"])
def test_kills_at_random_moments_change_no_weight(folder: Path, saves: tuple[str, ...]) -> None:
    random = np.random.default_rng(0)
    command = ["-m", "sessa_cli.main", "train"]
    assert launch(folder, 2, *command, *long_run("--out", "unbroken"))[0] == 0
    options = long_run("--out", "run", *saves)
    for _ in range(KILLS):
        running = start(folder, 2, *command, *options)
        done = len(losses(Path("run"))) if Path("run").exists() else 0
        wait_for_step(Path("run"), done + int(random.integers(1, 9)), running)
        time.sleep(random.uniform(0, 0.2))
        os.kill(random.choice(processes_of(running)), signal.SIGKILL)
        _, err = running.communicate(timeout=120)
        assert running.returncode != 0, err
        options = [*HERE, "--resume", "run"]
    assert launch(folder, 2, *command, *options)[0] == 0
    expect_same_state("run", "unbroken")
