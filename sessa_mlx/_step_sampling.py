"""The choice of the next tokens on the device, as `sessa_common.inference.sampling` has it."""

from __future__ import annotations

import math
from functools import partial

import mlx.core as mx
import numpy as np

from sessa_common.errors import SessaError
from sessa_common.inference.sampling import NOT_FINITE, GumbelNoise, SamplingConfig
from sessa_mlx._device import on_gpu


class DeviceSampler:
    """Chooses the ids that `sampling.choose` takes, without bringing the logits to the host.

    The noise is drawn on the host, for the next token while the device computes this one.
    """

    def __init__(self, config: SamplingConfig, noise: GumbelNoise) -> None:
        self.random, self.noise = config.temperature > 0, noise
        choose = partial(_choose, config)
        self.run = mx.compile(choose) if on_gpu() else choose

    def choose(self, logits: mx.array, ahead: int = 0) -> mx.array:
        """The ids (B,) int32 for logits (B, V), `ahead` draws after the next; not evaluated."""
        return self.run(logits, mx.array(self.noise.peek(ahead)) if self.random else None)

    def take(self, ids: mx.array) -> np.ndarray:
        """Wait for chosen ids and return them as int64; their noise is used up.

        Raises SessaError when their logits were not finite.
        """
        found = np.array(ids).astype(np.int64)
        if found.min() < 0:
            raise SessaError(NOT_FINITE)
        if self.random:
            self.noise.take()
        return found


def _choose(config: SamplingConfig, logits: mx.array, noise: mx.array | None) -> mx.array:
    """The ids (B,) int32 for logits (B, V) float32; -1 where the largest logit is not finite."""
    top = logits.max(-1, keepdims=True)
    scores = logits if noise is None else filter_logits(logits - top, config) + noise
    return mx.where(mx.isfinite(top[:, 0]), scores.argmax(-1).astype(mx.int32), -1)


def filter_logits(scores: mx.array, config: SamplingConfig) -> mx.array:
    """`sampling.filter_logits` of logits (B, V) less their largest, with the same operations."""
    V = scores.shape[-1]
    scores = scores * config.inverse_temperature.item()
    if 0 < config.top_k < V or config.top_p < 1:
        ranked = -mx.sort(-scores, axis=-1)
        counts = mx.full((len(scores), 1), min(config.top_k or V, V), dtype=mx.int32)
        if config.top_p < 1:
            counts = _nucleus(ranked, counts, config.top_p)
        scores = mx.where(_first(scores, ranked, counts), scores, -mx.inf)
    if config.min_p > 0:
        scores = mx.where(scores >= float(np.float32(math.log(config.min_p))), scores, -mx.inf)
    return scores


def _nucleus(ranked: mx.array, counts: mx.array, top_p: float) -> mx.array:
    """Count (B, 1) the likeliest tokens, of `counts`, that first reach top_p of their sum.

    The sums are in float64 as on the host where MLX has it, which is on the CPU alone. Sums in
    float32 choose other tokens only if a sum is within rounding of top_p.
    """
    work = mx.float32 if on_gpu() else mx.float64
    p = mx.where(mx.arange(ranked.shape[-1]) < counts, mx.exp(ranked), 0).astype(work)
    before = mx.cumsum(p, axis=-1) - p
    reached = before < top_p * p.sum(-1, keepdims=True)
    return mx.minimum(reached.sum(-1, keepdims=True), counts)


def _first(scores: mx.array, ranked: mx.array, counts: mx.array) -> mx.array:
    """True at the `counts` (B, 1) largest scores, which are `ranked`; of equal ones the lower ids.

    A bool (B, V).
    """
    least = mx.take_along_axis(ranked, counts - 1, axis=-1)
    above, equal = scores > least, scores == least
    missing = counts - above.sum(-1, keepdims=True)
    return above | (equal & (mx.cumsum(equal.astype(mx.int32), axis=-1) <= missing))
