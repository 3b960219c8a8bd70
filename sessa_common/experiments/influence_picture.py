"""The picture of `sessa influence`: influence against lag, and the slope of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sessa_common import plotting
from sessa_common.experiments.influence_fit import FIRST_LAG
from sessa_common.experiments.influence_report import Measurement
from sessa_common.plotting import has_matplotlib, new_figure, save_figure

COLORS = (
    plotting.BLUE,
    plotting.VERMILION,
    plotting.GREEN,
    plotting.PURPLE,
    plotting.ORANGE,
    plotting.SKY_BLUE,
    plotting.BLACK,
)
MARKERS = "osD^vPX"


def draw_influence(path: Path, measurements: Sequence[Measurement]) -> bool:
    """Write a PNG of influence against lag and of the layers' slopes; False without matplotlib."""
    if not has_matplotlib():
        return False
    figure = new_figure(10, 6)
    main, side = figure.subplots(1, 2, width_ratios=(3, 1))
    for i, one in enumerate(measurements):
        style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        _draw_curves(main, one, style)
        _draw_slopes(side, one, style, (i - (len(measurements) - 1) / 2) * 0.12)
    main.set(xscale="log", yscale="log", xlabel="lag  t − τ  (tokens)", ylabel="‖∂y(t) / ∂x(τ)‖")
    main.set(title="How much an old token still matters")
    if not any(one.curves.above_floor[:, 1:].any() for one in measurements):
        # Without a point, a logarithmic axis finds no limits of its own.
        main.set(xlim=(1, 10), ylim=(0.1, 1))
    figure.legend(loc="outside lower center")
    side.axhline(-1, color="#888888", linewidth=1, linestyle=":", zorder=0)
    side.set(xlabel="layer", ylabel="log-log slope of the layer alone")
    side.set(title="Each layer (dotted: 1/lag)")
    side.xaxis.get_major_locator().set_params(integer=True)
    for axes in (main, side):
        axes.grid(alpha=0.3)
    save_figure(figure, path, dpi=150)
    return True


def _draw_curves(axes: Any, one: Measurement, style: dict[str, Any]) -> None:
    curves, selection = one.curves, one.selection
    shown = np.where(curves.above_floor, curves.values, np.nan)[:, 1:]
    lags = curves.lags[1:]
    is_visible = ~np.isnan(shown).all(0)
    label = f"{one.name} ({one.mixer}): {selection.describe()}"
    if not is_visible.any():
        # The legend still names a model in which only a token's own position matters.
        axes.plot([], [], label=label, **style)
        return
    low, middle, high = np.nanquantile(shown[:, is_visible], (0.1, 0.5, 0.9), axis=0)
    axes.plot(lags[is_visible], middle, label=label, linewidth=1.2, markersize=4, **style)
    axes.fill_between(lags[is_visible], low, high, color=style["color"], alpha=0.15, linewidth=0)
    fitted = lags[is_visible & (lags >= FIRST_LAG)]
    if selection.fits and len(fitted):
        grid = np.geomspace(fitted[0], fitted[-1], 200)
        axes.plot(grid, selection.predict(grid), "--", color=style["color"], linewidth=1.5)


def _draw_slopes(axes: Any, one: Measurement, style: dict[str, Any], shift: float) -> None:
    """Draw the power-law slope of each layer with its interval, beside other models' slopes."""
    fits = {i: found.fits["power law"] for i, found in one.layers.items() if found.fits}
    if not fits:
        return
    middle = np.array([-fit.rate for fit in fits.values()])
    ends = np.array([[-fit.high, -fit.low] for fit in fits.values()])
    errors = np.abs(np.clip((ends - middle[:, None]) * [-1, 1], 0, None)).T
    x = [layer + shift for layer in fits]
    axes.errorbar(x, middle, errors, linestyle="none", markersize=5, capsize=2, **style)
