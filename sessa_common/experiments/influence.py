"""How strongly position tau still moves position t: measuring it, fitting a law, drawing it.

Letters: T time, D width, l = t - tau lag, C curves (one a text and tau), R resamples, K the kernel
(I - diag(gamma) alpha)^-1 of arXiv 2604.18580, alpha its feedback attention over the strict past.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from sessa_common.config import SessaConfig

LAWS = ("power law", "exponential", "1/lag", "flat")
FALLING = LAWS[:3]
# Shorter lags belong to convolutions and neighbouring tokens, not to a tail.
FIRST_LAG = 4
FEWEST_POINTS = 6
RESAMPLES, BLOCK = 400, 3
# A law is called sure when it wins this share of the resamples.
SURE = 0.8
FLOATS_AT_ONCE = 2**28
MOST_POSITIONS = 2**17
EPSILON = float(np.finfo(np.float32).eps)
# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


class InfluenceProbe(Protocol):
    """One model on one text: its derivatives and its routing, NumPy in and out."""

    config: SessaConfig
    length: int

    def squared_norms(
        self, first: int, last: int, times: np.ndarray, cotangents: np.ndarray
    ) -> np.ndarray:
        """Squared norms (R, max(times) + 1) over tau of u^T dy_t/dx_tau, a row for each t and u.

        x is the input of layer `first`, y the output of layer `last` - 1; times (R,),
        cotangents (R, D).
        """

    def feedback(
        self, layer: int, sources: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gains (T,), the largest weight max_j alpha[t, j] (T,), columns K[:, sources] (T, n)."""

    def decay(self, layer: int) -> np.ndarray:
        """What each head of a Mamba-2 layer forgets at each token, exp(A_log) dt, (T, heads)."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Influence at lags (n,): values (C, n)."""

    lags: np.ndarray
    values: np.ndarray

    @property
    def above_floor(self) -> np.ndarray:
        """Which values (C, n) exceed float32 rounding of the largest value of their curve."""
        return self.values > EPSILON * self.values.max(1, keepdims=True)

    @property
    def below_floor(self) -> int:
        """How many values are lost in rounding, exact zeros included."""
        return int((~self.above_floor).sum())

    def quantile(self, share: float) -> np.ndarray:
        """A quantile over the curves, (n,)."""
        return np.quantile(self.values, share, axis=0)


@dataclass(frozen=True, kw_only=True)
class Law:
    """One law's fit: log v = scale - rate * (log l, l, log l or 0), a scale for each curve.

    low and high bound 95 % of the bootstrap's rates; weight is the BIC weight, which takes
    neighbouring points for independent; share the part of the resamples that this law won.
    """

    rate: float
    low: float
    high: float
    scale: float
    r2: float
    weight: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The law with the most resamples, whether it is sure, and every law's numbers."""

    best: str
    sure: bool
    points: int
    laws: dict[str, Law]

    def describe(self) -> str:
        """One phrase: the law with its interval, or the candidates when it is not sure."""
        if not self.laws:
            return "too few points"
        law = self.laws[self.best]
        if not self.sure:
            ranked = sorted(LAWS, key=lambda name: -self.laws[name].share)[:2]
            return "unsure: " + ", ".join(f"{x} {self.laws[x].share:.0%}" for x in ranked)
        interval = f"[{law.low:.3g}, {law.high:.3g}]"
        shape = {"power law": f"lag^-{law.rate:.3g} {interval}",
                 "exponential": f"e^(-{law.rate:.3g} lag) {interval}",
                 "1/lag": "1/lag"}[self.best]  # fmt: skip
        return f"{shape}; {law.share:.0%} sure"

    def predict(self, lags: np.ndarray) -> np.ndarray:
        """The best law at lags (n,), with the median scale of the curves."""
        law = self.laws[self.best]
        return np.exp(law.scale - law.rate * _abscissa(self.best, lags))


def log_lags(T: int, count: int = 24) -> np.ndarray:
    """0 and about `count` whole lags from 1 to T - 1, evenly spaced in the logarithm."""
    grid = np.geomspace(1, T - 1, count).round().astype(int)
    return np.unique(np.concatenate([[0], grid]))


def rows_at_once(config: SessaConfig, layers: int, T: int) -> int:
    """How many cotangents to carry through `layers` layers together in about 1 GiB."""
    widest = 8 * (config.hidden_size + config.mamba_expand * config.hidden_size)
    widest += config.intermediate_size + config.num_attention_heads * T
    return max(1, FLOATS_AT_ONCE // (2 * T * widest * layers))


def jacobian_norms(
    probe: InfluenceProbe, times: np.ndarray, first: int, last: int, *, probes: int, seed: int = 0
) -> np.ndarray:
    """Frobenius norms (n, T) of dy_t/dx_tau for times (n,) and every tau.

    E |u^T J|^2 = |J|_F^2 for Gaussian u, averaged over `probes` draws; 0 probes take all D unit
    vectors, which is exact. A draw depends on the seed and t only. Layers are causal, so rows go
    latest first and each batch reads only the text up to its latest t.
    """
    D, latest = probe.config.hidden_size, np.argsort(-times)
    cotangents = np.concatenate([
        np.random.default_rng([seed, t]).standard_normal((probes, D)) if probes else np.eye(D)
        for t in times[latest]
    ])  # fmt: skip
    index = np.repeat(latest, probes or D)  # of the time, by row
    squares = np.zeros((len(times), probe.length))
    start = 0
    while start < len(index):
        size = rows_at_once(probe.config, last - first, int(times[index[start]]) + 1)
        rows = slice(start, start + size)
        found = probe.squared_norms(first, last, times[index[rows]], cotangents[rows])
        np.add.at(squares[:, : found.shape[1]], index[rows], found)
        start += size
    return np.sqrt(squares / max(probes, 1))


def influence_curves(
    influence_probes: Sequence[InfluenceProbe],
    sources: Sequence[int],
    first: int,
    last: int,
    *,
    probes: int,
    seed: int = 0,
    lags: int = 24,
) -> Curves:
    """|dy_t/dx_tau|_F by lag, one curve for each text and each tau of `sources`.

    x is the input of layer `first`, y the output of layer `last` - 1, before any final norm. Lags
    end where the last tau meets the end of the shortest text.
    """
    grid = log_lags(min(probe.length for probe in influence_probes) - max(sources), lags)
    at = np.add.outer(sources, grid)  # (sources, n)
    times, places = np.unique(at, return_inverse=True)
    curves = []
    for probe in influence_probes:
        norms = jacobian_norms(probe, times, first, last, probes=probes, seed=seed)
        curves += [
            norms[row, tau] for tau, row in zip(sources, places.reshape(at.shape), strict=True)
        ]
    return Curves(lags=grid, values=np.stack(curves))


def _abscissa(law: str, lags: np.ndarray) -> np.ndarray:
    if law == "exponential":
        return lags.astype(float)
    return np.zeros(len(lags)) if law == "flat" else np.log(np.maximum(lags, 1))


def fit_laws(curves: Curves, *, seed: int = 0) -> Fit:
    """Fit every law to log influence against lag, and count how often each wins a bootstrap.

    Least squares with one scale a curve, over the values above the noise floor from FIRST_LAG on. A
    resample draws curves with replacement and blocks of neighbouring points inside each; the law
    with the lowest BIC wins it. The best law is sure when it wins at least SURE of them and falls.
    """
    used = curves.above_floor & (curves.lags >= FIRST_LAG)
    curve, point = np.nonzero(used)
    lags = curves.lags[point]
    if len(np.unique(lags)) < FEWEST_POINTS:
        return Fit(best="", sure=False, points=len(lags), laws={})
    logs = np.log(curves.values[used])
    weights = _resamples(curve, np.random.default_rng(seed))  # (R, N)
    members = (curve[:, None] == np.unique(curve)).astype(float)  # (N, C)
    fitted = {law: _least_squares(law, lags, logs, weights, members) for law in LAWS}
    bic = np.stack([fitted[law][1] for law in LAWS])  # (laws, 1 + R), the data itself first
    likelihood = np.exp(-(bic[:, 0] - bic[:, 0].min()) / 2)
    shares = np.bincount(bic[:, 1:].argmin(0), minlength=len(LAWS)) / (bic.shape[1] - 1)
    laws = {}
    for i, law in enumerate(LAWS):
        rates, _, r2 = fitted[law]
        low, high = np.quantile(rates[1:], (0.025, 0.975))
        scale = np.median((logs + rates[0] * _abscissa(law, lags)) @ members / members.sum(0))
        laws[law] = Law(rate=float(rates[0]), low=float(low), high=float(high), scale=float(scale),
                        r2=float(r2), weight=float(likelihood[i] / likelihood.sum()),
                        share=float(shares[i]))  # fmt: skip
    best = LAWS[int(shares.argmax())]
    sure = best in FALLING and laws[best].low > 0 and laws[best].share >= SURE
    return Fit(best=best, sure=sure, points=len(lags), laws=laws)


def _resamples(curve: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How often each point counts, (1 + R, N): once, then curves and blocks inside them drawn."""
    names = np.unique(curve)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)
    weights = np.ones((1 + RESAMPLES, len(curve)))
    for i, name in enumerate(names):
        points = np.flatnonzero(curve == name)
        n = len(points)
        starts = rng.integers(0, n, (RESAMPLES, -(-n // BLOCK), 1))
        block = ((starts + np.arange(BLOCK)) % n).reshape(RESAMPLES, -1)[:, :n]
        counts = np.stack([np.bincount(row, minlength=n) for row in block])
        weights[1:, points] = counts * drawn[:, i : i + 1]
    return weights


def _least_squares(
    law: str, lags: np.ndarray, logs: np.ndarray, weights: np.ndarray, members: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Rates (1 + R,), BIC (1 + R,) and the data's R^2, by weighted sums about each curve's mean."""
    x = _abscissa(law, lags)
    counts = np.maximum(weights @ members, 1)

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        means = ((weights * a) @ members) * ((weights * b) @ members) / counts
        return (weights * a * b).sum(1) - means.sum(1)

    xx, xy, yy = product(x, x), product(x, logs), product(logs, logs)
    free = law in ("power law", "exponential")
    rates = -xy / np.maximum(xx, 1e-30) if free else np.full(len(xx), float(law == "1/lag"))
    residual = np.maximum(yy + 2 * rates * xy + rates**2 * xx, 1e-12)
    n = weights.sum(1)
    bic = n * np.log(residual / n) + free * np.log(n)
    return rates, bic, 1 - residual[0] / max(yy[0], 1e-12)


def kernel_slope(column: np.ndarray, tau: int, gamma: float) -> float | None:
    """Slope of log |K[t, tau]| against log(t + gamma / 2), None with under FEWEST_POINTS points.

    column (T,) is K[:, tau]. Uniform routing with a constant gain gives -(1 - gamma) for any tau.
    """
    values = np.abs(column[tau + 1 :])
    t = np.arange(tau + 1, len(column))[values > EPSILON]
    if len(t) < FEWEST_POINTS:
        return None
    return float(np.polyfit(np.log(t + gamma / 2), np.log(values[values > EPSILON]), 1)[0])


def position_resolution(gamma: float) -> dict[str, int | None]:
    """By dtype, the last t whose state differs from that of t - 1 by more than rounding.

    The states are the positional code of Lemma 4.10 (f = 1, uniform routing) at a constant gain
    from 0 to 1. None stands for MOST_POSITIONS or more, and for a gain that makes no such code.
    """
    dtypes = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
    if not 0 < gamma < 1:
        return dict.fromkeys(dtypes)
    t = np.arange(1, MOST_POSITIONS)
    ratio = np.concatenate([[1.0], np.cumprod((t + gamma) / (t + 1))])
    code = np.concatenate([[1.0], (1 - gamma**2 * ratio) / (1 - gamma)])
    found: dict[str, int | None] = {}
    for name, dtype in dtypes.items():
        lost = np.diff(code) <= float(ml_dtypes.finfo(dtype).eps) * code[:-1]
        found[name] = int(lost.argmax()) if lost.any() else None
    return found


def feedback_report(
    influence_probes: Sequence[InfluenceProbe], layer: int, sources: Sequence[int], lags: np.ndarray
) -> dict[str, Any]:
    """The fixed-routing kernel of a Sessa layer and the quantities of Theorem 8, over all texts.

    slope is the median over texts and sources of `kernel_slope`; lags (n,) is where "kernel", its
    median absolute value, is read.
    """
    found = [probe.feedback(layer, sources) for probe in influence_probes]
    gamma = np.concatenate([gains for gains, _, _ in found])
    mean, largest = float(gamma.mean()), float(np.abs(gamma).max())
    c2 = max(float((np.arange(len(peak)) * peak).max()) for _, peak, _ in found)
    slopes, columns = [], []
    for _, _, kernel in found:
        for tau, column in zip(sources, kernel.T, strict=True):
            slopes.append(kernel_slope(column, tau, mean))
            columns.append(np.abs(column[tau + lags]))
    curves = Curves(lags=lags, values=np.stack(columns))
    known = [slope for slope in slopes if slope is not None]
    return {
        "gamma": {"min": float(gamma.min()), "mean": mean, "max": float(gamma.max())},
        "gain_bound": 1 / (1 - largest),
        "c2": c2,
        "eta": c2 * largest,
        "theorem_8": c2 * largest < 1,
        "slope": float(np.median(known)) if known else None,
        "slopes": slopes,
        "uniform_slope": -(1 - mean),
        "positions": position_resolution(mean),
        "kernel": curves_report(curves, fit_laws(curves)),
    }


def memory_report(
    influence_probes: Sequence[InfluenceProbe], layer: int, tau: int
) -> dict[str, Any]:
    """Freeze time sum exp(A_log) dt of each head of a Mamba-2 layer from tau to the text's end.

    Numbers are means over the texts; a state fades by e^-freeze_time over the interval.
    """
    decays = [probe.decay(layer)[tau + 1 :] for probe in influence_probes]
    rate = np.mean([decay.mean(0) for decay in decays], 0)
    total = np.mean([decay.sum(0) for decay in decays], 0)
    return {"rate": rate.tolist(), "freeze_time": total.tolist()}


def curves_report(curves: Curves, fit: Fit) -> dict[str, Any]:
    """Every number of a set of curves and of its fit, for JSON."""

    laws = {name: dict(vars(law)) for name, law in fit.laws.items()}
    return {
        "lags": curves.lags.tolist(),
        "median": curves.quantile(0.5).tolist(),
        "low": curves.quantile(0.1).tolist(),
        "high": curves.quantile(0.9).tolist(),
        "values": curves.values.tolist(),
        "below_floor": curves.below_floor,
        "fit": {"best": fit.best or None, "sure": fit.sure, "points": fit.points,
                "text": fit.describe(), "laws": laws},
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What the picture shows of one checkpoint: end to end, and each layer's fit by its number."""

    name: str
    mixer: str
    curves: Curves
    fit: Fit
    layers: dict[int, Fit]


def draw_influence(path: Path, drawn: Sequence[Drawn]) -> bool:
    """Write a PNG of influence against lag and of the layers' slopes; False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    main, side = figure.subplots(1, 2, width_ratios=(3, 1))
    for i, one in enumerate(drawn):
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        _draw_curves(main, one, style)
        _draw_slopes(side, one, style, (i - (len(drawn) - 1) / 2) * 0.12)
    main.set(xscale="log", yscale="log", xlabel="lag  t − τ  (tokens)",
             ylabel="‖∂y(t) / ∂x(τ)‖", title="How much an old token still matters")  # fmt: skip
    if not any(one.curves.above_floor[:, 1:].any() for one in drawn):
        main.set(xlim=(1, 10), ylim=(0.1, 1))  # A logarithmic axis finds no limits of its own.
    figure.legend(loc="outside lower center")
    side.axhline(-1, color="#888888", linewidth=1, linestyle=":", zorder=0)
    side.set(xlabel="layer", ylabel="log-log slope of the layer alone",
             title="Each layer (dotted: 1/lag)")  # fmt: skip
    side.xaxis.get_major_locator().set_params(integer=True)
    for axes in (main, side):
        axes.grid(alpha=0.3)
    scratch = path.with_name(path.name + ".tmp")
    figure.savefig(scratch, format="png", dpi=150)
    os.replace(scratch, path)
    return True


def _draw_curves(axes: Any, one: Drawn, style: dict[str, Any]) -> None:
    curves, fit = one.curves, one.fit
    shown = np.where(curves.above_floor, curves.values, np.nan)[:, 1:]
    lags = curves.lags[1:]
    some = ~np.isnan(shown).all(0)
    label = f"{one.name} ({one.mixer}): {fit.describe()}"
    if not some.any():  # Named without a curve: nothing matters beyond the token's own position.
        axes.plot([], [], label=label, **style)
        return
    low, middle, high = np.nanquantile(shown[:, some], (0.1, 0.5, 0.9), axis=0)
    axes.plot(lags[some], middle, label=label, linewidth=1.2, markersize=4, **style)
    axes.fill_between(lags[some], low, high, color=style["color"], alpha=0.15, linewidth=0)
    fitted = lags[some & (lags >= FIRST_LAG)]
    if fit.laws and len(fitted):
        grid = np.geomspace(fitted[0], fitted[-1], 200)
        axes.plot(grid, fit.predict(grid), "--", color=style["color"], linewidth=1.5)


def _draw_slopes(axes: Any, one: Drawn, style: dict[str, Any], shift: float) -> None:
    fits = {layer: fit.laws["power law"] for layer, fit in one.layers.items() if fit.laws}
    if fits:
        middle = np.array([-law.rate for law in fits.values()])
        ends = np.array([[-law.high, -law.low] for law in fits.values()])
        errors = np.abs(np.clip((ends - middle[:, None]) * [-1, 1], 0, None)).T
        axes.errorbar([layer + shift for layer in fits], middle, errors, linestyle="none",
                      markersize=5, capsize=2, **style)  # fmt: skip
