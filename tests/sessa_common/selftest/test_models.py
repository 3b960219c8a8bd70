"""The checks of a model pass as it is, and each notices the fault that it is there for."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from support.frameworks import FRAMEWORKS, MLX, TORCH

from sessa_common.frameworks import framework
from sessa_common.selftest import models
from sessa_common.selftest.rows import OK, SKIPPED, TF32, WRONG
from sessa_common.selftest.twin import MemoryUse

frameworks = pytest.mark.parametrize("twin", FRAMEWORKS, ids=lambda twin: twin.name)


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    for name, value in {"PROMPT": 64, "PIECE": 16, "STEP_LENGTH": 24, "STEPS": 2}.items():
        monkeypatch.setattr(models, name, value)
    models._reference_logits.cache_clear()
    yield
    models._reference_logits.cache_clear()


@frameworks
@pytest.mark.parametrize(
    "check", [models.check_products, models.check_decoding, models.check_4_bits]
)
def test_right_results_pass(twin, check) -> None:
    rows = list(check(twin))
    assert rows and {row.verdict for row in rows} == {OK}


@frameworks
def test_training(twin) -> None:
    eager, compiled = models.check_training(twin)
    assert eager.verdict == OK
    # PyTorch would compile C++ for minutes.
    assert compiled.verdict == (SKIPPED if twin is TORCH else OK)


def test_a_wrong_compiled_step_is_noticed(monkeypatch) -> None:
    right = models._train

    def wrong(*arguments, compiled):
        return right(*arguments, compiled=False) * (1.01 if compiled else 1)

    monkeypatch.setattr(models, "_train", wrong)
    eager, compiled = models.check_training(MLX)
    assert (eager.verdict, compiled.verdict) == (OK, WRONG)


def test_a_gpu_is_compared_with_the_cpu(monkeypatch) -> None:
    errors = {"float32": 2e-3, "bfloat16": 1e-2}

    def train(twin, batches, device, precision, *, compiled):
        return np.full((2, 2), 5.0) * (1 if device == "cpu" else 1 + errors[precision])

    monkeypatch.setattr(models, "_train", train)
    monkeypatch.setattr(models, "_reference_loss", lambda batch: 5.0)
    twin = SimpleNamespace(name="mlx", device="gpu", device_name="a GPU")
    rows = [(row.check, row.precision, row.verdict) for row in models.check_training(twin)]
    eager, compiled = "training step, eager", "training step, compiled"
    assert rows == [
        (eager, "float32", OK),
        (eager, "float32", TF32),
        (eager, "bfloat16", OK),
        (compiled, "float32", TF32),
        (compiled, "bfloat16", OK),
    ]


@frameworks
@pytest.mark.parametrize("fault", [0.05, np.nan])
def test_a_wrong_decoded_token_is_noticed(twin, monkeypatch, fault) -> None:
    decoder = framework(twin.name, "decoding").Decoder
    right = decoder.step

    def wrong(self, *arguments):
        logits = np.array(right(self, *arguments))
        logits[0, 0] += fault * np.abs(logits).max()
        return logits

    monkeypatch.setattr(decoder, "step", wrong)
    prefill, decode = models.check_decoding(twin)
    assert (prefill.verdict, decode.verdict) == (OK, WRONG)


@pytest.mark.parametrize(
    ("peaks", "pools", "verdicts"),
    [
        ((100, 200), (50, 100), [OK, OK]),
        ((100, 390), (50, 100), [WRONG, OK]),
        ((100, 200), (50, 500), [OK, WRONG]),
    ],
)
def test_memory_that_grows_too_fast_is_noticed(monkeypatch, peaks, pools, verdicts) -> None:
    uses = (MemoryUse(peak << 20, pool << 20) for peak, pool in zip(peaks, pools, strict=True))
    monkeypatch.setattr(models, "_step_memory", lambda *arguments: next(uses))
    assert [row.verdict for row in models.check_memory(MLX)] == verdicts


def test_memory_is_measured(monkeypatch) -> None:
    monkeypatch.setattr(models, "LENGTHS", (64, 768))
    peak, _ = models.check_memory(MLX)
    assert peak.measured > 1.5 and "at T 768" in peak.detail
    (row,) = models.check_memory(TORCH)
    assert row.verdict == SKIPPED and "cpu" in row.detail


def test_bfloat16_is_checked_on_a_gpu() -> None:
    assert models.precisions(SimpleNamespace(device="gpu")) == ("float32", "bfloat16")
