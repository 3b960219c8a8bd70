"""The table and the pictures of a comparison."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sessa_common.experiments.comparison import COLOURS, OTHER_COLOURS, Comparison, best_rate
from sessa_common.training.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES, LAGS = "curves.png", "lags.png"


def table(results: Mapping[str, Any]) -> str:
    """results.md: a line a model, then accuracy and errors by lag where the task has lags."""
    what = results["task"] or ", ".join(results["data"])
    given = f" ({', '.join(results['task_options'])})" if results["task_options"] else ""
    seeds = max((len(row["seeds"]) for row in results["models"]), default=0)
    parts = [
        f"# {what}{given}\n\n{results['steps']:,} steps of {results['batch_size']} rows; mean ± "
        f"sample standard deviation over {seeds} seeds; learning rate by validation loss on seed 0."
    ]
    if results["control_threshold"] is not None:
        parts.append(f"Control: {', '.join(results['control_options'])}; passed from an accuracy "
                     f"of {results['control_threshold']:g} (of the control's ceiling, where it is "
                     "below 1).")  # fmt: skip
    parts.append(_main_table(results["models"], text=results["task"] is None))
    parts += [_by_lag(results["models"]), _errors(results["models"])]
    parts.append(_unfinished(results["models"]))
    parts.append(_other_data(results["other_data"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _main_table(rows: Sequence[Mapping[str, Any]], text: bool) -> str:
    measure = "perplexity" if text else "accuracy"
    has_ceiling = any("ceiling" in _test(row) for row in rows)
    head = ["model", "parameters", "learning rate", "control", measure]
    head += ["Bayes ceiling"] if has_ceiling else []
    head += ["seeds", "tokens/s", "MFLOP/token"]
    lines = []
    for row in rows:
        mean = row.get("mean", {})
        value = mean.get("perplexity") if text else _test(row).get("accuracy")
        cells = [row["name"], _number(row.get("parameters"), ",.0f"),
                 _number(row["learning_rate"], "g"), _control(row["control"]),
                 spread(value, 2 if text else 3)]  # fmt: skip
        cells += [spread(_test(row).get("ceiling"), 3)] if has_ceiling else []
        speed = (mean.get("tokens_per_second") or {}).get("mean")
        flops = row.get("flops_per_token")
        cells += [str(len(row["seeds"])), _number(speed, ",.0f"),
                  _number(flops and flops / 1e6, ",.2f")]  # fmt: skip
        lines.append(cells)
    return _markdown(head, lines)


def _by_lag(rows: Sequence[Mapping[str, Any]]) -> str:
    lags = _lags(rows)
    if not lags:
        return ""
    lines = [[row["name"], *(spread(_test(row).get("by_lag", {}).get(lag), 3) for lag in lags)]
             for row in rows]  # fmt: skip
    for name, levels in heuristics(rows).items():
        lines.append(
            [f"*{name.replace('_', ' ')}*", *(_number(levels.get(g), ".3f") for g in lags)]
        )
    return "## Accuracy by lag\n\n" + _markdown(["model", *lags], lines)


def _errors(rows: Sequence[Mapping[str, Any]]) -> str:
    lines, kinds = [], []
    for row in rows:
        for lag, errors in _test(row).get("errors_by_lag", {}).items():
            kinds += [kind for kind in errors if kind not in kinds]
            lines.append((row["name"], lag, errors))
    if not lines:
        return ""
    body = [[name, lag, *(spread(errors.get(kind), 3) for kind in kinds)]
            for name, lag, errors in lines]  # fmt: skip
    head = ["model", "lag", *(kind.replace("_", " ") for kind in kinds)]
    return "## What is answered instead (shares)\n\n" + _markdown(head, body)


def _unfinished(rows: Sequence[Mapping[str, Any]]) -> str:
    names = [name for row in rows for name in row["unfinished"]]
    return f"Not finished, so not in the numbers: {', '.join(names)}." if names else ""


def _other_data(names: Sequence[str]) -> str:
    if not names:
        return ""
    return (f"**Not comparable:** {', '.join(names)} saw other data than the first run; the data "
            "changed behind its name. Delete these folders, or start anew in another.")  # fmt: skip


def spread(value: Mapping[str, Any] | None, digits: int) -> str:
    """An aggregate as "mean ± std"; the mean alone for one seed, a dash for none."""
    if not isinstance(value, Mapping) or "mean" not in value:
        return "–"
    mean = f"{value['mean']:.{digits}f}"
    return mean if value["std"] is None else f"{mean} ± {value['std']:.{digits}f}"


def heuristics(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The levels that a heuristic reaches, by its name and lag, from the first model with any."""
    levels: dict[str, dict[str, float]] = {}
    for row in rows:
        for outer, inner in _test(row).get("heuristics_by_lag", {}).items():
            for key, value in inner.items():
                lag, name = (outer, key) if outer.isdigit() else (key, outer)
                levels.setdefault(name, {}).setdefault(lag, value["mean"])
    return levels


def draw_curves(out: Path, comparison: Comparison) -> None:
    """Write curves.png: validation accuracy, for text the loss, against steps; a panel a scale."""
    figure, panels = _figure(len(comparison.scales))
    for axes, scale in zip(panels, comparison.scales, strict=True):
        ends: list[tuple[str, float, float, str]] = []
        label = "validation loss (nats per token)"
        for model in comparison.models():
            if model.scale != scale:
                continue
            rate = best_rate(out, comparison, model) or 1.0
            folders = [out / job.name for job in comparison.seed_jobs(model, rate)]
            runs, found = _validation(folders)
            if not runs:
                continue
            label = found
            colour = _colour(model.mixer, comparison.mixers)
            for run in runs:
                axes.plot(list(run), list(run.values()), color=colour, linewidth=0.8, alpha=0.45)
            steps = sorted(set.intersection(*(set(run) for run in runs)))
            if not steps:
                continue
            mean = [float(np.mean([run[step] for run in runs])) for step in steps]
            axes.plot(steps, mean, color=colour, linewidth=2.5)
            ends.append((model.mixer, steps[-1], mean[-1], colour))
        axes.set(xlabel="step", ylabel=label, title=scale)
        _label_ends(axes, ends)
    _save(figure, out / CURVES)


def _validation(folders: Sequence[Path]) -> tuple[list[dict[int, float]], str]:
    records = [read_metrics(folder) for folder in folders]
    accuracy = any("validation_accuracy" in r for run in records for r in run)
    key = "validation_accuracy" if accuracy else "validation_loss"
    runs = [{r["step"]: r[key] for r in run if key in r} for run in records]
    label = "validation accuracy" if accuracy else "validation loss (nats per token)"
    return [run for run in runs if run], label


def trained_lags(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int] | None:
    """The shortest and longest lag that the runs were trained on, by their task's options."""
    for row in rows:
        for result in row["seeds"].values():
            options = result.get("task_options", {})
            if "min_lag" in options and "max_lag" in options:
                return options["min_lag"], options["max_lag"]
    return None


def draw_lags(out: Path, results: Mapping[str, Any]) -> None:
    """Write lags.png: accuracy against lag, the trained range shaded; nothing without lags."""
    if not _lags(results["models"]):
        return
    scales = list(dict.fromkeys(row["scale"] for row in results["models"]))
    mixers = tuple(dict.fromkeys(row["mixer"] for row in results["models"]))
    figure, panels = _figure(len(scales))
    for axes, scale in zip(panels, scales, strict=True):
        if trained := trained_lags(results["models"]):
            axes.axvspan(*trained, color="0.92", zorder=0)
            axes.text(trained[0], 1.03, " trained lags", color="0.45", fontsize=8)
        ends = []
        for name, levels in heuristics(results["models"]).items():
            lags = sorted(levels, key=int)
            values = [levels[lag] for lag in lags]
            axes.plot([int(lag) for lag in lags], values, color="0.6", linewidth=1, linestyle="--")
            ends.append((name.replace("_", " "), float(lags[-1]), values[-1], "0.5"))
        for row in results["models"]:
            by_lag = _test(row).get("by_lag", {})
            if row["scale"] != scale or not by_lag:
                continue
            lags, colour = sorted(by_lag, key=int), _colour(row["mixer"], mixers)
            means = [by_lag[lag]["mean"] for lag in lags]
            stds = [by_lag[lag]["std"] or 0.0 for lag in lags]
            x = [int(lag) for lag in lags]
            axes.errorbar(x, means, stds, color=colour, linewidth=2.5, marker="o", capsize=3)
            ends.append((row["mixer"], x[-1], means[-1], colour))
        ticks = [int(lag) for lag in _lags(results["models"])]
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set(xlabel="lag from source to query (tokens)", ylabel="test accuracy", title=scale,
                 ylim=(-0.03, 1.09))  # fmt: skip
        _label_ends(axes, ends)
    _save(figure, out / LAGS)


def _label_ends(axes: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Write each name at the right of its line, moved apart where lines end close together."""
    if not ends:
        return
    low, high = axes.get_ylim()
    gap, previous = 0.05 * (high - low), -np.inf
    for name, x, y, colour in sorted(ends, key=lambda end: end[2]):
        previous = max(y, previous + gap)
        axes.annotate(name, (x, previous), (8, 0), textcoords="offset points", color=colour,
                      va="center", fontsize=9, annotation_clip=False)  # fmt: skip


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    # Without pyplot: no window system is touched and no figure stays registered.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * panels, 4.2), dpi=120, layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for each in axes:
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    scratch = path.with_name(path.name + ".tmp")
    figure.savefig(scratch, format="png", dpi=120)
    os.replace(scratch, path)


def _colour(mixer: str, mixers: Sequence[str]) -> str:
    others = [name for name in mixers if name not in COLOURS]
    return COLOURS.get(mixer) or OTHER_COLOURS[others.index(mixer) % len(OTHER_COLOURS)]


def _lags(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({lag for row in rows for lag in _test(row).get("by_lag", {})}, key=int)


def _test(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return row.get("mean", {}).get("test", {})


def _control(control: Mapping[str, Any] | None) -> str:
    if control is None:
        return "–"
    verdict = "passed" if control["passed"] else "**FAILED**"
    ceiling = f" of {control['ceiling']:.3f}" if "ceiling" in control else ""
    return f"{verdict} {control['accuracy']:.3f}{ceiling} in {control['steps']:,} steps"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
