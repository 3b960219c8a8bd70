"""The metrics of a run: metrics.jsonl, one record a line, and the picture of its loss curves."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sessa_common.checkpoint.run_files import LOSS_PICTURE, METRICS
from sessa_common.input_files import read_limited
from sessa_common.json_files import parse_json
from sessa_common.storage import atomic_path, sync

# The first steps of a run compile kernels, so they do not count in its speed.
WARM_UP_STEPS = 10
LARGEST_METRICS = 2**30


class MetricsLog:
    """The records of one run, each with "step" and "loss" or "validation_loss".

    Opening the log at step n drops the records after n, which a killed run wrote but did not save,
    and lines that a crash damaged, of which `notes` tells.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / METRICS
        records, damaged = _read_lines(self.path)
        self.notes = [f"{self.path}: dropped {damaged} damaged lines"] if damaged else []
        kept = [record for record in records if record["step"] <= step]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        with atomic_path(self.path) as scratch:
            scratch.write_text(lines, encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def sync(self) -> None:
        """Wait until the records are on disk."""
        sync(self.path)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the whole records of a run; lines that a crash damaged are left out."""
    return _read_lines(folder / METRICS)[0]


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a log, and the number of its lines that are none."""
    lines = read_limited(path, LARGEST_METRICS).split(b"\n") if path.exists() else []
    records = [record for line in lines if (record := _parse_record(line)) is not None]
    return records, sum(map(bool, lines)) - len(records)


def _parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line.decode("utf-8"))
    except ValueError:
        return None
    numbers = isinstance(record, dict) and all(
        isinstance(value, (int, float)) for value in record.values()
    )
    return record if numbers and isinstance(record.get("step"), int) else None


def last_metrics(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The newest value of every name that the records have."""
    return {name: value for record in records for name, value in record.items()}


def tokens_per_second(records: Sequence[Mapping[str, Any]]) -> float:
    """The median speed of a run's steps after the first WARM_UP_STEPS."""
    speeds = [r["tokens"] / r["seconds"] for r in records if r.get("seconds")]
    return round(float(np.median(speeds[WARM_UP_STEPS:] or speeds or [0])))


def draw_losses(folder: Path) -> bool:
    """Write loss.png from metrics.jsonl; False when there is nothing to draw, or no matplotlib."""
    records = read_metrics(folder)
    if not records or importlib.util.find_spec("matplotlib") is None:
        return False
    # Without pyplot: no window system is touched and no figure stays registered.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("validation_loss", "validation", "o-")):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(folder / LOSS_PICTURE) as scratch:
        figure.savefig(scratch, format="png", dpi=120)
    return True
