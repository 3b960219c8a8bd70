"""The training of both frameworks: loss in chunks, layers that are computed twice, Muon."""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
from support.frameworks import FRAMEWORKS

from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.config import SessaConfig
from sessa_common.data.batches import Batch, next_token_batch
from sessa_common.train_config import TrainConfig
from sessa_common.training.muon import step_size

B, T, D, V = 2, 9, 6, 11
CONFIG = SessaConfig(
    vocab_size=31,
    hidden_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=3,
    layer_kinds=("sessa", "transformer", "mamba2"),
    mamba_d_head=4,
    mamba_d_state=6,
)


@pytest.fixture(params=FRAMEWORKS, ids=lambda framework: framework.name)
def framework(request: pytest.FixtureRequest) -> Any:
    return request.param


def module(framework: Any, name: str) -> ModuleType:
    return importlib.import_module(f"sessa_{framework.name}.{name}")


def exact(
    hidden: np.ndarray, head: np.ndarray, targets: np.ndarray, weights: np.ndarray
) -> tuple[float, dict[str, np.ndarray], np.ndarray]:
    """The loss, its gradients and the likeliest ids in float64 NumPy."""
    logits = hidden @ head.T
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = np.eye(len(head))[targets]
    dlogits = (np.exp(logs) - own) * weights[..., None]
    gradients = {"hidden": dlogits @ head, "head": np.einsum("btv,btd->vd", dlogits, hidden)}
    return -(weights * (logs * own).sum(-1)).sum(), gradients, logits.argmax(-1)


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_the_loss_in_chunks(framework: Any, rows: int, dtype: str, limit: float) -> None:
    loss = module(framework, "loss")
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((B, T, D)), rng.standard_normal((V, D))
    targets, weights = rng.integers(0, V, (B, T)), rng.random((B, T)).astype(np.float32)
    wanted, gradients, ids = exact(hidden, head, targets, weights)
    arrays = {"hidden": hidden, "head": head}
    rest = [framework.array(x) for x in (targets.astype(np.int32), weights)]

    def weighted(hidden: Any, head: Any) -> Any:
        return loss.weighted_loss(hidden, head, *rest)

    with mock.patch.object(loss, "MOST_LOGITS", rows * V):
        got = framework.gradients(weighted, arrays, dtype)
        value, likeliest = loss.loss_and_likeliest(
            *(framework.array(x, dtype) for x in arrays.values()), *rest
        )
    assert float(value) == pytest.approx(wanted, rel=limit)
    for name, gradient in gradients.items():
        assert np.abs(got[name] - gradient).max() < limit * np.abs(gradient).max(), name
    if dtype == "float32":
        assert np.array_equal(framework.numpy(likeliest), ids)


def steps(
    framework: Any, count: int = 3, rate: float = 1e-2, **change: Any
) -> tuple[list[tuple[float, float]], Any]:
    settings = dataclasses.replace(TrainConfig(compile=False, precision="float32"), **change)
    backend = module(framework, "training").TrainBackend(
        CONFIG, settings, initial_weights(CONFIG, 3), "cpu"
    )
    rng = np.random.default_rng(1)
    taken = []
    for _ in range(count):
        inputs, targets = rng.integers(0, CONFIG.vocab_size, (2, 1, 19)).astype(np.int32)
        batch = Batch(inputs, targets, rng.random((1, 19)).astype(np.float32))
        taken.append(backend.step([batch], rate))
    return taken, backend


def test_layers_that_are_computed_twice_train_the_same(framework: Any) -> None:
    kept, first = steps(framework)
    layer = framework.model.SessaLayer
    with mock.patch.object(layer, "__call__", autospec=True, side_effect=layer.__call__) as calls:
        again, second = steps(framework, checkpoint_activations="layers")
    assert calls.call_count == 2 * len(kept)
    np.testing.assert_allclose(again, kept, rtol=1e-6)
    for name, weights in first.weights().items():
        np.testing.assert_allclose(second.weights()[name], weights, atol=1e-6, err_msg=name)


def muon_of_the_library(framework: Any, start: np.ndarray, gradients: list[np.ndarray]) -> Any:
    """Return a matrix after steps of the library's own Muon, with rate 0.1, and decay in PyTorch.

    MLX's Muon scales its steps by max(1, M / N)^(1/2) instead of 0.2 max(M, N)^(1/2).
    """
    if framework.name == "torch":
        import torch

        p = torch.nn.Parameter(torch.from_numpy(start.copy()))
        optimizer = torch.optim.Muon([p], 0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
        for g in gradients:
            p.grad = torch.from_numpy(g)
            optimizer.step()
        return p.detach().numpy()
    from mlx import optimizers

    (M, N), p, state = start.shape, framework.array(start), {}
    scale = step_size((M, N)) / max(1, M / N) ** 0.5
    optimizer = optimizers.Muon(0.1 * scale, weight_decay=0.0)
    optimizer.init_single(p, state)
    for g in gradients:
        p = optimizer.apply_single(framework.array(g), p, state)
    return framework.numpy(p)


@pytest.mark.parametrize("shape", [(7, 5), (5, 12)])
def test_muon_is_that_of_the_framework(framework: Any, shape: tuple[int, int]) -> None:
    is_torch = framework.name == "torch"
    if is_torch and not hasattr(importlib.import_module("torch").optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    rng = np.random.default_rng(0)
    start, *gradients = rng.standard_normal((4, *shape)).astype(np.float32)
    wanted = muon_of_the_library(framework, start, gradients)
    p, m = framework.array(start), framework.array(0 * start)
    rate, keep = (framework.array(np.float32(x)) for x in (0.1, 1 - 0.1 * 0.3 * is_torch))
    for g in gradients:
        # PyTorch's Muon computes in bfloat16, MLX's in the type of the gradient.
        update = module(framework, "muon").muon_update
        p, m = update(p, m, framework.array(g), rate, keep, low=is_torch)
    # One rounding to bfloat16 may fall the other way.
    tolerance = 3e-3 if is_torch else 1e-5
    np.testing.assert_allclose(framework.numpy(p), wanted, atol=tolerance)


def test_both_frameworks_train_alike_with_muon() -> None:
    torch, mlx = (steps(framework, 20, optimizer="muon") for framework in FRAMEWORKS)
    # Losses, and gradient norms, whose roundings add up over all weights.
    for column, tolerance in enumerate((1e-5, 1e-4)):
        ours, theirs = (np.array(run[0])[:, column] for run in (mlx, torch))
        np.testing.assert_allclose(ours, theirs, rtol=tolerance)
    adamw, _ = steps(FRAMEWORKS[0], 2)
    assert torch[0][0] == adamw[0] and torch[0][1] != adamw[1]
    assert mlx[1].state().keys() == torch[1].state().keys()
    for name in ("W_in.weight", "mixer.proj_fb.weight"):
        assert f"v.model.layers.0.{name}" not in torch[1].state()
    assert "v.model.layers.2.mixer.conv1d.weight" in torch[1].state()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_muon_goes_on_from_a_state_bit_for_bit(framework: Any, precision: str) -> None:
    settings = TrainConfig(compile=False, precision=precision, optimizer="muon")
    make = module(framework, "training").TrainBackend
    whole, resumed = (make(CONFIG, settings, initial_weights(CONFIG, s), "cpu") for s in (3, 4))
    ids = np.arange(40, dtype=np.int32).reshape(2, 20) % CONFIG.vocab_size
    losses = [whole.step([next_token_batch(ids)], 1e-2)[0] for _ in range(2)]
    resumed.restore(whole.state(), 2)
    assert losses[1] < losses[0]
    for backend in (whole, resumed):
        for _ in range(2):
            backend.step([next_token_batch(ids)], 1e-2)
    left, right = whole.state(), resumed.state()
    assert left.keys() == right.keys()
    assert all(np.array_equal(left[name], right[name]) for name in left)
