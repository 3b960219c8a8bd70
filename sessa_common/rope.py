"""Rotary frequencies of a context that was stretched after training: linear, llama3 and yarn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sessa_common.errors import SessaError, expect, require

ROPE_TYPES = ("linear", "llama3", "yarn")
NOT_SUPPORTED = {
    "dynamic": "its base follows the length of the text, so cached keys would become wrong",
    "longrope": "it has other frequencies for short and for long texts",
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The change of the rotary frequencies by `factor`, under the keys that transformers uses.

    "linear" divides every frequency by `factor`. "llama3" divides those whose wavelength is longer
    than the trained context / `low_freq_factor`, keeps those shorter than the trained context /
    `high_freq_factor`, and mixes both between. "yarn" (arXiv 2309.00071) mixes between the pairs
    that turn `beta_fast` and `beta_slow` times in the trained context, and multiplies cosines and
    sines by `attention_factor`. The trained context is `original_max_position_embeddings`, None for
    the model's max_position_embeddings. Raises SessaError for values that make no frequencies.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        kind = self.rope_type
        if reason := NOT_SUPPORTED.get(kind) if isinstance(kind, str) else None:
            raise SessaError(
                f"rope_type {kind!r} is not supported, because {reason}; "
                f"expected one of default, {', '.join(ROPE_TYPES)}"
            )
        known = kind in ROPE_TYPES
        expect(known, "rope_type", kind, f"one of default, {', '.join(ROPE_TYPES)}")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            self._check_positive(name)
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                self._check_positive(name)
        length = self.original_max_position_embeddings
        count = isinstance(length, int) and not isinstance(length, bool) and length > 0
        fits = length is None or count
        expect(fits, "original_max_position_embeddings", length, "a positive integer")
        expect(isinstance(self.truncate, bool), "truncate", self.truncate, "true or false")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            below = getattr(self, low) < getattr(self, high)
            require(below, f"{low} {getattr(self, low)} is not below {high} {getattr(self, high)}")

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        expect(number and 0 < value < math.inf, name, value, "a number above 0")

    def with_context(self, length: int) -> RopeScaling:
        """The scaling with this trained context if it needs one and has none."""
        if self.rope_type == "linear" or self.original_max_position_embeddings is not None:
            return self
        return dataclasses.replace(self, original_max_position_embeddings=length)

    def to_dict(self) -> dict[str, Any]:
        """The keys that are needed to read it again, and those that transformers insists on."""
        always = ("low_freq_factor", "high_freq_factor") if self.rope_type == "llama3" else ()
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default or field.name in always
        }

    @property
    def amplitude(self) -> float:
        """The number by which cosines and sines are multiplied."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._log_scale(self.mscale) / self._log_scale(self.mscale_all_dim)
        return self._log_scale(1.0)

    def _log_scale(self, scale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0

    def frequencies(self, head_dim: int, theta: float) -> np.ndarray:
        """The angle of one position for each of the d/2 pairs, in float64."""
        plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.rope_type == "linear":
            return plain / self.factor
        kept = self._kept_by_wavelength(plain) if self.rope_type == "llama3" else None
        if kept is None:
            kept = self._kept_by_turns(head_dim, theta)
        return plain * kept + plain / self.factor * (1 - kept)

    def _kept_by_wavelength(self, plain: np.ndarray) -> np.ndarray:
        """The share (d/2,) of each pair's own frequency in the llama3 mixture."""
        turns = self._trained_context() * plain / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        return ((turns - low) / (high - low)).clip(0, 1)

    def _kept_by_turns(self, head_dim: int, theta: float) -> np.ndarray:
        """The share (d/2,) of each pair's own frequency in the yarn mixture."""

        def pair_that_turns(times: float) -> float:
            period = self._trained_context() / (2 * math.pi * times)
            return head_dim / 2 * math.log(period) / math.log(theta)

        first, last = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        width = last - first if last != first else 0.001
        return 1 - ((np.arange(head_dim // 2) - first) / width).clip(0, 1)

    def _trained_context(self) -> int:
        length = self.original_max_position_embeddings
        require(length is not None, f"rope_type {self.rope_type} needs the trained context")
        assert length is not None
        return length


def rope_scaling(given: object) -> RopeScaling | None:
    """Read the value of `rope_scaling`: None, a RopeScaling, or its keys in a config.json.

    The rope_type "default" gives None. Raises SessaError that names the key.
    """
    if given is None or isinstance(given, RopeScaling):
        return given
    require(isinstance(given, Mapping), f"rope_scaling is {given!r}, expected an object or null")
    assert isinstance(given, Mapping)
    keys = {name: value for name, value in given.items() if name != "type"}
    keys.setdefault("rope_type", given.get("type", "default"))
    if keys["rope_type"] == "default":
        return None
    names = {field.name for field in dataclasses.fields(RopeScaling)}
    if unknown := sorted(keys.keys() - names):
        raise SessaError(
            f"rope_scaling: unknown key {', '.join(unknown)}; known: {', '.join(sorted(names))}"
        )
    require("factor" in keys, f"rope_scaling of type {keys['rope_type']} has no `factor`")
    return RopeScaling(**keys)


def with_rope_scaling(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a config.json with `rope_theta` and `rope_scaling` alone.

    transformers writes both into `rope_parameters` since version 5. Raises SessaError for
    frequencies that differ between layers, for heads that are rotated in part, and for both
    spellings together.
    """
    rest = {name: value for name, value in given.items() if name != "rope_parameters"}
    parameters = given.get("rope_parameters")
    if parameters is None:
        return rest
    plain = isinstance(parameters, Mapping) and not any(
        isinstance(value, Mapping) for value in parameters.values()
    )
    expect(plain, "rope_parameters", parameters, "one object for all layers")
    require(rest.get("rope_scaling") is None, "rope_scaling and rope_parameters are both given")
    keys = dict(parameters)
    share = keys.pop("partial_rotary_factor", 1.0)
    expect(share == 1, "partial_rotary_factor", share, "1, because all of a head is rotated")
    if "rope_theta" in keys:
        rest["rope_theta"] = keys.pop("rope_theta")
    return {**rest, "rope_scaling": keys}
