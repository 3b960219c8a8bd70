"""metrics.jsonl, one line a record, and the picture of the loss curves."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

METRICS = "metrics.jsonl"
PICTURE = "loss.png"


class MetricsLog:
    """Records of one run in metrics.jsonl, each with "step" and "loss" or "validation_loss".

    Opening it at step n drops the records after n, which a killed run wrote but did not save.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / METRICS
        kept = [record for record in read_metrics(folder) if record["step"] <= step]
        scratch = self.path.with_name(METRICS + ".tmp")
        scratch.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(scratch, self.path)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The whole records of a run; a last line that a crash cut short is left out."""
    path = folder / METRICS
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def tokens_per_second(records: Sequence[Mapping[str, Any]]) -> float:
    """The median speed of a run's steps; the first ten, which compile kernels, are left out."""
    speeds = [r["tokens"] / r["seconds"] for r in records if r.get("seconds")]
    return round(float(np.median(speeds[10:] or speeds or [0])))


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
    scratch = folder / (PICTURE + ".tmp")
    figure.savefig(scratch, format="png", dpi=120)
    os.replace(scratch, folder / PICTURE)
    return True
