"""Trackers: the metrics of a run in TensorBoard or Weights & Biases, through their libraries."""

from __future__ import annotations

import importlib.util
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sessa_common.checkpoint.run_files import TENSORBOARD, TRACKING
from sessa_common.errors import SessaError
from sessa_common.extras import install
from sessa_common.json_files import read_json
from sessa_common.storage import write_json
from sessa_common.training.run_folder import Run
from sessa_common.training.trainer import Reporter

INSTALL = install("track")
# Entries of a record that are no measure of it.
NO_MEASURES = ("step", "tokens", "seconds")


def require_trackers(names: Sequence[str]) -> None:
    """Raise SessaError when the library of a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise SessaError(f"`track` {name} needs the package {name}; {INSTALL}")


@contextmanager
def tracked(reporter: Reporter, run: Run, step: int) -> Iterator[Reporter]:
    """Yield a reporter that also tells the trackers of the run, which goes on after `step`."""
    opened: list[Reporter] = [reporter]
    with ExitStack() as stack:
        for name in run.settings.track:
            open_tracker = {"tensorboard": _tensorboard, "wandb": _wandb}[name]
            opened.append(stack.enter_context(open_tracker(run, step)))
        yield reporter if len(opened) == 1 else _Several(opened)


class _Several:
    """A `Reporter` that tells several others."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self.reporters = reporters

    def preparing(self, activity: str) -> None:
        for reporter in self.reporters:
            reporter.preparing(activity)

    def started(self, record: Mapping[str, Any]) -> None:
        for reporter in self.reporters:
            reporter.started(record)

    def training(self, record: Mapping[str, Any]) -> None:
        for reporter in self.reporters:
            reporter.training(record)

    def validation(self, record: Mapping[str, Any]) -> None:
        for reporter in self.reporters:
            reporter.validation(record)


class _Tracker:
    """A `Reporter` that stores the measures of each record at its step."""

    def preparing(self, activity: str) -> None:
        """Store nothing."""

    def started(self, record: Mapping[str, Any]) -> None:
        """Store nothing."""

    def training(self, record: Mapping[str, Any]) -> None:
        speed = record["tokens"] / max(record["seconds"], 1e-9)
        self.store(record["step"], {**_measures(record), "tokens_per_second": speed})

    def validation(self, record: Mapping[str, Any]) -> None:
        self.store(record["step"], _measures(record))

    def store(self, step: int, measures: Mapping[str, float]) -> None:
        """Store numbers by name at a step."""
        raise NotImplementedError


def _measures(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in record.items() if name not in NO_MEASURES}


class _TensorBoard(_Tracker):
    def __init__(self, folder: Path, step: int) -> None:
        # Not torch.utils.tensorboard, because MLX needs no PyTorch.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.events, self.summaries = event_pb2, summary_pb2
        self.writer = EventFileWriter(str(folder))
        if step:
            # A killed run may have stored steps that it did not save.
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(step=step + 1, session_log=start)

    def store(self, step: int, measures: Mapping[str, float]) -> None:
        values = [
            self.summaries.Summary.Value(tag=name, simple_value=value)
            for name, value in measures.items()
        ]
        self._add(step=step, summary=self.summaries.Summary(value=values))

    def _add(self, **fields: Any) -> None:
        self.writer.add_event(self.events.Event(wall_time=time.time(), **fields))


@contextmanager
def _tensorboard(run: Run, step: int) -> Iterator[Reporter]:
    tracker = _TensorBoard(run.folder / TENSORBOARD, step)
    try:
        yield tracker
    finally:
        tracker.writer.close()


class _Wandb(_Tracker):
    def __init__(self, session: Any) -> None:
        self.session = session
        session.define_metric("*", step_metric="step")

    def store(self, step: int, measures: Mapping[str, float]) -> None:
        # The step is a number like the others: a resumed run may go back, which theirs may not.
        self.session.log({**measures, "step": step})


@contextmanager
def _wandb(run: Run, step: int) -> Iterator[Reporter]:
    import wandb

    path = run.folder / TRACKING
    name = read_json(path)["wandb"] if path.is_file() else secrets.token_hex(4)
    write_json(path, {"wandb": name})
    try:
        session = wandb.init(
            id=name,
            resume="allow",
            name=run.folder.name,
            project=os.environ.get("WANDB_PROJECT", "sessa"),
            dir=str(run.folder),
            config={**run.settings.to_dict(), "model": run.config.to_dict()},
            settings=wandb.Settings(console="off"),
        )
    except Exception as error:  # the library has many types, for a key, a network, a project
        raise SessaError(
            f"`track` wandb: the run cannot start ({error}); set WANDB_MODE=offline to keep the "
            "metrics here"
        ) from None
    failed = True
    try:
        yield _Wandb(session)
        failed = False
    finally:
        session.finish(exit_code=int(failed))
