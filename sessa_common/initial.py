"""Initial weights, drawn once in NumPy so that both frameworks start from the same model."""

from __future__ import annotations

import numpy as np

from sessa_common.config import SessaConfig, parameter_shapes


def initial_weights(config: SessaConfig, seed: int) -> dict[str, np.ndarray]:
    """Draw every parameter in float32, by the names of `parameter_shapes`.

    Linear weights are N(0, 1/fan_in), so that queries, keys and the gate start at unit scale;
    W_out is divided by sqrt(num_hidden_layers), so that the residual stream keeps its scale at any
    depth; the embedding is N(0, 0.02^2), so that tied logits start near uniform. Norm weights are
    1, biases 0 and the gain bias 1.0, as in the author's release.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in parameter_shapes(config).items():
        if name.endswith((".ln.weight", "norm.weight", "gamma_bias")):
            weights[name] = np.ones(shape, np.float32)
        elif name.endswith(".bias"):
            weights[name] = np.zeros(shape, np.float32)
        else:
            std = 0.02 if name.startswith(("model.embed", "lm_head")) else shape[-1] ** -0.5
            if name.endswith("W_out.weight"):
                std /= config.num_hidden_layers**0.5
            weights[name] = rng.normal(0.0, std, shape).astype(np.float32)
    return weights
