"""Memory and launches of a training step in MLX."""

from __future__ import annotations

import dataclasses
import gc
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn, optimizers
from mlx.utils import tree_flatten

from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.config import SessaConfig
from sessa_common.data.batches import Batch, next_token_batch
from sessa_common.presets import PRESETS
from sessa_common.train_config import TrainConfig
from sessa_mlx import attention_blocks, training
from sessa_mlx._gelu import gelu
from sessa_mlx._linear import Linear
from sessa_mlx.feedback import blocked
from sessa_mlx.training import TrainBackend

SMALL = SessaConfig(
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=4096,
)
# Bytes of a step at its peak, over weights and moments, for a token of SMALL.
BYTES_A_TOKEN = 30_000
# Operations that only look at memory in another way.
FREE = {"Broadcast", "Depends", "ExpandDims", "Reshape", "Slice", "Split", "Squeeze", "Transpose"}


def backend(config: SessaConfig, **settings: Any) -> TrainBackend:
    return TrainBackend(config, TrainConfig(**settings), initial_weights(config, 0), "cpu")


def batch(config: SessaConfig, rows: int, length: int) -> Batch:
    ids = np.random.default_rng(length).integers(0, config.vocab_size, (rows, length + 1))
    return next_token_batch(ids)


def peak_of_a_step(trained: TrainBackend, length: int) -> int:
    data = batch(SMALL, 1, length)
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    trained.step([data], 1e-3)
    return mx.get_peak_memory() - before


def test_memory_of_a_step_doubles_with_the_length() -> None:
    trained = backend(SMALL)
    lengths = (512, 1024, 2048, 4096)
    peaks = [peak_of_a_step(trained, length) for length in lengths]
    for length, peak, longer in zip(lengths, peaks, peaks[1:], strict=False):
        assert longer < 2.1 * peak, (length, peaks)
    assert peaks[-1] < BYTES_A_TOKEN * lengths[-1]


def test_checkpoints_save_memory() -> None:
    deep = dataclasses.replace(SMALL, num_hidden_layers=12)
    none, selective, layers = (
        peak_of_a_step(backend(deep, checkpoint_activations=way), 512)
        for way in ("none", "selective", "layers")
    )
    assert layers < 0.5 * none and layers < selective < 0.65 * none


def test_selective_checkpoints_repeat_no_attention_and_no_solve() -> None:
    config, found = dataclasses.replace(SMALL, layer_kinds=("sessa", "sessa_transformer")), {}
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 41))
    data = [next_token_batch(ids, end_id=int(ids[0, 9]))]
    operators = ((blocked, "solve_forward"), (attention_blocks, "attention_forward"))
    for way in ("none", "selective", "layers"):
        trained = backend(config, checkpoint_activations=way)
        trained._count = 1
        with ExitStack() as stack:
            calls = [
                stack.enter_context(
                    mock.patch.object(module, name, side_effect=getattr(module, name))
                )
                for module, name in operators
            ]
            losses = steps(trained, data)
        found[way] = losses, [call.call_count for call in calls]
    layers = 3 * config.num_hidden_layers
    np.testing.assert_allclose(found["selective"][0], found["none"][0], rtol=1e-5)
    assert found["none"][1] == found["selective"][1] == [layers, layers]
    assert found["layers"][1] == [2 * layers, 2 * layers]


def test_weights_are_held_once() -> None:
    """Weights and two moments, and nothing else, stay between steps."""
    config = PRESETS["demo"]
    gc.collect()
    before = mx.get_active_memory()
    trained = backend(config)
    size = sum(array.nbytes for array in trained.parameters.values())
    data = batch(config, 1, 8)
    for _ in range(2):
        trained.step([data], 1e-3)
    trained.evaluate(data)
    gc.collect()
    assert mx.get_active_memory() - before < 3.02 * size


def steps(trained: TrainBackend, data: list[Batch]) -> list[tuple[float, float]]:
    return [trained.step(data, 1e-2) for _ in range(3)]


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_rows(threads: int) -> None:
    one, several = backend(SMALL), backend(SMALL)
    one._count, several._count = 1, threads
    several._threads = ThreadPoolExecutor(threads)
    data = [batch(SMALL, 5, 40), batch(SMALL, 2, 30)]
    np.testing.assert_allclose(steps(several, data), steps(one, data), rtol=1e-5)


@pytest.mark.parametrize("place", [0, 1])
def test_a_step_that_is_not_finite_changes_nothing(place: int) -> None:
    whole, broken = backend(SMALL), backend(SMALL)
    data = [batch(SMALL, 2, 40), batch(SMALL, 2, 40)]
    wrong = list(data)
    wrong[place] = dataclasses.replace(data[0], weights=data[0].weights * np.float32(np.nan))
    assert steps(whole, data) == steps(broken, data)
    before = broken.state()
    assert not np.isfinite(broken.step(wrong, 1e-2)).any()
    for name, value in broken.state().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    assert steps(whole, data) == steps(broken, data)


def launches(tree: Any, path: Path) -> int:
    """Operations of the graph of arrays that are not evaluated yet, as mx.compile fused them."""
    mx.export_to_dot(str(path), *(array for _, array in tree_flatten(tree)))
    labels = Counter(re.findall(r'label ="([^"]*)", shape=rectangle', path.read_text()))
    return sum(count for name, count in labels.items() if name not in FREE)


def test_launches_of_the_optimizer(tmp_path: Path) -> None:
    """At 30m a quarter of the 2,395 for AdamW and 820 for clipping that it takes uncompiled."""
    config = PRESETS["sessa-30m"]
    trained = backend(config, compile=True, precision="float32")
    mx.eval(trained.parameters, trained.moments)
    data, total = trained._arrays(batch(config, 1, 8)), mx.array(8.0)
    gradients = trained._accumulate(trained.parameters, None, data, total)
    step = trained._finish(
        trained.parameters, trained.moments, None, data, total, trained._rates(1e-3)
    )
    paths = tmp_path / "gradients.dot", tmp_path / "step.dot"
    without, whole = launches(gradients, paths[0]), launches(step, paths[1])
    assert 0 < whole - without <= (2395 + 820) // 4


def kernels(layers: int, path: Path) -> set[str]:
    """Names of the fused kernels of a compiled step, by their operations."""
    trained = backend(dataclasses.replace(SMALL, num_hidden_layers=layers), compile=True)
    data = trained._arrays(batch(SMALL, 1, 8))
    rest = None, data, mx.array(8.0), trained._rates(1e-3)
    with mock.patch("sessa_mlx._gelu.on_gpu", lambda: True):
        step = trained._finish(trained.parameters, trained.moments, *rest)
    mx.export_to_dot(str(path), *(array for _, array in tree_flatten(step)))
    return set(re.findall(r'label ="(Compiled[^"]*)"', path.read_text()))


def test_all_layers_have_the_same_kernels(tmp_path: Path) -> None:
    """A kernel takes seconds to compile on CUDA; only the last of a long sum may differ."""
    few, many = (kernels(layers, tmp_path / "step.dot") for layers in (3, 5))
    assert len(few) > 10 and len(few ^ many) <= 2


def test_clipping_is_that_of_mlx() -> None:
    grads = {"a": mx.random.normal((3, 4)), "b": mx.array(2.0), "c": mx.random.normal((5,))}
    for most in (0.5, 100.0):
        found, norm = training._clipped(grads, most)
        wanted, wanted_norm = optimizers.clip_grad_norm(grads, most)
        assert norm.item() == pytest.approx(wanted_norm.item(), rel=1e-6)
        for name, g in found.items():
            np.testing.assert_allclose(g, wanted[name], rtol=1e-6)


def test_gelu_on_a_gpu_has_the_same_gradient() -> None:
    x, dy = mx.linspace(-6, 6, 101), mx.linspace(1, 2, 101)
    wanted = mx.vjp(nn.gelu, [x], [dy])
    with mock.patch("sessa_mlx._gelu.on_gpu", lambda: True):
        found = mx.vjp(gelu, [x], [dy])
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-6)


def test_linear_on_cuda_has_the_same_gradients() -> None:
    """Gradients of input, weight and bias, also when only some are asked for."""
    layer, x, dy = Linear(5, 7), mx.random.normal((2, 3, 5)), mx.random.normal((2, 3, 7))

    def gradients(*names: str) -> dict[str, mx.array]:
        def inner(given: dict[str, mx.array]) -> mx.array:
            layer.update({name: given[name] for name in names if name != "x"})
            return (layer(given.get("x", x)) * dy).sum()

        own = layer.parameters()
        found: dict[str, mx.array] = mx.grad(inner)({"x": x, **own})
        layer.update(own)
        return {name: found[name] for name in names}

    for names in (("x", "weight", "bias"), ("bias",)):
        wanted = gradients(*names)
        with mock.patch("sessa_mlx._linear.adds_bias_apart", lambda: True):
            found = gradients(*names)
        for name in names:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", [{}, {"MLX_USE_CUDA_GRAPHS": "1"}])
def test_training_on_cuda_launches_kernels_one_by_one(given, monkeypatch) -> None:
    """A variable that is set keeps its value, and without CUDA none is set."""
    names = ("MLX_USE_CUDA_GRAPHS", "MLX_MAX_OPS_PER_BUFFER")
    with mock.patch.dict(os.environ, given):
        for name in set(names) - set(given):
            monkeypatch.delenv(name, raising=False)
        training._launch_kernels_directly()
        assert {name: os.environ[name] for name in names if name in os.environ} == given
        monkeypatch.setattr("sessa_mlx.training.on_cuda", lambda: True)
        training._launch_kernels_directly()
        assert os.environ["MLX_USE_CUDA_GRAPHS"] == given.get("MLX_USE_CUDA_GRAPHS", "0")
        assert int(os.environ["MLX_MAX_OPS_PER_BUFFER"]) < 100
