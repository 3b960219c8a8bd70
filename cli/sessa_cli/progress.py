"""A progress line on the terminal, and a printed line at every evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sessa_cli.common import say
from sessa_common.inference.evaluation import perplexity
from sessa_common.training.gains import gain_summary

# Share of the newest step in the shown loss and speed, which makes them steady enough to read.
SMOOTHING = 0.1


class TerminalReporter:
    """A `sessa_common.training.trainer.Reporter` with a progress bar, used as a context manager.

    Shows step, training loss and perplexity (smoothed over some ten steps), tokens per second and
    the remaining time; every evaluation leaves a line, on a terminal or in a log.
    """

    def __init__(self, console: Console, backend: str) -> None:
        self.console, self.backend = console, backend
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            # Where nothing can be drawn over, the bar would only leave an empty line.
            disable=not console.is_interactive,
        )
        self.task = self.progress.add_task("", status="")
        self.loss = self.speed = math.nan

    def __enter__(self) -> TerminalReporter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self.progress.live.is_started:
            self.progress.stop()

    def preparing(self, activity: str) -> None:
        """Show what goes on before training."""
        self.progress.update(self.task, total=None, status=activity)
        self.progress.start()

    def started(self, record: Mapping[str, Any]) -> None:
        """Print a line about the run and show the bar."""
        count = record.get("processes", 1)
        shared = f" by {count} processes" if count > 1 else ""
        whole, trained = record["parameters"], record["trained"]
        part = f", {trained:,} of them trained or added" if trained != whole else ""
        say(
            self.console,
            f"{whole:,} parameters{part}, {record['data']}, "
            f"vocabulary {record['vocab_size']:,}; {self.backend} on {record['device']} "
            f"in {record['precision']}{shared}; writing {record['folder']}",
        )
        for note in record["notes"]:
            say(self.console, note)
        self.progress.update(self.task, total=record["steps"], completed=record["step"])
        self.progress.start()

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
        gains = f"; {told}" if (told := gain_summary(record)) else ""
        self.console.print(
            f"step {record['step']:>6}  {self._status()}  "
            f"validation loss {record['validation_loss']:.3f}, {measured}{gains}",
            highlight=False,
            soft_wrap=True,
        )

    def _status(self) -> str:
        return (
            f"loss {self.loss:.3f}, perplexity {perplexity(self.loss):.1f}, "
            f"{self.speed:,.0f} tokens/s"
        )


def _smooth(old: float, new: float) -> float:
    return new if math.isnan(old) else (1 - SMOOTHING) * old + SMOOTHING * new
