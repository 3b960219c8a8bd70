"""The profile of a run: which steps it measures, its files, and when it is refused."""

import gzip
import json
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from support.in_process import fails, sessa

from sessa_common.checkpoint.run_files import PROFILE, TRACE
from sessa_common.config import SessaConfig, parameter_count
from sessa_common.training import profiling
from sessa_common.training.profiling import FIRST, STEPS, TIMED, TRACED, StepProfile

CONFIG = SessaConfig(
    vocab_size=16,
    hidden_size=8,
    num_hidden_layers=3,
    num_attention_heads=2,
    layer_kinds=("sessa", "transformer", "mamba2"),
    mamba_d_head=4,
)
TINY = ("--data", "pydoc", "--max-documents", "3", "--tokenizer", "bytes")
TINY += ("--width", "8", "--heads", "2", "--layers", "1", "--context", "16", "--batch-size", "2")
TINY += ("--evaluate-batches", "1")


class Recorder:
    """Notes its calls among the steps of the backend, as which it serves too."""

    def __init__(self):
        self.calls = []

    def step(self, batches, learning_rate):
        self.calls.append("step")
        return 1.0, 2.0

    def device_name(self, backend):
        return "NVIDIA H200"

    def reset_peak(self):
        self.calls.append("reset")

    def memory(self, backend):
        return {"weights": 10, "gradients": 20, "moments": 30, "peak": 100}

    @contextmanager
    def trace(self, path, steps):
        self.calls.append("trace")
        yield {"solve": 1.5}
        self.calls.append("written")


def test_it_measures_the_steps_after_the_first(tmp_path, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(profiling, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    recorder = Recorder()
    profile = StepProfile(recorder, recorder, CONFIG, tmp_path, processes=2)
    batch = SimpleNamespace(inputs=np.zeros((4, 32)))
    for _ in range(STEPS + 1):
        assert profile.step([batch, batch], 1e-3) == (1.0, 2.0)
    phases = ["reset", *["step"] * TIMED, "trace", *["step"] * TRACED, "written", "step"]
    assert recorder.calls == ["step"] * FIRST + phases
    found = json.loads((tmp_path / PROFILE).read_text())
    assert found == profile.result
    # One second a step by this clock; two layers attend, and one of them feeds back.
    operations = (6 * parameter_count(CONFIG) + (2 * 6 + 7) * 32 * 8) * 256 / 2
    assert (found["tokens_per_second"], found["operations_per_second"]) == (256, operations)
    assert found["utilisation"] == pytest.approx(operations / 989e12)
    assert found["bytes"]["activations and other"] == 40
    assert found["milliseconds_by_kind"] == {"solve": 1.5}


def test_a_run_leaves_its_profile(tmp_path, capsys):
    run = tmp_path / "run"
    here = ("--device", "cpu", "--backend", "torch")
    assert sessa("train", *TINY, *here, "--steps", STEPS, "--profile", "--out", run, "--json") == 0
    printed = json.loads(capsys.readouterr().out)["profile"]
    assert printed == json.loads((run / PROFILE).read_text())
    weights = printed["bytes"]["weights"]
    assert weights == printed["bytes"]["gradients"] > 0
    assert 2 * weights <= printed["bytes"]["moments"] < 3 * weights
    with gzip.open(run / TRACE) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"aten::addmm", "_EagerBackward"} <= names
    more = ("--steps", 2 * STEPS - 1, "--profile", "--backend", "torch")
    assert f"a profile takes {STEPS} steps" in fails(capsys, "train", "--resume", run, *more)


def test_mlx_has_no_profile(tmp_path, capsys):
    told = fails(capsys, "train", *TINY, "--backend", "mlx", "--profile", "--out", tmp_path / "run")
    assert "PyTorch" in told and not (tmp_path / "run").exists()
