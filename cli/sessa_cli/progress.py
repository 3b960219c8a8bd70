"""A progress line on the terminal, and a printed line at every evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Share of the newest step in the shown loss and speed, so that they can be read while they move.
SMOOTHING = 0.1


class TerminalReporter:
    """A `trainer.Reporter` with a rich progress bar, used as a context manager.

    Shows step, training loss and perplexity (smoothed over some ten steps), tokens per second and
    the remaining time; every evaluation leaves a line, on a terminal or in a log.
    """

    def __init__(self, console: Console, steps: int, first_step: int = 0) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self.task = self.progress.add_task("", total=steps, completed=first_step, status="")
        self.loss = self.speed = math.nan

    def __enter__(self) -> TerminalReporter:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def training(self, record: Mapping[str, Any]) -> None:
        """Move the bar by one step."""
        self.loss = _smooth(self.loss, record["loss"])
        self.speed = _smooth(self.speed, record["tokens"] / max(record["seconds"], 1e-9))
        self.progress.update(self.task, completed=record["step"], status=self._status())

    def validation(self, record: Mapping[str, Any]) -> None:
        """Print a line with the validation loss, or the accuracy of a task."""
        measured = f"perplexity {record['validation_perplexity']:.1f}"
        if "validation_accuracy" in record:
            measured = f"accuracy {record['validation_accuracy']:.3f}"
        self.console.print(
            f"step {record['step']:>6}  {self._status()}  "
            f"validation loss {record['validation_loss']:.3f}, " + measured,
            highlight=False,
            soft_wrap=True,
        )

    def _status(self) -> str:
        perplexity = math.exp(min(self.loss, 700.0))
        return f"loss {self.loss:.3f}, perplexity {perplexity:.1f}, {self.speed:,.0f} tokens/s"


def _smooth(old: float, new: float) -> float:
    return new if math.isnan(old) else (1 - SMOOTHING) * old + SMOOTHING * new
