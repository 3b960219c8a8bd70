"""The runner of a comparison: it starts the training runs in processes of their own."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sessa_common.checkpoint.run_files import STATE
from sessa_common.errors import SessaError
from sessa_common.experiments.comparison import (
    PLAN,
    ComparedModel,
    Comparison,
    Job,
    check_plan,
    write_plan,
)
from sessa_common.experiments.comparison_report import write_tables
from sessa_common.experiments.comparison_results import best_rate, control_result, read_result
from sessa_common.json_files import read_json
from sessa_common.storage import is_empty, lock_folder, write_json
from sessa_common.training.trainer import stop_signal

LOG_LINES = 12
WAIT_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """The command that trains a job.

    `program` are the words that start it, `options` turns arguments of `train` into further words,
    and `diverged_code` is its exit code when the loss is not finite.
    """

    program: Sequence[str]
    options: Callable[[Mapping[str, Any]], list[str]]
    diverged_code: int


class Running(NamedTuple):
    """A run in its process, on one of the devices (None: the framework chooses)."""

    job: Job
    device: str | None
    process: subprocess.Popen[bytes]


class Runner:
    """Runs the jobs of a comparison that are not finished, `parallel` at a time.

    Each run goes to the device with the fewest runs. The jobs of a model after its sweep wait for
    its learning rate. `say` is called with one line for every run that ends. Raises SessaError,
    before anything is written, for a folder or a comparison that cannot be used.
    """

    def __init__(
        self,
        out: Path,
        comparison: Comparison,
        command: TrainCommand,
        *,
        parallel: int = 1,
        backend: str | None = None,
        devices: Sequence[str] = (),
        say: Callable[[str], None] = print,
    ) -> None:
        if parallel < 1:
            raise SessaError(f"`jobs` is {parallel}, expected 1 or more")
        self.out, self.comparison, self.command, self.say = out, comparison, command, say
        self.parallel, self.backend, self.devices = parallel, backend, devices
        self.models = comparison.compared_models()
        self.failed: list[str] = []
        self.running: dict[str, Running] = {}
        self.lock = -1  # The lock of the folder, which a run that outlives this one keeps.
        comparison.check_sources()
        check_plan(out, comparison)
        if not is_empty(out) and not (out / PLAN).exists():
            raise SessaError(f"{out}: not empty and no comparison; give another `out`")
        out.mkdir(parents=True, exist_ok=True)

    def run(self) -> bool:
        """Run every job that is not finished; return False when a signal stopped it."""
        with lock_folder(self.out, "sessa compare") as self.lock, stop_signal() as stopped:
            try:
                waiting = self._waiting_jobs()
                while not stopped():
                    while waiting and len(self.running) < self.parallel:
                        self._start(waiting.pop(0))
                    if not self.running:
                        self._report_models_without_rate()
                        return True
                    time.sleep(WAIT_SECONDS)
                    if self._collect_ended():
                        waiting = self._waiting_jobs()
                self._send(signal.SIGTERM)
                while self.running:
                    time.sleep(WAIT_SECONDS)
                    self._collect_ended(stopping=True)
                return False
            finally:
                # After a second Ctrl-C or an error here, no run may be left on a device.
                self._send(signal.SIGKILL)

    def _report_models_without_rate(self) -> None:
        for model in self.models:
            if best_rate(self.out, self.comparison, model) is None:
                self.failed.append(model.name)
                self.say(f"{model.name} FAILED: its training diverged at every learning rate")

    def _waiting_jobs(self) -> list[Job]:
        """Return the jobs that could start now, sweeps first, and write all known jobs' plan."""
        known = self._known_jobs()
        self._write_plan(known)
        return [
            job
            for job in known
            if not self._is_done(job) and job.name not in {*self.failed, *self.running}
        ]

    def _known_jobs(self) -> list[Job]:
        """Return the jobs whose learning rate is known: all sweeps, then controls and seeds."""
        sweeps, controls, seeds = [], [], []
        for model in self.models:
            sweep = self.comparison.sweep_jobs(model)
            sweeps += sweep
            is_settled = all(self._is_done(job) or job.name in self.failed for job in sweep)
            rate = best_rate(self.out, self.comparison, model) if is_settled else None
            if rate is None:
                continue
            control = self._control_job(model, rate)
            controls += [control] if control else []
            seeds += self.comparison.seed_jobs(model, rate)
        return [*sweeps, *controls, *seeds]

    def _control_job(self, model: ComparedModel, rate: float) -> Job | None:
        """Return the control's job, with the steps of before when the control passed in them."""
        comparison, result = self.comparison, control_result(self.out, self.comparison, model)
        if result is not None and result["passed"]:
            comparison = dataclasses.replace(comparison, control_steps=result["steps"])
        return comparison.control_job(model, rate)

    def _write_plan(self, jobs: Sequence[Job]) -> None:
        # With several devices a run's device is known only when the run starts.
        device = self.devices[0] if len(self.devices) == 1 else None
        commands = {job.name: ["sessa", "train", *self._new_run(job, device)] for job in jobs}
        path = self.out / PLAN
        if not path.exists() or read_json(path)["commands"] != commands:
            write_plan(self.out, self.comparison, commands)

    def _new_run(self, job: Job, device: str | None) -> list[str]:
        place = {"backend": self.backend, "device": device, "out": self.out / job.name}
        return self.command.options({**job.fields, **place, "json": True})

    def _free_device(self) -> str | None:
        """Return the first of the devices with the fewest runs; None when none is given."""
        taken = [running.device for running in self.running.values()]
        return min(self.devices, key=taken.count, default=None)

    def _is_done(self, job: Job) -> bool:
        if not self._is_same(job):
            return False
        diverged = bool(read_json(self._record(job))["diverged"])
        return diverged or read_result(self.out / job.name, job.steps) is not None

    def _is_same(self, job: Job) -> bool:
        """Return True when the folder of the job was made with the same arguments."""
        path = self._record(job)
        return path.exists() and read_json(path).get("fields") == _as_json(job.fields)

    def _record(self, job: Job) -> Path:
        return self.out / f"{job.name}.json"

    def _write_record(self, job: Job, *, diverged: bool = False) -> None:
        write_json(self._record(job), {"fields": job.fields, "diverged": diverged})

    def _start(self, job: Job) -> None:
        folder, device = self.out / job.name, self._free_device()
        folder.parent.mkdir(parents=True, exist_ok=True)
        if self._is_same(job) and (folder / STATE).exists():
            again = {"resume": folder, "backend": self.backend, "device": device, "json": True}
            words = self.command.options(again)
        else:
            # The run had other arguments, or it was killed before its first save.
            shutil.rmtree(folder, ignore_errors=True)
            words = self._new_run(job, device)
        self._write_record(job)
        threads = max(1, (os.cpu_count() or 1) // self.parallel)
        with (self.out / f"{job.name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*self.command.program, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                # In a session of its own, the run gets Ctrl-C from this runner only, and once.
                start_new_session=True,
                pass_fds=(self.lock,),
            )
        self.running[job.name] = Running(job, device, process)

    def _collect_ended(self, *, stopping: bool = False) -> bool:
        """Report every run that ended and write the tables anew; return True if any did."""
        ended = [r for r in self.running.values() if r.process.poll() is not None]
        for running in ended:
            del self.running[running.job.name]
            self._report_end(running, stopping)
        if ended:
            write_tables(self.out, self.comparison)
        return bool(ended)

    def _report_end(self, running: Running, stopping: bool) -> None:
        job, code = running.job, running.process.returncode
        result = read_result(self.out / job.name, job.steps)
        if code == 0 and result is not None:
            self.say(f"{job.name}: {_format_result(result)}; {self._progress()}")
        elif code == self.command.diverged_code and job.name.startswith("sweep/"):
            self._write_record(job, diverged=True)
            self.say(f"{job.name}: diverged, so its rate is out; {self._progress()}")
        elif not stopping:
            self.failed.append(job.name)
            log = _last_lines(self.out / f"{job.name}.log")
            self.say(f"{job.name} FAILED (exit code {code}):\n{log}")

    def _progress(self) -> str:
        rates = len(self.comparison.learning_rates)
        jobs_per_model = (rates if rates > 1 else 0) + self.comparison.seeds
        jobs_per_model += bool(self.comparison.control_options)
        done = sum(self._is_done(job) for job in self._known_jobs())
        total = jobs_per_model * len(self.models)
        return f"{done} of {total} runs done, {len(self.failed)} failed"

    def _send(self, number: signal.Signals) -> None:
        for running in self.running.values():
            if running.process.poll() is None:
                running.process.send_signal(number)


def _as_json(fields: Mapping[str, Any]) -> Any:
    """Return the fields as a JSON file gives them back, with lists for tuples."""
    return json.loads(json.dumps(dict(fields)))


def _format_result(result: Mapping[str, Any]) -> str:
    test = result.get("test", {})
    measures = {
        "accuracy": test.get("accuracy"),
        "ceiling": test.get("ceiling"),
        "validation loss": result.get("validation_loss"),
        "perplexity": result.get("perplexity"),
    }
    return ", ".join(f"{name} {x:.4g}" for name, x in measures.items() if x is not None)


def _last_lines(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-LOG_LINES:])
