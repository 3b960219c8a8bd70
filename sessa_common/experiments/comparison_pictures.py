"""The pictures of a comparison: curves.png and lags.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sessa_common import plotting
from sessa_common.experiments.comparison import OLD_NAMES, Comparison
from sessa_common.experiments.comparison_results import (
    ANY_RATE,
    heuristic_levels,
    measures_of,
    sorted_lags,
    trained_lags,
)
from sessa_common.plotting import new_figure, save_figure
from sessa_common.training.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES, LAGS = "curves.png", "lags.png"
COLORS = {
    "sessa": plotting.BLUE,
    "transformer": plotting.ORANGE,
    "mamba2": plotting.GREEN,
    "gated_attention": plotting.PURPLE,
    "transformer-deep": plotting.VERMILION,
}
OTHER_COLORS = (plotting.SKY_BLUE, plotting.BLACK, "#8C6D31", "#6A51A3")
# The end of a line: its name, the last point (x, y) and its colour.
End = tuple[str, float, float, str]


def draw_curves(out: Path, comparison: Comparison) -> None:
    """Write curves.png: validation accuracy (loss for text) against steps, one panel per scale."""
    figure, panels = _new_panels(len(comparison.scales))
    for axes, scale in zip(panels, comparison.scales, strict=True):
        ends: list[End] = []
        label = "validation loss (nats per token)"
        for model in comparison.compared_models():
            if model.scale != scale:
                continue
            folders = [out / job.name for job in comparison.seed_jobs(model, ANY_RATE)]
            runs, measure = _validation_curves(folders)
            if not runs:
                continue
            label, color = measure, _color(model.kind, comparison.models)
            for run in runs:
                axes.plot(list(run), list(run.values()), color=color, linewidth=0.8, alpha=0.45)
            steps = sorted(set.intersection(*(set(run) for run in runs)))
            if steps:
                mean = [float(np.mean([run[step] for run in runs])) for step in steps]
                axes.plot(steps, mean, color=color, linewidth=2.5)
                ends.append((model.kind, steps[-1], mean[-1], color))
        axes.set(xlabel="step", ylabel=label, title=scale)
        _label_ends(axes, ends)
    save_figure(figure, out / CURVES)


def _validation_curves(folders: Sequence[Path]) -> tuple[list[dict[int, float]], str]:
    """Read each run's validation accuracy, or its loss, by step, and the name of the measure."""
    records = [read_metrics(folder) for folder in folders]
    has_accuracy = any("validation_accuracy" in r for run in records for r in run)
    key = "validation_accuracy" if has_accuracy else "validation_loss"
    runs = [{r["step"]: r[key] for r in run if key in r} for run in records]
    label = "validation accuracy" if has_accuracy else "validation loss (nats per token)"
    return [run for run in runs if run], label


def draw_lags(out: Path, results: Mapping[str, Any]) -> None:
    """Write lags.png, accuracy against lag with the trained lags shaded, if the task has lags."""
    rows = results["models"]
    ticks = [int(lag) for lag in sorted_lags(rows)]
    if not ticks:
        return
    scales = list(dict.fromkeys(row["scale"] for row in rows))
    figure, panels = _new_panels(len(scales))
    for axes, scale in zip(panels, scales, strict=True):
        if trained := trained_lags(rows):
            axes.axvspan(*trained, color="0.92", zorder=0)
            axes.text(trained[0], 1.03, " trained lags", color="0.45", fontsize=8)
        ends = _draw_heuristics(axes, rows) + _draw_models(axes, rows, scale)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set(xlabel="lag from source to query (tokens)", ylabel="test accuracy")
        axes.set(title=scale, ylim=(-0.03, 1.09))
        _label_ends(axes, ends)
    save_figure(figure, out / LAGS)


def _draw_heuristics(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> list[End]:
    ends = []
    for name, levels in heuristic_levels(rows).items():
        lags = sorted(levels, key=int)
        values = [levels[lag] for lag in lags]
        axes.plot([int(lag) for lag in lags], values, color="0.6", linewidth=1, linestyle="--")
        ends.append((name.replace("_", " "), float(lags[-1]), values[-1], "0.5"))
    return ends


def _draw_models(axes: Axes, rows: Sequence[Mapping[str, Any]], scale: str) -> list[End]:
    ends: list[End] = []
    kinds = tuple(dict.fromkeys(row["kind"] for row in rows))
    for row in rows:
        by_lag = measures_of(row).get("by_lag", {})
        if row["scale"] != scale or not by_lag:
            continue
        lags, color = sorted(by_lag, key=int), _color(row["kind"], kinds)
        means = [by_lag[lag]["mean"] for lag in lags]
        stds = [by_lag[lag]["std"] or 0.0 for lag in lags]
        x = [int(lag) for lag in lags]
        axes.errorbar(x, means, stds, color=color, linewidth=2.5, marker="o", capsize=3)
        ends.append((row["kind"], x[-1], means[-1], color))
    return ends


def _label_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Write each name at the end of its line, moved apart where lines end close together."""
    if not ends:
        return
    low, high = axes.get_ylim()
    gap, previous = 0.05 * (high - low), -np.inf
    for name, x, y, color in sorted(ends, key=lambda end: end[2]):
        previous = max(y, previous + gap)
        axes.annotate(
            name,
            (x, previous),
            (8, 0),
            textcoords="offset points",
            color=color,
            va="center",
            fontsize=9,
            annotation_clip=False,
        )


def _new_panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = new_figure(6.5 * count, 4.2)
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for each in axes:
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _color(kind: str, kinds: Sequence[str]) -> str:
    kind = OLD_NAMES.get(kind, kind)
    others = [name for name in kinds if OLD_NAMES.get(name, name) not in COLORS]
    return COLORS.get(kind) or OTHER_COLORS[others.index(kind) % len(OTHER_COLORS)]
