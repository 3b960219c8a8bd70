"""`sessa compare`: matched models on one task, each run a `sessa train` of its own."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sessa_cli.common import (
    DIVERGED,
    FAILED,
    INTERRUPTED,
    choose_backend,
    framework,
    make_console,
    print_json,
    say,
)
from sessa_common.checkpoint.folder import write_json
from sessa_common.data.sources import check_names
from sessa_common.errors import SessaError
from sessa_common.experiments.comparison import (
    MIXERS,
    PLAN,
    RESULTS,
    TABLE,
    Comparison,
    Job,
    Model,
    best_rate,
    check_plan,
    control_result,
    read_plan,
    read_result,
    report,
    write_plan,
)
from sessa_common.json_files import read_json
from sessa_common.training.trainer import STATE, stop_signal

TRAIN = (sys.executable, "-m", "sessa_cli.main", "train")
LOG_END = 12
LOCK = "lock"


def compare(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write, or to go on in.")],
    task: Annotated[
        str | None, typer.Option(help="symbolsoup, diffuse-mqar or a folder of `sessa data`.")
    ] = None,
    task_option: Annotated[
        list[str] | None, typer.Option(help="name=value of the task; repeatable.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Text, instead of --task; as in `sessa train`.")
    ] = None,
    validation_data: Annotated[
        list[str] | None, typer.Option(help="Held-out text, as in `sessa train`.")
    ] = None,
    text_field: Annotated[str | None, typer.Option(help="As in `sessa train`.")] = None,
    mixers: Annotated[
        str, typer.Option(help=f"Of {', '.join(MIXERS)}, or names of --config; with commas.")
    ] = ",".join(Comparison.mixers),
    config: Annotated[
        list[str] | None, typer.Option(help="mixer=config.json, a model of your own; repeatable.")
    ] = None,
    scale: Annotated[str, typer.Option(help="Sizes of the presets, with commas.")] = "1m",
    seeds: Annotated[int, typer.Option(help="Seeds a model; may grow later.")] = Comparison.seeds,
    steps: Annotated[int, typer.Option(help="Optimizer steps of a run.")] = Comparison.steps,
    batch_size: Annotated[int, typer.Option(help="Rows in a step.")] = Comparison.batch_size,
    learning_rates: Annotated[
        str, typer.Option(help="Highest learning rates to choose from, a model at a time.")
    ] = "1e-3,3e-3",
    sweep_steps: Annotated[
        int, typer.Option(help="Steps of the runs that choose the rate; 0: a quarter of --steps.")
    ] = 0,
    control_task_option: Annotated[
        list[str] | None, typer.Option(help="name=value of the easy control; repeatable.")
    ] = None,
    control_steps: Annotated[
        int, typer.Option(help="Steps of the control; 0: --steps. May grow, for those that failed.")
    ] = 0,
    control_threshold: Annotated[
        float, typer.Option(help="Accuracy, of the ceiling, from which it is passed.")
    ] = Comparison.control_threshold,
    jobs: Annotated[int, typer.Option(help="Runs at a time, on all devices together.")] = 1,
    context: Annotated[int | None, typer.Option(help="As in `sessa train`, for text.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="As in `sessa train`.")] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(help="Default: a tenth of the run's steps.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="As in `sessa train`.")] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Default: a twentieth of the run's steps.")
    ] = None,
    evaluate_batches: Annotated[int | None, typer.Option(help="As in `sessa train`.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="As in `sessa train`.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    backend: Annotated[str | None, typer.Option(help="auto, mlx or torch.")] = None,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="As in `sessa train`.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="As in `sessa train`, or several with commas: cuda:0,cuda:1.")
    ] = None,
    report_only: Annotated[
        bool, typer.Option(help="Only rebuild table and pictures from the runs in --out.")
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON on stdout.")
    ] = False,
) -> None:
    """Train matched models on one task, several seeds each, and write a table and pictures.

    Example: sessa compare --task diffuse-mqar --scale 1m --seeds 3 --jobs 4 --out runs/mqar
    """
    console = make_console(json_output)
    if report_only:
        results = report(out, read_plan(out))
        failed = []
    else:
        about_text = {"tokenizer": tokenizer, "text-field": text_field,
                      "validation-data": validation_data}  # fmt: skip
        for name, value in about_text.items():
            if task is not None and value:
                raise SessaError(f"--{name} is about text; it does not go with --task {task}")
        check_names(validation_data or ())
        options = {**about_text, "context": context, "warmup-steps": warmup_steps,
                   "weight-decay": weight_decay, "evaluate-every": evaluate_every,
                   "evaluate-batches": evaluate_batches, "checkpoint-every": checkpoint_every,
                   "precision": precision}  # fmt: skip
        comparison = Comparison(
            task=task, task_options=tuple(task_option or ()), data=tuple(data or ()),
            mixers=_names(mixers), scales=_names(scale), configs=tuple(config or ()), seeds=seeds,
            steps=steps, batch_size=batch_size, learning_rates=_rates(learning_rates),
            sweep_steps=sweep_steps, control_task_options=tuple(control_task_option or ()),
            control_steps=control_steps, control_threshold=control_threshold,
            options=_given(options) + ("--compile",) * compile,
        )  # fmt: skip
        if jobs < 1:
            raise SessaError(f"jobs is {jobs}, expected 1 or more")
        backend = choose_backend(backend)
        runner = Runner(out, comparison, jobs, backend, _devices(backend, device), console)
        finished = runner.run()
        failed = runner.failed
        results = report(out, comparison)
        if not finished:
            say(console, f"stopped; the same command goes on in {out}")
            raise typer.Exit(INTERRUPTED)
    if json_output:
        print_json(results)
    say(console, (out / TABLE).read_text(encoding="utf-8"))
    say(console, f"wrote {out / TABLE}, {RESULTS} and the pictures")
    if failed:
        say(console, f"failed: {', '.join(failed)}; the same command tries failed runs again")
        raise typer.Exit(FAILED)


def _names(given: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in given.split(",") if part.strip())


def _rates(given: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in _names(given))
    except ValueError:
        raise SessaError(f"--learning-rates {given!r}, expected numbers with commas") from None


def _devices(backend: str, given: str | None) -> tuple[str, ...]:
    """The devices of --device, each checked to be there; none when the framework is to choose."""
    if given is None:
        return ()
    devices = tuple(part.strip() for part in given.split(","))
    if "" in devices or len(set(devices)) < len(devices):
        raise SessaError(f"--device {given!r}, expected one or more with commas, each once")
    # In a process of its own, since a framework holds memory on every device that it has looked at.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        for device in devices:
            process.submit(_check_device, backend, device).result()
    return devices


def _check_device(backend: str, device: str) -> None:
    framework(backend, "training").choose_device(device)


def _given(options: dict[str, Any]) -> tuple[str, ...]:
    """As they are typed; a list is an option that is repeated."""
    parts: list[str] = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [] if value is None else [value]
        parts += [part for each in values for part in (f"--{name}", str(each))]
    return tuple(parts)


class Runner:
    """Starts the runs of a comparison in subprocesses, `parallel` at a time, and reports them.

    Each run goes to the device with the fewest; without devices the framework chooses.
    """

    def __init__(self, out: Path, comparison: Comparison, parallel: int, backend: str,
                 devices: tuple[str, ...], console: Console) -> None:  # fmt: skip
        self.out, self.comparison, self.console = out, comparison, console
        self.parallel, self.backend, self.devices = parallel, backend, devices
        self.models = comparison.models()
        self.failed: list[str] = []
        self.running: dict[str, tuple[Job, str | None, subprocess.Popen[bytes]]] = {}
        self.lock: tuple[int, ...] = ()
        comparison.check_sources()
        check_plan(out, comparison)
        self.commands: dict[str, list[str]] = {}
        there = {path.name for path in out.iterdir()} if out.exists() else set()
        if there - {LOCK} and PLAN not in there:
            raise SessaError(f"{out}: not empty and no comparison; give another --out")
        out.mkdir(parents=True, exist_ok=True)

    def run(self) -> bool:
        """Run what is not finished; False when stopped by a signal."""
        with _alone(self.out) as self.lock, stop_signal() as stopped:
            try:
                waiting = self._waiting()
                while not stopped():
                    while waiting and len(self.running) < self.parallel:
                        self._start(waiting.pop(0))
                    if not self.running:
                        self._name_models_without_rate()
                        return True
                    time.sleep(0.1)
                    if self._reap():
                        waiting = self._waiting()
                self._signal(signal.SIGTERM)
                while self.running:
                    time.sleep(0.1)
                    self._reap(stopping=True)
                return False
            finally:
                # A second Ctrl-C, or an error of ours: nothing may be left behind on the device.
                self._signal(signal.SIGKILL)

    def _name_models_without_rate(self) -> None:
        for model in self.models:
            if best_rate(self.out, self.comparison, model) is None:
                self.failed.append(model.name)
                say(self.console, f"{model.name} FAILED: it learned at none of the rates")

    def _waiting(self) -> list[Job]:
        """The jobs that could be started now, sweeps first: a model's others wait for its rate."""
        jobs = [job for job in self._jobs() if not self._is_done(job)]
        self._write_plan()
        return [j for j in jobs if j.name not in self.failed and j.name not in self.running]

    def _jobs(self) -> list[Job]:
        sweeps, controls, seeds = [], [], []
        for model in self.models:
            sweep = self.comparison.sweep_jobs(model)
            sweeps += sweep
            settled = all(self._is_done(job) or job.name in self.failed for job in sweep)
            rate = best_rate(self.out, self.comparison, model) if settled else None
            if rate is None:
                continue
            control = self._control_job(model, rate)
            controls += [control] if control else []
            seeds += self.comparison.seed_jobs(model, rate)
        jobs = [*sweeps, *controls, *seeds]
        # As a person would type it; which of several devices a run gets is known when it starts.
        device = self.devices[0] if len(self.devices) == 1 else None
        self.commands = {job.name: ["sessa", "train", *self._options(job, device)] for job in jobs}
        return jobs

    def _control_job(self, model: Model, rate: float) -> Job | None:
        """The control's run; what was passed before --control-steps grew keeps its steps."""
        comparison, result = self.comparison, control_result(self.out, self.comparison, model)
        if result is not None and result["passed"]:
            comparison = dataclasses.replace(comparison, control_steps=result["steps"])
        return comparison.control_job(model, rate)

    def _write_plan(self) -> None:
        path = self.out / PLAN
        if not path.exists() or read_json(path)["commands"] != self.commands:
            write_plan(self.out, self.comparison, self.commands)

    def _options(self, job: Job, device: str | None) -> list[str]:
        return [*job.arguments, *self._where(device), "--out", str(self.out / job.name), "--json"]

    def _where(self, device: str | None) -> tuple[str, ...]:
        return _given({"backend": self.backend, "device": device})

    def _free_device(self) -> str | None:
        """The device with the fewest runs, the first of them; None where none is given."""
        taken = [device for _, device, _ in self.running.values()]
        return min(self.devices, key=taken.count, default=None)

    def _is_done(self, job: Job) -> bool:
        if not self._same(job):
            return False
        return self._diverged(job) or read_result(self.out / job.name, job.steps) is not None

    def _diverged(self, job: Job) -> bool:
        """Whether a run of the sweep diverged, which settles its rate."""
        return bool(read_json(self.out / f"{job.name}.json").get("diverged"))

    def _same(self, job: Job) -> bool:
        path = self.out / f"{job.name}.json"
        return path.exists() and read_json(path)["arguments"] == list(job.arguments)

    def _start(self, job: Job) -> None:
        folder, log = self.out / job.name, self.out / f"{job.name}.log"
        device = self._free_device()
        folder.parent.mkdir(parents=True, exist_ok=True)
        if self._same(job) and (folder / STATE).exists():
            command = [*TRAIN, "--resume", str(folder), *self._where(device), "--json"]
        else:
            # Left by another command, or killed before its first save: nothing to go on from.
            shutil.rmtree(folder, ignore_errors=True)
            command = [*TRAIN, *self._options(job, device)]
        write_json(self.out / f"{job.name}.json", {"arguments": job.arguments})
        threads = max(1, (os.cpu_count() or 1) // self.parallel)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with log.open("ab") as file:
            # A session of its own: Ctrl-C in the terminal reaches it once, through us.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env=environment, start_new_session=True, pass_fds=self.lock,
            )  # fmt: skip
        self.running[job.name] = (job, device, process)

    def _reap(self, stopping: bool = False) -> bool:
        """Report the runs that ended; whether there were any."""
        ended = [name for name, (_, _, p) in self.running.items() if p.poll() is not None]
        for name in ended:
            job, _, process = self.running.pop(name)
            result = read_result(self.out / name, job.steps)
            if process.returncode == 0 and result is not None:
                say(self.console, f"{name}: {_outcome(result)}; {self._left()}")
            elif process.returncode == DIVERGED and name.startswith("sweep/"):
                settled = {"arguments": job.arguments, "diverged": True}
                write_json(self.out / f"{name}.json", settled)
                say(self.console, f"{name}: diverged, so this rate is out; {self._left()}")
            elif not stopping:
                self.failed.append(name)
                end = _log_end(self.out / f"{name}.log")
                say(self.console, f"{name} FAILED (exit code {process.returncode}):\n{end}")
        if ended:
            report(self.out, self.comparison)
        return bool(ended)

    def _left(self) -> str:
        each = len(self.comparison.learning_rates) if len(self.comparison.learning_rates) > 1 else 0
        each += bool(self.comparison.control_options) + self.comparison.seeds
        done = sum(self._is_done(job) for job in self._jobs())
        return f"{done} of {each * len(self.models)} runs done, {len(self.failed)} failed"

    def _signal(self, number: signal.Signals) -> None:
        for *_, process in self.running.values():
            if process.poll() is None:
                process.send_signal(number)


@contextmanager
def _alone(out: Path) -> Iterator[tuple[int, ...]]:
    """Lock the folder; give what a training run must inherit to hold the lock as well.

    So a folder stays locked while a run that outlived its killed command still writes there.
    """
    if sys.platform == "win32":
        yield ()
        return
    import fcntl

    with (out / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SessaError(
                f"{out}: another sessa compare works there, or a training run that one left behind"
            ) from None
        yield (file.fileno(),)


def _outcome(result: dict[str, Any]) -> str:
    test = result.get("test", {})
    shown = {"accuracy": test.get("accuracy"), "ceiling": test.get("ceiling"),
             "validation loss": result.get("validation_loss"),
             "perplexity": result.get("perplexity")}  # fmt: skip
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)


def _log_end(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-LOG_END:])
