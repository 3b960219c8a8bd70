"""One training session, from the request to the result, with the backend of either framework."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sessa_common.config import SessaConfig, parameter_count
from sessa_common.data.tasks import TaskBatches, options_of
from sessa_common.errors import SessaError
from sessa_common.train_config import TrainConfig
from sessa_common.training.backend import TrainBackend
from sessa_common.training.metrics import last_metrics, read_metrics
from sessa_common.training.preparation import TrainRequest, prepare
from sessa_common.training.processes import (
    OneProcess,
    Processes,
    check_sharing,
    check_sizes,
    require_same_data,
    wait_for_all,
)
from sessa_common.training.profiling import Recorder, StepProfile, require_steps
from sessa_common.training.run_folder import (
    Run,
    create_run_folder,
    open_run_folder,
    read_task_result,
    restore_run,
    write_task_result,
)
from sessa_common.training.saved_state import read_state_metadata
from sessa_common.training.trackers import require_trackers, tracked
from sessa_common.training.trained_parameters import trained_shapes
from sessa_common.training.trainer import Reporter, Silent, Trainer

MakeBackend = Callable[
    [SessaConfig, TrainConfig, Mapping[str, np.ndarray], str | None], TrainBackend
]
MEASURED = ("step", "loss", "validation_loss", "validation_perplexity", "validation_accuracy")


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A run folder and what its training measured.

    `metrics` holds the newest step, loss, validation_loss, validation_perplexity (text) and
    validation_accuracy (a task). `task_result` is the content of result.json, which a finished run
    on a task has. `finished` is False when Ctrl-C ended the run early; it can be resumed. `is_main`
    is False in a process that trains for another one, which alone has the metrics. `profile` is the
    content of profile.json.
    """

    folder: Path
    finished: bool
    parameters: int
    metrics: dict[str, Any]
    task_result: dict[str, Any] | None = None
    is_main: bool = True
    profile: dict[str, Any] | None = None


def run_session(
    make_backend: MakeBackend,
    request: TrainRequest,
    device: str | None = None,
    reporter: Reporter | None = None,
    processes: Processes | None = None,
    recorder: Recorder | None = None,
) -> TrainResult:
    """Train what is asked for and return the result; a recorder measures a few of the steps.

    A new run folder is made after everything that can fail early was tried: the data are read, the
    tokenizer is there and the backend holds the weights on its device. The folder is locked until
    the end. Of several processes each calls this, and only the main one writes and
    reports. Raises SessaError.
    """
    processes = processes or OneProcess()
    is_main = processes.rank == 0
    reporter = reporter if reporter is not None and is_main else Silent()
    try:
        with ExitStack() as lock:
            if is_main and request.resume is not None and Path(request.resume).is_dir():
                lock.enter_context(open_run_folder(Path(request.resume)))
            # The others read the folder when the main process has put it in order.
            wait_for_all(processes)
            return _run_locked(make_backend, request, device, reporter, lock, processes, recorder)
    except RuntimeError as error:
        if processes.is_lost(error):
            raise SessaError(
                f"process {processes.rank} of {processes.size} stops, because another process of "
                "this run has ended; its message says why, and `resume` goes on from the last save"
            ) from None
        raise


def _run_locked(
    make_backend: MakeBackend,
    request: TrainRequest,
    device: str | None,
    reporter: Reporter,
    lock: ExitStack,
    processes: Processes,
    recorder: Recorder | None,
) -> TrainResult:
    run = prepare(request, reporter.preparing)
    require_trackers(run.settings.track)
    is_main = processes.rank == 0
    check_sizes(run.settings, processes)
    if not run.resumed:
        check_sharing(run.settings, processes)
    require_same_data(processes, run.source.fingerprint)
    steps = run.settings.steps
    done = read_state_metadata(run.folder)[0] if run.resumed else 0
    if done > steps:
        raise SessaError(
            f"{run.folder}: the run has taken {done} steps already, which cannot be undone to "
            f"{steps}; give `steps` above {done} to go on"
        )
    if run.resumed and done == steps and not _is_untested(run):
        raise SessaError(
            f"{run.folder}: all {steps} steps are done; give a larger `steps` to go on"
        )
    if recorder is not None:
        require_steps(steps - done)
    backend = make_backend(run.config, run.settings, run.weights, device)
    if run.resumed:
        step = restore_run(run, backend)
    else:
        step, state = 0, backend.state()
        if is_main:
            create_run_folder(run, state, backend.precision, force=request.force, lock_until=lock)
        elif not isinstance(state, Mapping):
            state.start(None).result()
    profile = None
    with ExitStack() as stack:
        if recorder is not None and is_main:
            profile = StepProfile(backend, recorder, run.config, run.folder, processes.size)
            stack.callback(profile.close)
        told = stack.enter_context(tracked(reporter, run, step)) if is_main else reporter
        trainer = Trainer(profile or backend, run, step, told, processes)
        told.started(_first_record(trainer))
        finished = trainer.train()
    if finished and isinstance(run.source, TaskBatches):
        task = run.source.data.task
        measures = run.source.test(backend.predict)
        if is_main:
            write_task_result(run, measures, task.name, options_of(task))
    # No process ends while the main one still writes: a launcher may take that for a failure.
    wait_for_all(processes)
    if not is_main:
        count = parameter_count(run.config)
        return TrainResult(
            folder=run.folder, finished=finished, parameters=count, metrics={}, is_main=False
        )
    result = _result(run, finished)
    return result if profile is None else dataclasses.replace(result, profile=profile.result)


def _is_untested(run: Run) -> bool:
    """True for a run that was killed between its last step and the test of its task."""
    is_task = run.settings.task is not None
    return is_task and read_task_result(run.folder, run.settings.steps) is None


def _first_record(trainer: Trainer) -> dict[str, Any]:
    run, backend = trainer.run, trainer.backend
    return {
        "folder": run.folder,
        "step": trainer.step,
        "steps": run.settings.steps,
        "parameters": parameter_count(run.config),
        "trained": sum(map(math.prod, trained_shapes(run.config, run.settings).values())),
        "data": run.source.summary,
        "notes": [*run.source.notes, *trainer.notes],
        "vocab_size": run.config.vocab_size,
        "device": backend.device,
        "precision": backend.precision,
        "processes": trainer.processes.size,
    }


def _result(run: Run, finished: bool) -> TrainResult:
    last = last_metrics(read_metrics(run.folder))
    return TrainResult(
        folder=run.folder,
        finished=finished,
        parameters=parameter_count(run.config),
        metrics={name: last[name] for name in MEASURED if name in last},
        task_result=read_task_result(run.folder, run.settings.steps) if finished else None,
    )
