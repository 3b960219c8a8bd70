"""Compiled training steps against eager ones: numbers, resuming, steps that are not finite."""

import dataclasses
import functools
import importlib
import json

import numpy as np
import pytest
import torch
from support.in_process import fails, sessa
from support.trainers import open_trainer

from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.checkpoint.run_files import STATE, TRAINING
from sessa_common.config import SessaConfig
from sessa_common.data.batches import Batch
from sessa_common.errors import SessaError
from sessa_common.train_config import TrainConfig

SETTINGS = TrainConfig(
    steps=9,
    batch_size=3,
    gradient_accumulation_steps=2,
    warmup_steps=2,
    max_grad_norm=0.3,
    learning_rate=5e-3,
    layer_rate_decay=0.8,
    checkpoint_every=4,
    compile=True,
)
KINDS = {
    "sessa": {},
    "transformer": {"layer_kinds": "transformer"},
    "sessa_transformer": {"layer_kinds": "sessa_transformer"},
    "mamba2": {"layer_kinds": "mamba2", "mamba_d_head": 4, "mamba_d_state": 6},
    "hybrid": {"layer_kinds": ("mamba2", "sessa"), "mamba_d_head": 4, "mamba_d_state": 6},
}
# What stands for torch.compile: nothing, all of it but the slow code generation, all of it.
COMPILERS = {
    "eager": lambda function, **_: function,
    "traced": functools.partial(torch.compile, backend="aot_eager"),
    "compiled": torch.compile,
}


def make_config(kind="sessa", width=24):
    sizes = {"vocab_size": 31, "hidden_size": width, "num_attention_heads": 4}
    return SessaConfig(**sizes, num_hidden_layers=2, max_position_embeddings=40, **KINDS[kind])


class Source:
    """Random rows with random weights (a `BatchSource`); every third is of another shape."""

    fingerprint, summary = "random", "random rows"

    def batch(self, index, rows=3):
        rng = np.random.default_rng(index)
        shape = (rows, 17 if index % 3 == 2 else 37)
        inputs, targets = rng.integers(0, 31, (2, *shape)).astype(np.int32)
        return Batch(inputs, targets, rng.random(shape).astype(np.float32))

    def validation(self):
        return []


def make_backend(framework="torch", compile=True, kind="sessa", device="cpu", **change):
    module = importlib.import_module(f"sessa_{framework}.training")
    settings = dataclasses.replace(SETTINGS, compile=compile, **change)
    # Width 64 has heads as wide as those of the smallest preset.
    config = make_config(kind, 24 if device == "cpu" else 64)
    return module.TrainBackend(config, settings, initial_weights(config, 7), device=device)


def steps(backend, numbers):
    batch = Source().batch
    return [backend.step([batch(2 * i), batch(2 * i + 1)], 1e-2 / (i + 1)) for i in numbers]


def assert_close(left, right):
    """The moments agree; Adam's quotient turns the rounding of a gradient of zero into a step."""
    assert left.keys() == right.keys()
    for name in left:
        if not name.startswith("weights."):
            scale = np.abs(right[name]).max()
            assert np.abs(left[name] - right[name]).max() < 1e-3 * scale, name


def assert_equal(left, right):
    for name in right:
        assert np.array_equal(left[name], right[name]), name


@pytest.fixture
def eager(monkeypatch):
    monkeypatch.setattr(torch, "compile", COMPILERS["eager"])


@pytest.mark.parametrize(
    ("compiler", "kind", "optimizer"),
    [
        *(("eager", kind, "adamw") for kind in KINDS),
        ("eager", "hybrid", "muon"),
        *(("traced", kind, "adamw") for kind in ("transformer", "hybrid")),
        *(pytest.param("compiled", kind, "adamw", marks=pytest.mark.slow) for kind in KINDS),
    ],
)
def test_compiled_steps_are_the_eager_ones_in_torch(compiler, kind, optimizer, monkeypatch):
    monkeypatch.setattr(torch, "compile", COMPILERS[compiler])
    torch._dynamo.reset()
    plain, compiled = (
        make_backend(compile=compile, kind=kind, optimizer=optimizer) for compile in (False, True)
    )
    expected, got = steps(plain, range(4)), steps(compiled, range(4))
    assert min(norm for _, norm in expected) > SETTINGS.max_grad_norm
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert_close(compiled.state(), plain.state())
    batch = Source().batch(0)
    assert compiled.evaluate(batch)[0] == pytest.approx(plain.evaluate(batch)[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device here")
@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [("float32", "adamw"), ("bfloat16", "adamw"), ("float32", "muon"), ("bfloat16", "muon")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_replayed_graphs_are_the_eager_steps(kind, precision, optimizer):
    torch._dynamo.reset()
    plain, graphed = (
        make_backend(
            compile=compile, kind=kind, device="cuda", precision=precision, optimizer=optimizer
        )
        for compile in (False, True)
    )
    tolerance = 1e-3 if precision == "float32" else 5e-2
    np.testing.assert_allclose(steps(graphed, range(4)), steps(plain, range(4)), rtol=tolerance)
    before, good = graphed.state(), Source().batch(0)
    weights = good.weights * np.float32(np.nan)
    assert np.isnan(graphed.step([good, Batch(good.inputs, good.targets, weights)], 1e-2)[0])
    assert_equal(graphed.state(), before)
    after = steps(graphed, [4, 5])
    graphed.restore(before, 4)
    # Not bit for bit: the sums of compiled gradients may be atomic.
    np.testing.assert_allclose(steps(graphed, [4, 5]), after, rtol=tolerance)
    np.testing.assert_allclose(after, steps(plain, [4, 5]), rtol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "optimizer"), [*((kind, "adamw") for kind in KINDS), ("sessa", "muon")]
)
def test_compiled_steps_are_the_eager_ones_in_mlx(kind, optimizer):
    plain, compiled = (
        make_backend("mlx", compile=c, kind=kind, optimizer=optimizer) for c in (False, True)
    )
    np.testing.assert_allclose(steps(compiled, range(4)), steps(plain, range(4)), rtol=1e-4)
    assert_close(compiled.state(), plain.state())
    batch = Source().batch(0)
    assert compiled.evaluate(batch)[0] == pytest.approx(plain.evaluate(batch)[0], rel=1e-4)
    assert np.array_equal(compiled.predict(batch.inputs), plain.predict(batch.inputs))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_nothing(optimizer, eager):
    whole, broken = (make_backend(optimizer=optimizer) for _ in range(2))
    steps(whole, range(2))
    steps(broken, range(2))
    before, good = broken.state(), Source().batch(0)
    for bad in (np.inf, np.nan):
        weights = good.weights * np.float32(bad)
        loss, norm = broken.step([good, Batch(good.inputs, good.targets, weights)], 1e-2)
        assert not np.isfinite(loss + norm)
        assert_equal(broken.state(), before)
    # Nor is anything left over in sums, gradients and counts.
    assert steps(broken, [2]) == steps(whole, [2])
    assert_equal(broken.state(), whole.state())


def test_only_the_gradient_may_overflow(eager):
    backend = make_backend()
    steps(backend, range(2))
    before, batch = backend.state(), Source().batch(0)
    scales = dict.fromkeys(backend.parameters, 0.0) | {"model.norm.weight": 1e30}
    backend.compiled.loss_sum = lambda *_: sum(
        (parameter * scales[name]).sum() for name, parameter in backend.parameters.items()
    )
    loss, norm = backend.step([batch], 1e-2)
    assert np.isfinite(loss) and np.isinf(norm)
    assert_equal(backend.state(), before)


def test_warming_up_changes_nothing(eager):
    warmed, plain = make_backend(), make_backend()
    first = Source().batch(0)
    for numbers in ([0], [1]):
        arrays = [torch.from_numpy(x) for x in (first.inputs, first.targets, first.weights)]
        _, accumulate = warmed.compiled._ready(arrays)
        warmed.compiled._warm_up(warmed.compiled._update)
        warmed.compiled._warm_up(accumulate)
        assert steps(warmed, numbers) == steps(plain, numbers)
        assert_equal(warmed.state(), plain.state())


def test_restoring_keeps_every_tensor_where_it_is(eager):
    backend, other = make_backend(), make_backend()
    steps(backend, range(2))
    state = backend.state()

    def places():
        of_optimizer = [t for moments in backend.optimizer.state.values() for t in moments.values()]
        gradients = [parameter.grad for parameter in backend.parameters.values()]
        tensors = [*backend.parameters.values(), *of_optimizer, *gradients]
        return [tensor.data_ptr() for tensor in tensors]

    before = places()
    steps(backend, [5])
    backend.restore(state, 2)
    assert places() == before
    other.restore(state, 2)
    assert steps(backend, [2, 3]) == steps(other, [2, 3])
    assert_equal(backend.state(), other.state())


@pytest.mark.parametrize("stop", [3, 4])
def test_a_compiled_run_resumes_bit_for_bit(stop, eager, tmp_path):
    def trainer(name):
        return open_trainer(tmp_path / name, make_backend(), Source(), make_config(), SETTINGS)

    assert trainer("whole").train()
    assert not trainer("parts").train(until=stop)
    assert trainer("parts").train()
    left, right = ((tmp_path / name / STATE).read_bytes() for name in ("whole", "parts"))
    assert left == right


# MLX compiles the kernels of each new graph on the CPU with the C++ compiler.
@pytest.mark.parametrize("backend", ["torch", pytest.param("mlx", marks=pytest.mark.slow)])
def test_the_option_is_part_of_the_run(backend, eager, tmp_path, capsys):
    tiny = (
        "--data",
        "pydoc",
        "--max-documents",
        "3",
        "--tokenizer",
        "bytes",
        "--width",
        "8",
        "--heads",
        "2",
        "--layers",
        "1",
        "--layer-kinds",
        "transformer",
        "--context",
        "16",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--evaluate-batches",
        "1",
    )
    run = tmp_path / "run"
    assert sessa("train", *tiny, "--compile", "--backend", backend, "--out", run) == 0
    assert json.loads((run / TRAINING).read_text())["compile"] is True
    again = ("--resume", run, "--backend", backend)
    assert "compile is True in this run" in fails(capsys, "train", *again, "--no-compile")
    assert sessa("train", *again, "--steps", "3") == 0
    with pytest.raises(SessaError, match="compile is 1"):
        TrainConfig(compile=1)
