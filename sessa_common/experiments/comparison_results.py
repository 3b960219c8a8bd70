"""Results of the runs of a comparison, read from their folders and aggregated over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sessa_common.checkpoint.run_files import STATE, TRAINING
from sessa_common.config import SessaConfig, parameter_count
from sessa_common.experiments.comparison import ComparedModel, Comparison
from sessa_common.inference.evaluation import perplexity
from sessa_common.json_files import read_json
from sessa_common.training.metrics import read_metrics, tokens_per_second
from sessa_common.training.run_folder import RESULT
from sessa_common.training.saved_state import read_state_metadata

# The folder of a run does not depend on its learning rate, so any rate serves to find the folder.
ANY_RATE = 1.0


def read_result(folder: Path, steps: int) -> dict[str, Any] | None:
    """Read the result of a finished run of `steps` steps; None for a run that is not finished.

    A run on a task has a result.json; the result of a run on text is its last validation.
    """
    if (folder / RESULT).exists():
        return read_json(folder / RESULT)
    settings = folder / TRAINING
    if not settings.exists() or read_json(settings).get("task") is not None:
        return None
    records = read_metrics(folder)
    losses = [r["validation_loss"] for r in records if "validation_loss" in r]
    if not any(r["step"] == steps and "validation_loss" in r for r in records):
        return None
    return {
        "parameters": parameter_count(SessaConfig.from_dict(read_json(folder / "config.json"))),
        "tokens_per_second": tokens_per_second(records),
        "validation_loss": losses[-1],
        "perplexity": perplexity(losses[-1]),
    }


def best_rate(out: Path, comparison: Comparison, model: ComparedModel) -> float | None:
    """Return the rate of the sweep with the lowest validation loss; None when no run finished."""
    if len(comparison.learning_rates) == 1:
        return comparison.learning_rates[0]
    losses = sweep_losses(out, comparison, model)
    finished = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(finished, key=finished.__getitem__) if finished else None


def sweep_losses(
    out: Path, comparison: Comparison, model: ComparedModel
) -> dict[float, float | None]:
    """Return the validation loss of each rate of the sweep, None where the run did not finish."""
    losses: dict[float, float | None] = {}
    for rate, job in zip(comparison.learning_rates, comparison.sweep_jobs(model), strict=False):
        loss = (read_result(out / job.name, job.steps) or {}).get("validation_loss")
        losses[rate] = loss if loss is not None and math.isfinite(loss) else None
    return losses


def control_result(
    out: Path, comparison: Comparison, model: ComparedModel
) -> dict[str, Any] | None:
    """Return the result of a finished control and whether it passed; None without one.

    The threshold is a share of the `ceiling`, the accuracy of an exact decoder, where it is known.
    """
    job = comparison.control_job(model, ANY_RATE)
    result = None if job is None else read_result(out / job.name, job.steps)
    if result is None:
        return None
    test = result.get("test", {})
    accuracy = test.get("accuracy", result.get("validation_accuracy"))
    passed = accuracy >= comparison.control_threshold * test.get("ceiling", 1.0)
    ceiling = {"ceiling": test["ceiling"]} if "ceiling" in test else {}
    return {"accuracy": accuracy, **ceiling, "passed": passed, "steps": result["steps"]}


def aggregate(values: Sequence[Any]) -> Any:
    """Replace the numbers of equal trees by their mean, sample standard deviation and count.

    The standard deviation of one number is None. Other leaves are those of the first tree.
    """
    if all(isinstance(value, Mapping) for value in values):
        shared = [key for key in values[0] if all(key in value for value in values)]
        return {key: aggregate([value[key] for value in values]) for key in shared}
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(numbers) != len(values):
        return values[0]
    std = statistics.stdev(numbers) if len(numbers) > 1 else None
    return {"mean": statistics.fmean(numbers), "std": std, "n": len(numbers)}


def flops_per_token(config: SessaConfig, length: int) -> float:
    """Count the floating-point operations per training token in rows of `length` tokens.

    Only matrix products count: 2 operations a multiply-add, and twice the forward pass for the
    backward pass, so 6 per parameter (looking up an untied embedding is free). The forward pass of
    attention adds 4 D (T + 1) / 2 per layer for scores and values, with (T + 1) / 2 visible
    positions on average; the feedback adds the same over (T - 1) / 2 strictly past positions; the
    recurrence of Mamba-2 adds 6 E N (decay, update, read; its chunked form does more).
    """
    used = parameter_count(config)
    if not config.tie_word_embeddings:
        used -= config.vocab_size * config.hidden_size
    D, inner = config.hidden_size, config.mamba_expand * config.hidden_size
    forward = 0.0
    for kind in config.kinds:
        if kind.attends:
            forward += 2 * D * (length + 1)
        else:
            forward += 6 * inner * config.mamba_d_state
        if kind.feeds_back:
            forward += 2 * D * (length - 1)
    return 6 * used + 3 * forward


def collect(out: Path, comparison: Comparison) -> dict[str, Any]:
    """Build the content of results.json: one row per model, aggregated over finished seeds."""
    threshold = comparison.control_threshold if comparison.control_options else None
    return {
        "task": comparison.task,
        "task_options": list(comparison.task_options),
        "data": list(comparison.data),
        "control_options": list(comparison.control_options),
        "control_threshold": threshold,
        "steps": comparison.steps,
        "batch_size": comparison.batch_size,
        "other_data": runs_on_other_data(out, comparison),
        "models": [_row(out, comparison, model) for model in comparison.compared_models()],
    }


def _row(out: Path, comparison: Comparison, model: ComparedModel) -> dict[str, Any]:
    rate = best_rate(out, comparison, model)
    losses = sweep_losses(out, comparison, model)
    row: dict[str, Any] = {
        "name": model.name,
        "scale": model.scale,
        "kind": model.kind,
        "learning_rate": rate,
        "seeds": {},
        "unfinished": [],
        "sweep": {f"{each:g}": loss for each, loss in losses.items()},
        "control": control_result(out, comparison, model),
    }
    for seed, job in enumerate(comparison.seed_jobs(model, rate or ANY_RATE)):
        result = read_result(out / job.name, job.steps)
        if result is None:
            row["unfinished"].append(job.name)
            continue
        row["seeds"][str(seed)] = result
        config = SessaConfig.from_dict(read_json(out / job.name / "config.json"), job.name)
        length = _row_length(out / job.name, comparison.batch_size)
        row |= {"parameters": parameter_count(config), "length": length}
        row["flops_per_token"] = flops_per_token(config, length)
    if row["seeds"]:
        row["mean"] = aggregate(list(row["seeds"].values()))
    return row


def _row_length(folder: Path, batch_size: int) -> int:
    """Read the tokens in a training row, which the test of a task may exceed."""
    tokens = next(record["tokens"] for record in read_metrics(folder) if "tokens" in record)
    return int(tokens // batch_size)


def runs_on_other_data(out: Path, comparison: Comparison) -> list[str]:
    """Return the runs whose data differ from the first run with the same vocabulary and context.

    They differ when the data changed between the runs while their name stayed the same.
    """
    first: dict[tuple[int, int], str] = {}
    different = []
    for model in comparison.compared_models():
        for job in comparison.seed_jobs(model, ANY_RATE):
            folder = out / job.name
            if not (folder / STATE).exists():
                continue
            config = read_json(folder / "config.json")
            _, fingerprint = read_state_metadata(folder)
            key = config["vocab_size"], config["max_position_embeddings"]
            if first.setdefault(key, fingerprint) != fingerprint:
                different.append(job.name)
    return different


def measures_of(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the aggregated test measures of a row; empty without a finished run."""
    return row.get("mean", {}).get("test", {})


def sorted_lags(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lags, as texts, at which any row has an accuracy, in rising order."""
    return sorted({lag for row in rows for lag in measures_of(row).get("by_lag", {})}, key=int)


def heuristic_levels(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the accuracy of each heuristic by its name and lag, from the first row that has it."""
    levels: dict[str, dict[str, float]] = {}
    for row in rows:
        for lag, by_name in measures_of(row).get("heuristics_by_lag", {}).items():
            for name, value in by_name.items():
                levels.setdefault(name, {}).setdefault(lag, value["mean"])
    return levels


def trained_lags(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int] | None:
    """Return the shortest and the longest lag of training; None for a task without lags."""
    for row in rows:
        for result in row["seeds"].values():
            options = result.get("task_options", {})
            if "min_lag" in options and "max_lag" in options:
                return options["min_lag"], options["max_lag"]
    return None
