"""The report of a comparison: results.json, the table results.md and the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sessa_common.experiments.comparison import Comparison
from sessa_common.experiments.comparison_pictures import draw_curves, draw_lags
from sessa_common.experiments.comparison_results import (
    collect,
    heuristic_levels,
    measures_of,
    sorted_lags,
)
from sessa_common.markdown import markdown_table
from sessa_common.plotting import has_matplotlib
from sessa_common.storage import write_json, write_text

RESULTS, TABLE = "results.json", "results.md"
ABSENT = "–"


def write_report(out: Path, comparison: Comparison) -> dict[str, Any]:
    """Write the tables and, with matplotlib, the pictures; return the results."""
    results = write_tables(out, comparison)
    if has_matplotlib():
        draw_curves(out, comparison)
        draw_lags(out, results)
    return results


def write_tables(out: Path, comparison: Comparison) -> dict[str, Any]:
    """Write results.json and results.md, and return the results."""
    results = collect(out, comparison)
    write_json(out / RESULTS, results)
    write_text(out / TABLE, format_results(results))
    return results


def format_results(results: Mapping[str, Any]) -> str:
    """Format results.md: a line per model, then accuracy and errors by lag if there are lags."""
    subject = results["task"] or ", ".join(results["data"])
    options = f" ({', '.join(results['task_options'])})" if results["task_options"] else ""
    seeds = max((len(row["seeds"]) for row in results["models"]), default=0)
    parts = [
        f"# {subject}{options}\n\n{results['steps']:,} steps of {results['batch_size']} rows; mean "
        f"± sample standard deviation over {seeds} seeds; learning rate by validation loss on "
        "seed 0."
    ]
    if results["control_threshold"] is not None:
        parts.append(
            f"Control: {', '.join(results['control_options'])}; passed from an accuracy of "
            f"{results['control_threshold']:g} (of the control's ceiling, where it is below 1)."
        )
    rows = results["models"]
    parts.append(_main_table(rows, is_text=results["task"] is None))
    parts += [_accuracy_by_lag(rows), _errors_by_lag(rows), _unfinished(rows)]
    parts.append(_other_data(results["other_data"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _main_table(rows: Sequence[Mapping[str, Any]], is_text: bool) -> str:
    has_ceiling = any("ceiling" in measures_of(row) for row in rows)
    head = ["model", "parameters", "learning rate", "control"]
    head += ["perplexity" if is_text else "accuracy"]
    head += ["Bayes ceiling"] if has_ceiling else []
    head += ["seeds", "tokens/s", "MFLOP/token"]
    lines = []
    for row in rows:
        mean = row.get("mean", {})
        speed = (mean.get("tokens_per_second") or {}).get("mean")
        flops = row.get("flops_per_token")
        cells = [row["name"], _number(row.get("parameters"), ",.0f")]
        cells += [_number(row["learning_rate"], "g"), _control(row["control"])]
        cells += [spread(mean.get("perplexity"), 2) if is_text else _accuracy(row, "accuracy")]
        cells += [_accuracy(row, "ceiling")] if has_ceiling else []
        cells += [str(len(row["seeds"])), _number(speed, ",.0f")]
        cells += [_number(flops and flops / 1e6, ",.2f")]
        lines.append(cells)
    return markdown_table(head, lines)


def _accuracy_by_lag(rows: Sequence[Mapping[str, Any]]) -> str:
    lags = sorted_lags(rows)
    if not lags:
        return ""
    lines = [
        [row["name"], *(spread(measures_of(row).get("by_lag", {}).get(lag), 3) for lag in lags)]
        for row in rows
    ]
    for name, levels in heuristic_levels(rows).items():
        lines.append(
            [f"*{name.replace('_', ' ')}*", *(_number(levels.get(g), ".3f") for g in lags)]
        )
    return "## Accuracy by lag\n\n" + markdown_table(["model", *lags], lines)


def _errors_by_lag(rows: Sequence[Mapping[str, Any]]) -> str:
    lines, kinds = [], []
    for row in rows:
        for lag, errors in measures_of(row).get("errors_by_lag", {}).items():
            kinds += [kind for kind in errors if kind not in kinds]
            lines.append((row["name"], lag, errors))
    if not lines:
        return ""
    body = [
        [name, lag, *(spread(errors.get(kind), 3) for kind in kinds)] for name, lag, errors in lines
    ]
    head = ["model", "lag", *(kind.replace("_", " ") for kind in kinds)]
    return "## Wrong answers by kind (shares of all answers)\n\n" + markdown_table(head, body)


def _unfinished(rows: Sequence[Mapping[str, Any]]) -> str:
    names = [name for row in rows for name in row["unfinished"]]
    return f"Not finished, so not in the numbers: {', '.join(names)}." if names else ""


def _other_data(names: Sequence[str]) -> str:
    if not names:
        return ""
    return (
        f"**Not comparable:** {', '.join(names)} used other data than the first run, because the "
        "data changed between the runs. Delete these folders, or start a comparison in a new one."
    )


def spread(value: Mapping[str, Any] | None, digits: int) -> str:
    """Format an aggregate as "mean ± std", one seed as its value and no seed as a dash."""
    if not isinstance(value, Mapping) or "mean" not in value:
        return ABSENT
    mean = f"{value['mean']:.{digits}f}"
    return mean if value["std"] is None else f"{mean} ± {value['std']:.{digits}f}"


def _accuracy(row: Mapping[str, Any], name: str) -> str:
    return spread(measures_of(row).get(name), 3)


def _control(control: Mapping[str, Any] | None) -> str:
    if control is None:
        return ABSENT
    verdict = "passed" if control["passed"] else "**FAILED**"
    ceiling = f" of {control['ceiling']:.3f}" if "ceiling" in control else ""
    return f"{verdict} {control['accuracy']:.3f}{ceiling} in {control['steps']:,} steps"


def _number(value: float | None, form: str) -> str:
    return ABSENT if value is None else f"{value:{form}}"
