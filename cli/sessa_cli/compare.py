"""`sessa compare`: train matched models on one task and report their results."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from sessa_cli.common import DIVERGED, FAILED, INTERRUPTED, make_console, print_json, say
from sessa_common.errors import SessaError
from sessa_common.experiments.comparison import MODELS, OLD_NAMES, Comparison, read_plan
from sessa_common.experiments.comparison_report import RESULTS, TABLE, write_report
from sessa_common.experiments.comparison_runner import Runner, TrainCommand
from sessa_common.frameworks import choose_backend, framework

TRAIN = (sys.executable, "-m", "sessa_cli.main", "train")
# Options of `sessa train` that are not named like their field.
OPTIONS = {"task_options": "task-option"}
AS_IN_TRAIN = "As in `sessa train`."


def compare(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write, or to continue in.")],
    task: Annotated[
        str | None, typer.Option(help="symbolsoup, diffuse-mqar or a folder of `sessa data`.")
    ] = None,
    task_options: Annotated[
        list[str] | None,
        typer.Option("--task-option", help="Option of the task, as name=value; repeatable."),
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Text instead of a task; as in `sessa train`.")
    ] = None,
    validation_data: Annotated[
        list[str] | None, typer.Option(help="Held-out text, as in `sessa train`.")
    ] = None,
    text_field: Annotated[str | None, typer.Option(help=AS_IN_TRAIN)] = None,
    models: Annotated[
        str,
        typer.Option(help=f"Of {', '.join(MODELS)}, or names of --config; separated by commas."),
    ] = ",".join(Comparison.models),
    configs: Annotated[
        list[str] | None,
        typer.Option("--config", help="name=config.json, a model of your own; repeatable."),
    ] = None,
    scales: Annotated[
        str, typer.Option("--scale", help="Sizes of the presets, separated by commas.")
    ] = ",".join(Comparison.scales),
    seeds: Annotated[
        int, typer.Option(help="Seeds of each model; more can be added later.")
    ] = Comparison.seeds,
    steps: Annotated[int, typer.Option(help="Optimizer steps of a run.")] = Comparison.steps,
    batch_size: Annotated[int, typer.Option(help="Rows in a step.")] = Comparison.batch_size,
    learning_rates: Annotated[
        str, typer.Option(help="Peak learning rates; the best one is chosen for each model.")
    ] = ",".join(map(str, Comparison.learning_rates)),
    sweep_steps: Annotated[
        int, typer.Option(help="Steps of the runs that choose the rate; 0: a quarter of --steps.")
    ] = Comparison.sweep_steps,
    control_task_options: Annotated[
        list[str] | None,
        typer.Option(
            "--control-task-option",
            help="Option of the easy control task, as name=value; repeatable.",
        ),
    ] = None,
    control_steps: Annotated[
        int,
        typer.Option(
            help="Steps of the control; 0: --steps. More repeats the controls that failed."
        ),
    ] = Comparison.control_steps,
    control_threshold: Annotated[
        float, typer.Option(help="Share of the control's ceiling from which it is passed.")
    ] = Comparison.control_threshold,
    jobs: Annotated[int, typer.Option(help="Runs at the same time, on all devices together.")] = 1,
    max_position_embeddings: Annotated[
        int | None,
        typer.Option("--max-position-embeddings", "--context", help=AS_IN_TRAIN),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help=AS_IN_TRAIN)] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(help="As in `sessa train`; default: a tenth of the run's steps.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help=AS_IN_TRAIN)] = None,
    evaluate_every: Annotated[
        int | None,
        typer.Option(help="As in `sessa train`; default: a twentieth of the run's steps."),
    ] = None,
    evaluate_batches: Annotated[int | None, typer.Option(help=AS_IN_TRAIN)] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help=AS_IN_TRAIN)] = None,
    precision: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    backend: Annotated[str | None, typer.Option(help="auto, mlx or torch.")] = None,
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help=AS_IN_TRAIN)] = False,
    device: Annotated[
        str | None,
        typer.Option(help="As in `sessa train`; several with commas: cuda:0,cuda:1."),
    ] = None,
    report_only: Annotated[
        bool, typer.Option(help="Make only table and pictures, from the runs in --out.")
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON on stdout.")
    ] = False,
) -> None:
    """Train matched models on one task, several seeds each, and write a table and pictures.

    Example: sessa compare --task diffuse-mqar --scale 1m --seeds 3 --jobs 4 --out runs/mqar
    """
    console = make_console(json_output)
    failed: list[str] = []
    if report_only:
        results = write_report(out, read_plan(out))
    else:
        settings = {
            "tokenizer": tokenizer,
            "text_field": text_field,
            "validation_data": tuple(validation_data or ()) or None,
            "max_position_embeddings": max_position_embeddings,
            "warmup_steps": warmup_steps,
            "weight_decay": weight_decay,
            "evaluate_every": evaluate_every,
            "evaluate_batches": evaluate_batches,
            "checkpoint_every": checkpoint_every,
            "precision": precision,
            "compile": compile or None,
        }
        comparison = Comparison(
            task=task,
            task_options=tuple(task_options or ()),
            data=tuple(data or ()),
            models=tuple(OLD_NAMES.get(name, name) for name in _names(models)),
            scales=_names(scales),
            configs=tuple(configs or ()),
            seeds=seeds,
            steps=steps,
            batch_size=batch_size,
            learning_rates=_rates(learning_rates),
            sweep_steps=sweep_steps,
            control_task_options=tuple(control_task_options or ()),
            control_steps=control_steps,
            control_threshold=control_threshold,
            settings={name: value for name, value in settings.items() if value is not None},
        )
        backend = choose_backend(backend)
        runner = Runner(
            out,
            comparison,
            TrainCommand(program=TRAIN, options=train_options, diverged_code=DIVERGED),
            parallel=jobs,
            backend=backend,
            devices=_devices(backend, device),
            say=lambda line: say(console, line),
        )
        is_finished = runner.run()
        failed, results = runner.failed, write_report(out, comparison)
        if not is_finished:
            say(console, f"stopped; the same command continues in {out}")
            raise typer.Exit(INTERRUPTED)
    if json_output:
        print_json(results)
    say(console, (out / TABLE).read_text(encoding="utf-8"))
    say(console, f"wrote {out / TABLE}, {RESULTS} and the pictures")
    if failed:
        say(console, f"failed: {', '.join(failed)}; the same command tries failed runs again")
        raise typer.Exit(FAILED)


def train_options(fields: Mapping[str, Any]) -> list[str]:
    """Turn arguments of `train` into options of `sessa train`; a tuple is a repeated option."""
    words: list[str] = []
    for name, value in fields.items():
        option = OPTIONS.get(name, name).replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            values = value if isinstance(value, tuple) else (value,)
            words += [word for each in values for word in (f"--{option}", str(each))]
    return words


def _names(given: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in given.split(",") if part.strip())


def _rates(given: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in _names(given))
    except ValueError:
        raise SessaError(
            f"--learning-rates is {given!r}, expected numbers separated by commas"
        ) from None


def _devices(backend: str, given: str | None) -> tuple[str, ...]:
    """Split --device and check each device; none when the framework is to choose."""
    if given is None:
        return ()
    devices = tuple(part.strip() for part in given.split(","))
    if "" in devices or len(set(devices)) < len(devices):
        raise SessaError(f"--device is {given!r}, expected devices separated by commas, each once")
    # A framework keeps memory on every device that it has used, so a process that ends checks them.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        for device in devices:
            process.submit(_check_device, backend, device).result()
    return devices


def _check_device(backend: str, device: str) -> None:
    framework(backend, "training").choose_device(device)
