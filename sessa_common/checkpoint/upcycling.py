"""Feedback for a model that was trained without: at first it changes no bit of the answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from sessa_common.checkpoint.lazy_tensors import LazyTensors
from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError, expect, require

WITH_FEEDBACK = {"transformer": "sessa_transformer", "gated_attention": "sessa"}


def parse_layers(text: str, count: int) -> list[int]:
    """The numbers, from 0, of the layers that "all", "every:2" or "3,7" names.

    "every:2" names the layers 1, 3, 5 and so on. Raises SessaError for another text and for a layer
    that a model of `count` layers does not have.
    """
    if text == "all":
        return list(range(count))
    word, _, step = text.partition(":")
    numbers = [step] if word == "every" else text.split(",")
    plain = all(number.strip().isdecimal() for number in numbers)
    expect(plain, "`feedback`", text, "all, every:2, or layers such as 3,7")
    found = sorted({int(number) for number in numbers})
    if word == "every":
        expect(0 < found[0] <= count, "`feedback`", text, f"a number from 1 to {count}")
        return list(range(found[0] - 1, count, found[0]))
    expect(found[-1] < count, "`feedback`", text, f"layers from 0 to {count - 1}")
    return found


def add_feedback(
    config: SessaConfig,
    weights: Mapping[str, np.ndarray],
    layers: Sequence[int],
    key_dim: int | None = None,
    seed: int = 0,
) -> tuple[SessaConfig, LazyTensors]:
    """Return the model with feedback in these layers, whose gain is exactly 0.

    `proj_fb` (2K, D) is drawn from N(0, 1/D), and the weights of the gain are 0, so that s = f. K
    is `key_dim`, None for that of the configuration. The new tensors have the dtype of the layer's
    `q_proj`. Raises SessaError that names a layer which cannot have feedback or already has it.
    """
    kinds = [kind.name for kind in config.kinds]
    for i in layers:
        require(
            kinds[i] in WITH_FEEDBACK,
            f"layer {i} is {kinds[i]}, to which no feedback can be added; "
            f"expected {' or '.join(WITH_FEEDBACK)}",
        )
        kinds[i] = WITH_FEEDBACK[kinds[i]]
    D, K = config.hidden_size, config.feedback_key_dim if key_dim is None else key_dim
    expect(isinstance(K, int) and K > 0, "feedback_key_dim", K, "above 0")
    if config.feeds_back and config.feedback_key_dim != K:
        raise SessaError(
            f"feedback_key_dim is {K}, but the feedback that the model already has is "
            f"{config.feedback_key_dim} wide; leave it out"
        )
    found = LazyTensors(weights)
    for i in layers:
        prefix = f"model.layers.{i}.mixer."
        dtype = found.spec(prefix + "q_proj.weight").dtype
        drawn = np.random.default_rng((seed, i)).normal(0.0, D**-0.5, (2 * K, D))
        found[prefix + "proj_fb.weight"] = drawn.astype(dtype)
        found[prefix + "proj_fb.bias"] = np.zeros(2 * K, dtype)
        found[prefix + "gamma_ctx.weight"] = np.zeros((1, D), dtype)
        found[prefix + "gamma_bias"] = np.zeros((), dtype)
    return dataclasses.replace(config, layer_kinds=tuple(kinds), feedback_key_dim=K), found


def remove_feedback(
    config: SessaConfig, weights: Mapping[str, np.ndarray]
) -> tuple[SessaConfig, LazyTensors]:
    """Return the model without its feedback, which undoes `add_feedback`.

    Raises SessaError that names the first layer whose gain is not 0.
    """
    without = {name: plain for plain, name in WITH_FEEDBACK.items()}
    kinds, found = [kind.name for kind in config.kinds], LazyTensors(weights)
    for i, kind in enumerate(config.kinds):
        if not kind.feeds_back:
            continue
        prefix = f"model.layers.{i}.mixer."
        gains = [found.pop(prefix + name) for name in ("gamma_ctx.weight", "gamma_bias")]
        if any(np.any(gain != 0) for gain in gains):
            raise SessaError(
                f"layer {i} has feedback with a gain other than 0, which the Llama family does not "
                "have; only a model whose gains are all 0 can be converted"
            )
        kinds[i] = without[kind.name]
        for part in ("weight", "bias"):
            del found[f"{prefix}proj_fb.{part}"]
    return dataclasses.replace(config, layer_kinds=tuple(kinds), feedback_key_dim=0), found
