"""Initial weights, drawn once in NumPy so that both frameworks start from the same model."""

from __future__ import annotations

import math

import numpy as np

from sessa_common.config import SessaConfig, parameter_count, parameter_shapes
from sessa_common.memory import require_memory

# The range from which Mamba-2 draws its first time steps, and the smallest one it takes.
DT_RANGE, DT_FLOOR = (1e-3, 0.1), 1e-4


def initial_weights(config: SessaConfig, seed: int) -> dict[str, np.ndarray]:
    """Draw every parameter in float32, by the names of `parameter_shapes`.

    Linear weights are N(0, 1/fan_in), so that queries, keys and the gate start at unit scale. What
    a layer adds to the residual stream is divided by the square root of the number of such terms,
    so that the stream keeps its scale at any depth: W_out and Mamba-2's out_proj by
    sqrt(num_hidden_layers), out_proj and down_proj of the standard block by sqrt(2 *
    num_hidden_layers). The embedding is N(0, 0.02^2), so that tied logits start near uniform. Norm
    weights are 1, biases 0 and the gain bias 1.0, as in the author's release.

    Mamba-2, as in state-spaces/mamba: dt_bias is the inverse softplus of a log-uniform draw in
    [1e-3, 0.1], at least 1e-4; A_log the logarithm of a uniform draw in [1, 16]; D is 1; the
    convolution is uniform within width^-1/2, its bias 0.

    Raises SessaError, with nothing drawn, for a model that is larger than the machine's memory.
    """
    count = parameter_count(config)
    require_memory(4 * count, f"a model of {count:,} parameters in float32")
    rng = np.random.default_rng(seed)
    return {
        name: _draw(config, name, shape, rng).astype(np.float32)
        for name, shape in parameter_shapes(config).items()
    }


def _draw(
    config: SessaConfig, name: str, shape: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
    if name.endswith((".ln.weight", ".ln_mlp.weight", "norm.weight", "gamma_bias", "mixer.D")):
        return np.ones(shape)
    if name.endswith(".bias"):
        return np.zeros(shape)
    if name.endswith("dt_bias"):
        low, high = (math.log(dt) for dt in DT_RANGE)
        dt = np.exp(rng.uniform(low, high, shape)).clip(DT_FLOOR)
        return dt + np.log(-np.expm1(-dt))
    if name.endswith("A_log"):
        return np.log(rng.uniform(1.0, 16.0, shape))
    if name.endswith("conv1d.weight"):
        return rng.uniform(-(shape[-1] ** -0.5), shape[-1] ** -0.5, shape)
    std = 0.02 if name.startswith(("model.embed", "lm_head")) else shape[-1] ** -0.5
    return rng.normal(0.0, std / math.sqrt(_residual_terms(config, name)), shape)


def _residual_terms(config: SessaConfig, name: str) -> int:
    """The number of terms like this weight's output in the residual stream; 1 for other weights."""
    if not name.startswith("model.layers."):
        return 1
    number, _, inside = name.removeprefix("model.layers.").partition(".")
    weights = config.kinds[int(number)].residual_weights
    return config.num_hidden_layers * len(weights) if inside in weights else 1
