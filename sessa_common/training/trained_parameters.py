"""The parameters that a run trains: all, or those of an adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from sessa_common.checkpoint.adapters import Shapes, initial_lora, lora_shapes
from sessa_common.config import SessaConfig, parameter_shapes
from sessa_common.errors import SessaError
from sessa_common.train_config import TrainConfig
from sessa_common.training.width_scaling import width_factor

LAYER = re.compile(r"model\.layers\.(\d+)\.")
FEEDBACK = ("mixer.proj_fb.weight", "mixer.proj_fb.bias", "mixer.gamma_ctx.weight", "gamma_bias")


def trains_adapter(settings: TrainConfig) -> bool:
    """Return True when the run leaves the weights of its model alone and writes an adapter."""
    return settings.train != "all"


def trained_shapes(config: SessaConfig, settings: TrainConfig) -> Shapes:
    """Name and shape of every array that training changes, in a fixed order.

    LoRA's matrices have the names of `checkpoint.adapters`. Raises SessaError when the model has no
    feedback to train or none of the `lora_targets`.
    """
    shapes = parameter_shapes(config)
    if not trains_adapter(settings):
        return shapes
    parts = settings.train.split("+")
    trained = {n: s for n, s in shapes.items() if "feedback" in parts and n.endswith(FEEDBACK)}
    if "feedback" in parts and not trained:
        raise SessaError(f"`train` is {settings.train}, but no layer of the model has feedback")
    if "lora" in parts:
        lora = lora_shapes(config, settings.lora_rank, settings.lora_targets)
        # A layer that is trained as a whole gains nothing from LoRA.
        trained |= {
            n: s for n, s in lora.items() if f"{n.rpartition('.lora_')[0]}.weight" not in trained
        }
    return trained


def rate_factors(config: SessaConfig, settings: TrainConfig) -> dict[str, float]:
    """Return by what the learning rate of each trained array is multiplied.

    Layer i of L learns with layer_rate_decay^(L-1-i), the embedding with layer_rate_decay^L and
    what follows the layers with 1; feedback learns with feedback_rate times that, and every array
    with its `width_factor` times that.
    """
    factors = {}
    for name, shape in trained_shapes(config, settings).items():
        depth = 0
        if found := LAYER.match(name):
            depth = config.num_hidden_layers - 1 - int(found[1])
        elif name == "model.embed_tokens.weight":
            depth = config.num_hidden_layers
        factors[name] = settings.layer_rate_decay**depth
        if name.endswith(FEEDBACK):
            factors[name] *= settings.feedback_rate
        factors[name] *= width_factor(name, shape, config, settings)
    return factors


def lora_scale(settings: TrainConfig) -> float:
    """The factor of B A."""
    return settings.lora_alpha / settings.lora_rank


def with_adapter(
    config: SessaConfig, settings: TrainConfig, weights: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the weights of a model with the LoRA matrices of a new run beside them."""
    own = parameter_shapes(config)
    new = {n: s for n, s in trained_shapes(config, settings).items() if n not in own}
    return {**weights, **initial_lora(new, settings.seed)}
