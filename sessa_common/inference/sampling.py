"""Sampling of the next tokens from logits, defined in float32 so that every runtime agrees."""

from __future__ import annotations

import functools
import math
import os
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from sessa_common.errors import SessaError, expect

# The largest factor on the logits: a smaller temperature than its inverse takes the likeliest
# token, and the products stay finite.
LARGEST_INVERSE_TEMPERATURE = 1e30
# Rows of a smaller vocabulary are drawn faster than handed to a thread.
THREADED_VOCABULARY, MOST_THREADS = 16_384, 16
NOT_FINITE = "the model's logits are not finite numbers; the weights are damaged"


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

    @property
    def inverse_temperature(self) -> np.float32:
        """The factor 1 / temperature on the logits; for temperatures above 0."""
        return np.float32(min(1 / self.temperature, LARGEST_INVERSE_TEMPERATURE))


class GumbelNoise:
    """The noise of every token id for the next draws of a batch, which does not depend on logits.

    Row r of the batch reads the random stream (seed, rows[r]), one draw of `vocab_size` numbers for
    each token. A runtime may look at the noise of later tokens before it takes that of the next.
    """

    def __init__(self, seed: int, rows: Iterable[int], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.streams = [np.random.default_rng([seed, row]) for row in rows]
        self.ahead: deque[np.ndarray] = deque()
        self.drawing: list[Future[np.ndarray]] = []  # of each row, of the draw after `ahead`

    def begin(self) -> None:
        """Start to draw the noise that follows what is at hand, in threads."""
        if not self.drawing:
            self.drawing = [
                _threads().submit(_gumbel, stream, self.vocab_size) for stream in self.streams
            ]

    def peek(self, turn: int = 0) -> np.ndarray:
        """Return the noise (B, V) float32 of the draw `turn` draws after the next."""
        while len(self.ahead) <= turn:
            self.ahead.append(np.stack(self._draw()))
        return self.ahead[turn]

    def _draw(self) -> list[np.ndarray]:
        if self.drawing:
            begun, self.drawing = self.drawing, []
            return [row.result() for row in begun]
        sizes = [self.vocab_size] * len(self.streams)
        if len(sizes) > 1 and self.vocab_size >= THREADED_VOCABULARY:
            return list(_threads().map(_gumbel, self.streams, sizes))
        return list(map(_gumbel, self.streams, sizes))

    def take(self) -> np.ndarray:
        """Return the noise (B, V) float32 of the next draw and go on to the one after it."""
        found = self.peek()
        self.ahead.popleft()
        return found

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch; each goes on in its own stream."""
        if self.drawing:
            self.ahead.append(np.stack(self._draw()))
        self.streams = [self.streams[row] for row in rows]
        self.ahead = deque(noise[list(rows)] for noise in self.ahead)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "sessa-noise")


def _gumbel(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return -log(-log(1 - u)), float32, for the u of rng.random: the numbers of rng.gumbel.

    Both logarithms are of float32 numbers, which is several times faster. The inner one needs all
    digits of a small u, which 1 - u lost in rounding: the factor u / (1 - rounded) restores them.
    """
    u = np.maximum(rng.random(size), 1e-30)
    rounded = (1 - u).astype(np.float32)
    u = u.astype(np.float32)
    lost = 1 - rounded
    with np.errstate(divide="ignore", invalid="ignore"):
        inner = np.where(lost == 0, u, -np.log(rounded) * (u / lost))
    return -np.log(inner)


def choose(
    logits: np.ndarray,  # (B, V)
    config: SamplingConfig,
    noise: GumbelNoise,
) -> np.ndarray:
    """Pick the next ids (B,) int64 with the noise of the next draw, which is taken; see `pick`."""
    return pick(logits, config, noise.take() if config.temperature > 0 else None)


def pick(
    logits: np.ndarray,  # (B, V)
    config: SamplingConfig,
    noise: np.ndarray | None,  # (B, V), None at temperature 0
) -> np.ndarray:
    """Pick the ids (B,) int64 of the largest score plus noise, the lowest id of equal ones.

    Raises SessaError when logits are not finite; -inf stands for a token that cannot be chosen.
    """
    scores = np.asarray(logits, np.float32)
    # The largest is NaN when any is, and -inf when no token can be chosen.
    if not np.isfinite(scores.max(axis=-1)).all():
        raise SessaError(NOT_FINITE)
    if noise is not None:
        scores = filter_logits(scores, config) + noise
    return scores.argmax(axis=-1)


def filter_logits(logits: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """Return scores (B, V) float32: log-probabilities up to a constant, -inf where dropped.

    The order of operations is the definition, which a device repeats: subtract the largest logit,
    multiply by 1 / temperature, then the filters.
    """
    scores = np.asarray(logits, np.float32)
    scores = (scores - scores.max(axis=-1, keepdims=True)) * config.inverse_temperature
    B, V = scores.shape
    limited = 0 < config.top_k < V
    if limited or config.top_p < 1:
        counts = np.full((B, 1), config.top_k if limited else V)
        ranked = -np.sort(-scores, axis=-1)
        if config.top_p < 1:
            counts = _nucleus(ranked, counts, config.top_p)
        scores = np.where(_first(scores, ranked, counts), scores, np.float32(-np.inf))
    if config.min_p > 0:
        least = np.float32(math.log(config.min_p))
        scores = np.where(scores >= least, scores, np.float32(-np.inf))
    return scores


def _nucleus(ranked: np.ndarray, counts: np.ndarray, top_p: float) -> np.ndarray:
    """Return how many (B, 1) of the `counts` likeliest tokens first reach top_p of their sum."""
    p = np.where(np.arange(ranked.shape[-1]) < counts, np.exp(ranked), 0).astype(np.float64)
    before = p.cumsum(axis=-1) - p
    reached = before < top_p * p.sum(axis=-1, keepdims=True)
    return np.minimum(reached.sum(axis=-1, keepdims=True), counts)


def _first(scores: np.ndarray, ranked: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return True at the `counts` (B, 1) largest scores; of equal ones the lower ids count.

    `ranked` are the scores in falling order.
    """
    least = np.take_along_axis(ranked, counts - 1, axis=-1)
    above, equal = scores > least, scores == least
    missing = counts - above.sum(axis=-1, keepdims=True)
    return above | (equal & (equal.cumsum(axis=-1) <= missing))
