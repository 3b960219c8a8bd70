"""Gains that a training backend reports: the twins agree, and the statistics are right."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
from support.export_models import lively_weights, small_config

from sessa_common.train_config import TrainConfig
from sessa_common.training.gains import gain_record, gain_summary


def test_the_twins_report_the_same_gains():
    config = small_config("hybrid", gamma_max=0.5)
    weights, ids = lively_weights(config), np.random.default_rng(0).integers(0, 257, (2, 9))
    found = []
    for twin in ("torch", "mlx"):
        training = pytest.importorskip(f"sessa_{twin}.training")
        backend = training.TrainBackend(config, TrainConfig(), weights, device="cpu")
        found.append(backend.gains(ids))
        before = backend.predict(ids)
        np.testing.assert_array_equal(before, backend.predict(ids))
    assert found[0].keys() == found[1].keys() == {0, 2}
    for i, gains in found[0].items():
        assert gains.shape == (2, 9) and 0 < np.abs(gains).max() < 0.5
        np.testing.assert_allclose(gains, found[1][i], atol=1e-5)
    # The first layer reads the embeddings alone, so its gains follow from the weights.
    model = import_module("sessa_common.reference.ops")
    x = weights["model.embed_tokens.weight"][ids].astype(np.float64)
    x = model.layer_norm(
        x,
        weights["model.layers.0.ln.weight"],
        weights["model.layers.0.ln.bias"],
        config.layer_norm_eps,
    )
    a, _ = np.split(
        x @ weights["model.layers.0.W_in.weight"].T + weights["model.layers.0.W_in.bias"], 2, -1
    )
    logits = model.gelu(a) @ weights["model.layers.0.mixer.gamma_ctx.weight"][0]
    want = 0.5 * np.tanh(logits + weights["model.layers.0.mixer.gamma_bias"])
    np.testing.assert_allclose(found[0][0], want, atol=1e-5)


def test_statistics_of_gains():
    record = gain_record({3: np.array([[0.0, -0.3], [0.05, 0.05]])})
    assert record == pytest.approx(
        {"layer_3_gain_mean": 0.1, "layer_3_gain_max": 0.3, "layer_3_gain_used": 0.25}
    )
    assert gain_summary(record) == "gains: mean 0.1, largest 0.3, 25% above 0.1"
    assert gain_record({}) == {} and gain_summary({"loss": 2.0}) == ""
