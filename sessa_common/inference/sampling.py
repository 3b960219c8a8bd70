"""Sampling of the next token from logits, in NumPy, so that every runtime draws the same one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sessa_common.errors import SessaError, expect


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Rules for drawing the next token: temperature, then top-k, top-p and min-p, in this order.

    temperature 0 takes the likeliest token; top_k 0, top_p 1 and min_p 0 are off. top_p keeps the
    likeliest tokens whose probabilities first reach it; min_p drops tokens below min_p times the
    likeliest one's probability. Raises SessaError when a number is out of its range.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        expect(
            0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more, finite"
        )
        expect(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        expect(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, at most 1 (off)")
        expect(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 (off) and 1")
        expect(self.seed >= 0, "seed", self.seed, "0 or more")


class Sampler:
    """Draws the tokens of one sequence; each row of a batch has its own random stream."""

    def __init__(self, config: SamplingConfig, row: int = 0) -> None:
        self.config = config
        self.rng = np.random.default_rng([config.seed, row])

    def __call__(self, logits: np.ndarray) -> int:
        """Draw the next token's id from logits (V,); SessaError when they are not finite."""
        scores = np.asarray(logits, np.float64)
        if np.isnan(scores).any() or not np.isfinite(scores.max()):
            raise SessaError("the model's logits are not finite numbers; the weights are damaged")
        if self.config.temperature == 0:
            return int(scores.argmax())
        logp = filter_logits(scores, self.config)
        # Gumbel noise belongs to a token's id, so rounding elsewhere cannot change the draw.
        return int((logp + self.rng.gumbel(size=logp.shape)).argmax())


def filter_logits(logits: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """Divide logits (V,) by the temperature and set those that the filters drop to -inf."""
    scores = (logits - logits.max()) / config.temperature
    if 0 < config.top_k < scores.size:
        scores = np.where(_first(scores, config.top_k), scores, -np.inf)
    if config.top_p < 1:
        p = np.sort(np.exp(scores))[::-1]
        before = p.cumsum() - p
        kept = int((before < config.top_p * p.sum()).sum())
        scores = np.where(_first(scores, kept), scores, -np.inf)
    if config.min_p > 0:
        scores = np.where(scores >= math.log(config.min_p), scores, -np.inf)
    return scores


def _first(scores: np.ndarray, count: int) -> np.ndarray:
    """Return True at the `count` largest scores; of equal ones the lower ids count."""
    chosen = np.zeros(scores.shape, bool)
    chosen[np.argsort(-scores, kind="stable")[:count]] = True
    return chosen
