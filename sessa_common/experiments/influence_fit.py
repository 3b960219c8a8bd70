"""Fit of laws to influence curves: power law, exponential, 1/lag and a flat line.

Letters: C curves, R resamples of the bootstrap, N points of all curves together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sessa_common.experiments.influence import MIN_POINTS, Curves

LAWS = ("power law", "exponential", "1/lag", "flat")
FALLING_LAWS = LAWS[:3]
# Shorter lags show convolutions and neighbouring tokens, not the tail of the influence.
FIRST_LAG = 4
RESAMPLES, BLOCK = 400, 3
# The best law is significant when it wins at least this share of the resamples.
SIGNIFICANT_SHARE = 0.8


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The fit of one law: log v = scale - rate * x, with one scale for each curve.

    x is log l for the power law and for 1/lag (where the rate is 1), l for the exponential, 0 for
    the flat line. `low` and `high` bound 95 % of the rates of the bootstrap. `weight` is the BIC
    weight, which treats neighbouring points as independent. `bootstrap_share` is the share of the
    resamples in which the law has the lowest BIC.
    """

    rate: float
    low: float
    high: float
    scale: float
    r2: float
    weight: float
    bootstrap_share: float


@dataclass(frozen=True, kw_only=True)
class LawSelection:
    """The fits of all laws, the law that wins most resamples, and whether it is significant.

    Without enough points `best` is empty and `fits` has none.
    """

    best: str
    is_significant: bool
    points: int
    fits: dict[str, Fit]

    def describe(self) -> str:
        """Describe the best law with its interval, or the candidates if none is significant."""
        if not self.fits:
            return "too few points"
        fit = self.fits[self.best]
        if not self.is_significant:
            ranked = sorted(LAWS, key=lambda law: -self.fits[law].bootstrap_share)[:2]
            candidates = (f"{law} {self.fits[law].bootstrap_share:.0%}" for law in ranked)
            return "not significant: " + ", ".join(candidates)
        interval = f"[{fit.low:.3g}, {fit.high:.3g}]"
        shapes = {
            "power law": f"lag^-{fit.rate:.3g} {interval}",
            "exponential": f"e^(-{fit.rate:.3g} lag) {interval}",
            "1/lag": "1/lag",
        }
        return f"{shapes[self.best]}; {fit.bootstrap_share:.0%} of resamples"

    def predict(self, lags: np.ndarray) -> np.ndarray:
        """Evaluate the best law at lags (n,), with the median scale of the curves."""
        fit = self.fits[self.best]
        return np.exp(fit.scale - fit.rate * _abscissa(self.best, lags))


def _abscissa(law: str, lags: np.ndarray) -> np.ndarray:
    if law == "exponential":
        return lags.astype(float)
    return np.zeros(len(lags)) if law == "flat" else np.log(np.maximum(lags, 1))


def fit_laws(curves: Curves, *, seed: int = 0) -> LawSelection:
    """Fit every law to log influence against lag, and count how often each wins in a bootstrap.

    The fit is by least squares with one scale per curve, over the values above the noise floor from
    FIRST_LAG on. A resample draws curves with replacement, and blocks of neighbouring points within
    each; the law with the lowest BIC wins it. The best law is significant when it wins at least
    SIGNIFICANT_SHARE of the resamples, falls, and has a positive rate in 95 % of them.
    """
    used = curves.above_floor & (curves.lags >= FIRST_LAG)
    curve, point = np.nonzero(used)
    lags = curves.lags[point]
    if len(np.unique(lags)) < MIN_POINTS:
        return LawSelection(best="", is_significant=False, points=len(lags), fits={})
    logs = np.log(curves.values[used])
    weights = _resamples(curve, np.random.default_rng(seed))  # (R, N)
    members = (curve[:, None] == np.unique(curve)).astype(float)  # (N, C)
    found = {law: _least_squares(law, lags, logs, weights, members) for law in LAWS}
    bic = np.stack([found[law][1] for law in LAWS])  # (laws, 1 + R), the data itself first
    likelihood = np.exp(-(bic[:, 0] - bic[:, 0].min()) / 2)
    shares = np.bincount(bic[:, 1:].argmin(0), minlength=len(LAWS)) / (bic.shape[1] - 1)
    fits = {}
    for i, law in enumerate(LAWS):
        rates, _, r2 = found[law]
        low, high = np.quantile(rates[1:], (0.025, 0.975))
        scale = np.median((logs + rates[0] * _abscissa(law, lags)) @ members / members.sum(0))
        fits[law] = Fit(
            rate=float(rates[0]),
            low=float(low),
            high=float(high),
            scale=float(scale),
            r2=float(r2),
            weight=float(likelihood[i] / likelihood.sum()),
            bootstrap_share=float(shares[i]),
        )
    best = LAWS[int(shares.argmax())]
    is_significant = (
        best in FALLING_LAWS
        and fits[best].low > 0
        and fits[best].bootstrap_share >= SIGNIFICANT_SHARE
    )
    return LawSelection(best=best, is_significant=is_significant, points=len(lags), fits=fits)


def _resamples(curve: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return how often each point counts (1 + R, N): once in row 0, then as the resamples drew."""
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
    """Fit one law: rates (1 + R,), BIC (1 + R,), and R^2 without resampling.

    Sums are weighted and taken about the mean of each curve.
    """
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
