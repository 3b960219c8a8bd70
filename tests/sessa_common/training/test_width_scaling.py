"""muP: which arrays learn and start by the width of the model."""

from __future__ import annotations

import numpy as np
import pytest

from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError
from sessa_common.train_config import TrainConfig
from sessa_common.training.trained_parameters import rate_factors
from sessa_common.training.width_scaling import scale_initial

CONFIG = SessaConfig(
    vocab_size=16,
    hidden_size=32,
    num_hidden_layers=2,
    layer_kinds=("sessa", "mamba2"),
    mamba_d_head=8,
    mamba_d_state=8,
    tie_word_embeddings=False,
)
# Four times as wide as the model that the learning rate was found for.
SETTINGS = TrainConfig(mup_base_width=8, layer_rate_decay=0.5)


@pytest.mark.parametrize(("optimizer", "matrix"), [("adamw", 0.25), ("muon", 0.5)])
def test_matrices_learn_slower_in_wide_models(optimizer: str, matrix: float) -> None:
    settings = TrainConfig.from_dict(SETTINGS.to_dict() | {"optimizer": optimizer})
    factors = rate_factors(CONFIG, settings)
    expected = {
        "model.embed_tokens.weight": 0.25,
        "lm_head.weight": 1,
        "model.norm.weight": 0.25,
        "model.norm.bias": 0.25,
        "model.layers.0.W_in.weight": 0.5 * matrix,
        "model.layers.0.W_in.bias": 0.5,
        "model.layers.0.ln.weight": 0.5,
        "model.layers.0.mixer.proj_fb.weight": 0.5 * matrix,
        "model.layers.0.mixer.gamma_ctx.weight": 0.5 * 0.25,
        "model.layers.0.mixer.gamma_bias": 0.5,
        "model.layers.1.mixer.out_proj.weight": matrix,
        "model.layers.1.mixer.conv1d.weight": 1,
        "model.layers.1.mixer.A_log": 1,
    }
    assert {name: factors[name] for name in expected} == expected


def test_only_final_norm_and_gain_start_smaller() -> None:
    weights = initial_weights(CONFIG, 0)
    scaled = scale_initial(weights, CONFIG, SETTINGS)
    changed = {n: scaled[n] / weights[n] for n in weights if (scaled[n] != weights[n]).any()}
    assert changed.keys() == {"model.norm.weight", "model.layers.0.mixer.gamma_ctx.weight"}
    assert (changed["model.norm.weight"] == 0.25).all()
    np.testing.assert_allclose(changed["model.layers.0.mixer.gamma_ctx.weight"], 0.5)
    # A model as wide as the other one is trained as it always was.
    same = TrainConfig(mup_base_width=32)
    assert set(rate_factors(CONFIG, same).values()) == {1.0}
    plain = scale_initial(weights, CONFIG, same)
    assert all(np.array_equal(plain[name], weights[name]) for name in weights)


def test_adapters_are_refused() -> None:
    with pytest.raises(SessaError, match="`mup_base_width` scales the training of whole models"):
        TrainConfig(train="lora", mup_base_width=8)
