"""The report of `sessa influence` on one checkpoint: curves, fits, kernels and decay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sessa_common.errors import SessaError
from sessa_common.experiments.influence import (
    Curves,
    InfluenceProbe,
    influence_curves,
    kernel_slope,
    position_resolution,
)
from sessa_common.experiments.influence_fit import FIRST_LAG, LawSelection, fit_laws
from sessa_common.experiments.influence_job import InfluenceJob

MEANING = (
    "Influence is the Frobenius norm of dy(t)/dx(tau). End to end, x is the embedded tokens and y "
    "the output of the last block before the final norm; for a layer, x is its input and y its "
    f"output. Laws are fitted from lag {FIRST_LAG} on. Resamples: the share of bootstrap resamples "
    "(of texts, tau and blocks of lags) in which the law has the lowest BIC of power law, "
    "exponential, 1/lag and flat; R² measures how well it fits. Brackets: 95 % of the resampled "
    "parameter. Slope: the exponent of the power law. Lost: values below float32 rounding of the "
    "peak of their curve, which are left out."
)
# Random vectors per position, from which the norm is estimated.
DRAWS = 4


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The influence in one checkpoint: its report, and the parts that the picture shows."""

    name: str
    mixer: str
    report: dict[str, Any]
    curves: Curves
    selection: LawSelection
    layers: dict[int, LawSelection]


def measure(
    job: InfluenceJob, probes: Sequence[InfluenceProbe], *, draws: int = DRAWS, seed: int = 0
) -> Measurement:
    """Measure what a job asks for, with one probe per text and `draws` random vectors per position.

    Raises SessaError when the derivatives are not finite.
    """
    depth, kinds = job.config.num_hidden_layers, job.config.kinds

    def curves_of(first: int, last: int) -> Curves:
        return influence_curves(probes, job.sources, first, last, draws=draws, seed=seed)

    curves = curves_of(0, depth)
    if not np.isfinite(curves.values).all():
        raise SessaError(f"{job.folder}: the derivatives are not finite; check the weights")
    selection = fit_laws(curves, seed=seed)
    entries, layers = [], {}
    for i in job.layers:
        alone = curves_of(i, i + 1)
        layers[i] = fit_laws(alone, seed=seed)
        entry = {"layer": i, "mixer": kinds[i].name, **curves_report(alone, layers[i])}
        if kinds[i].feeds_back:
            entry["feedback"] = feedback_report(probes, i, job.sources, alone.lags)
        if kinds[i].mixer == "mamba2":
            entry["memory"] = memory_report(probes, i, job.sources[0])
        entries.append(entry)
    mixer = "+".join(dict.fromkeys(kind.name for kind in kinds))
    report = {
        "name": job.name,
        "mixer": mixer,
        "tokens": [len(ids) for ids in job.texts],
        "tau": job.sources,
        "end_to_end": curves_report(curves, selection),
        "layers": entries,
    }
    return Measurement(
        name=job.name,
        mixer=mixer,
        report=report,
        curves=curves,
        selection=selection,
        layers=layers,
    )


def feedback_report(
    probes: Sequence[InfluenceProbe], layer: int, sources: Sequence[int], lags: np.ndarray
) -> dict[str, Any]:
    """Report the fixed-routing kernel of a layer with feedback, and the numbers of Theorem 8.

    All texts count. "slope" is the median of `kernel_slope` over texts and sources; "kernel" has
    the absolute values of the kernel at lags (n,).
    """
    found = [probe.feedback(layer, sources) for probe in probes]
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


def memory_report(probes: Sequence[InfluenceProbe], layer: int, tau: int) -> dict[str, Any]:
    """Report the freeze time, the sum of exp(A_log) dt from tau to the end, of each Mamba-2 head.

    Numbers are means over the texts; a state fades by e^-freeze_time over the interval.
    """
    decays = [probe.decay(layer)[tau + 1 :] for probe in probes]
    rate = np.mean([decay.mean(0) for decay in decays], 0)
    total = np.mean([decay.sum(0) for decay in decays], 0)
    return {"rate": rate.tolist(), "freeze_time": total.tolist()}


def curves_report(curves: Curves, selection: LawSelection) -> dict[str, Any]:
    """Report every number of a set of curves and of the fitted laws, for JSON."""
    return {
        "lags": curves.lags.tolist(),
        "median": curves.quantile(0.5).tolist(),
        "low": curves.quantile(0.1).tolist(),
        "high": curves.quantile(0.9).tolist(),
        "values": curves.values.tolist(),
        "below_floor": curves.below_floor,
        "fit": {
            "best": selection.best or None,
            "is_significant": selection.is_significant,
            "points": selection.points,
            "text": selection.describe(),
            "laws": {law: dict(vars(fit)) for law, fit in selection.fits.items()},
        },
    }
