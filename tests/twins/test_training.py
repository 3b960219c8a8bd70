"""The training of both frameworks: loss in chunks, layers that are computed twice."""

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
from sessa_common.data.batches import Batch
from sessa_common.train_config import TrainConfig

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


def steps(framework: Any, **change: Any) -> tuple[list[tuple[float, float]], Any]:
    settings = dataclasses.replace(TrainConfig(compile=False, precision="float32"), **change)
    backend = module(framework, "training").TrainBackend(
        CONFIG, settings, initial_weights(CONFIG, 3), "cpu"
    )
    rng = np.random.default_rng(1)
    taken = []
    for _ in range(3):
        inputs, targets = rng.integers(0, CONFIG.vocab_size, (2, 1, 19)).astype(np.int32)
        batch = Batch(inputs, targets, rng.random((1, 19)).astype(np.float32))
        taken.append(backend.step([batch], 1e-2))
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
