"""Influence of position tau on position t: its measurement by derivatives.

Letters: T time, D width, l = t - tau lag, C curves (one for each text and tau), R rows of
cotangents, K the kernel (I - diag(gamma) alpha)^-1 of arXiv 2604.18580, where alpha is its feedback
attention over the strict past.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import ml_dtypes
import numpy as np

from sessa_common.config import SessaConfig

# A slope of a kernel needs at least this many points.
MIN_POINTS = 6
MAX_FLOATS = 2**28
MAX_POSITIONS = 2**17
EPSILON = float(np.finfo(np.float32).eps)


class InfluenceProbe(Protocol):
    """One model on one text: its derivatives and its routing, with NumPy arrays in and out."""

    config: SessaConfig
    length: int

    def squared_norms(
        self, first: int, last: int, times: np.ndarray, cotangents: np.ndarray
    ) -> np.ndarray:
        """Return the squared norms (R, max(times) + 1) of u^T dy_t/dx_tau for every tau.

        x is the input of layer `first`, y the output of layer `last` - 1. Row r has t = times[r]
        and u = cotangents[r]; times are (R,), cotangents (R, D).
        """

    def feedback(
        self, layer: int, sources: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return gains (T,), weights max_j alpha[t, j] (T,) and columns K[:, sources] (T, n)."""

    def decay(self, layer: int) -> np.ndarray:
        """Return the decay exp(A_log) dt (T, heads) of each head of a Mamba-2 layer."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Influence curves: values (C, n) at lags (n,)."""

    lags: np.ndarray
    values: np.ndarray

    @property
    def above_floor(self) -> np.ndarray:
        """Mask (C, n) of the values above float32 rounding of the largest value of their curve."""
        return self.values > EPSILON * self.values.max(1, keepdims=True)

    @property
    def below_floor(self) -> int:
        """Number of values that are lost in rounding, exact zeros included."""
        return int((~self.above_floor).sum())

    def quantile(self, level: float) -> np.ndarray:
        """Return a quantile (n,) over the curves."""
        return np.quantile(self.values, level, axis=0)


def log_lags(T: int, count: int = 24) -> np.ndarray:
    """Return 0 and about `count` whole lags from 1 to T - 1, evenly spaced in the logarithm."""
    grid = np.geomspace(1, T - 1, count).round().astype(int)
    return np.unique(np.concatenate([[0], grid]))


def rows_at_once(config: SessaConfig, layers: int, T: int) -> int:
    """Return how many cotangents fit through `layers` layers together in about 1 GiB."""
    widest = 8 * (config.hidden_size + config.mamba_expand * config.hidden_size)
    widest += config.intermediate_size + config.num_attention_heads * T
    return max(1, MAX_FLOATS // (2 * T * widest * layers))


def jacobian_norms(
    probe: InfluenceProbe, times: np.ndarray, first: int, last: int, *, draws: int, seed: int = 0
) -> np.ndarray:
    """Return the Frobenius norms (n, T) of dy_t/dx_tau for times (n,) and every tau.

    E |u^T J|^2 = |J|_F^2 for Gaussian u, so the norm is estimated from `draws` vectors u; with 0
    draws u runs over all D unit vectors, which is exact. A draw depends on the seed and t only.
    Rows are sorted by t from the latest on: layers are causal, so a batch of rows needs only the
    text up to its latest t.
    """
    D, latest = probe.config.hidden_size, np.argsort(-times)
    vectors = [
        np.random.default_rng([seed, t]).standard_normal((draws, D)) if draws else np.eye(D)
        for t in times[latest]
    ]
    cotangents = np.concatenate(vectors)
    index = np.repeat(latest, draws or D)  # index into `times` of each row
    squares = np.zeros((len(times), probe.length))
    start = 0
    while start < len(index):
        size = rows_at_once(probe.config, last - first, int(times[index[start]]) + 1)
        rows = slice(start, start + size)
        found = probe.squared_norms(first, last, times[index[rows]], cotangents[rows])
        np.add.at(squares[:, : found.shape[1]], index[rows], found)
        start += size
    return np.sqrt(squares / max(draws, 1))


def influence_curves(
    probes: Sequence[InfluenceProbe],
    sources: Sequence[int],
    first: int,
    last: int,
    *,
    draws: int,
    seed: int = 0,
    lags: int = 24,
) -> Curves:
    """Measure |dy_t/dx_tau|_F by lag, one curve for each text and each tau of `sources`.

    x is the input of layer `first`, y the output of layer `last` - 1, before any final norm. The
    largest lag is that from the last tau to the end of the shortest text.
    """
    grid = log_lags(min(probe.length for probe in probes) - max(sources), lags)
    positions = np.add.outer(sources, grid)  # (sources, n)
    times, index = np.unique(positions, return_inverse=True)
    curves = []
    for probe in probes:
        norms = jacobian_norms(probe, times, first, last, draws=draws, seed=seed)
        rows = index.reshape(positions.shape)
        curves += [norms[row, tau] for tau, row in zip(sources, rows, strict=True)]
    return Curves(lags=grid, values=np.stack(curves))


def kernel_slope(column: np.ndarray, tau: int, gamma: float) -> float | None:
    """Return the slope of log |K[t, tau]| against log(t + gamma / 2); None with too few points.

    column (T,) is K[:, tau]. Uniform routing with a constant gain has the slope -(1 - gamma) for
    every tau.
    """
    values = np.abs(column[tau + 1 :])
    t = np.arange(tau + 1, len(column))[values > EPSILON]
    if len(t) < MIN_POINTS:
        return None
    return float(np.polyfit(np.log(t + gamma / 2), np.log(values[values > EPSILON]), 1)[0])


def position_resolution(gamma: float) -> dict[str, int | None]:
    """Return, by dtype, the last t whose state differs from that of t - 1 by more than rounding.

    The states are the positional code of Lemma 4.10 (f = 1, uniform routing) at a constant gain
    between 0 and 1. The answer is None for MAX_POSITIONS or more, and for a gain outside (0, 1),
    which makes no such code.
    """
    dtypes = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
    if not 0 < gamma < 1:
        return dict.fromkeys(dtypes)
    t = np.arange(1, MAX_POSITIONS)
    ratio = np.concatenate([[1.0], np.cumprod((t + gamma) / (t + 1))])
    code = np.concatenate([[1.0], (1 - gamma**2 * ratio) / (1 - gamma)])
    found: dict[str, int | None] = {}
    for name, dtype in dtypes.items():
        lost = np.diff(code) <= float(ml_dtypes.finfo(dtype).eps) * code[:-1]
        found[name] = int(lost.argmax()) if lost.any() else None
    return found
