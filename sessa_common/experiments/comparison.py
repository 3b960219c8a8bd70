"""A matched comparison of mixers: its plan, what its runs say together, tables and pictures."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sessa_common.checkpoint.folder import write_json
from sessa_common.config import PRESETS, SessaConfig, check_matched, parameter_count
from sessa_common.data.sources import check_names
from sessa_common.data.task_registry import read_task
from sessa_common.errors import SessaError
from sessa_common.json_files import read_json
from sessa_common.training.metrics import read_metrics, tokens_per_second
from sessa_common.training.trainer import STATE, read_state_facts

PLAN, RESULTS, TABLE = "plan.json", "results.json", "results.md"
# A name of --mixers: the preset and the options that make the model of a scale.
MIXERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "sessa": ("sessa-{}", ()),
    "attention": ("transformer-{}", ()),
    "attention-deep": ("transformer-{}-deep", ()),
    "mamba2": ("mamba2-{}", ()),
    "nofeedback": ("sessa-{}", ("--no-feedback",)),
}
# The ablation has fewer parameters than the model it is taken from, so it is not in the match.
UNMATCHED = ("nofeedback",)
# The options that make a task easy enough for every model that works.
EASY = {
    "diffuse-mqar": ("density=0",),
    "symbolsoup": ("noise_min=0", "noise_max=0", "flip_probability=0"),
}
# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {"sessa": "#0072B2", "attention": "#E69F00", "mamba2": "#009E73",
           "nofeedback": "#CC79A7", "attention-deep": "#D55E00"}  # fmt: skip
OTHER_COLOURS = ("#56B4E9", "#000000", "#8C6D31", "#6A51A3")


@dataclass(frozen=True, kw_only=True)
class Model:
    """One row of the table: a mixer at a scale, and the options of `sessa train` that name it."""

    scale: str
    mixer: str
    config: SessaConfig
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name in folders and tables."""
        return f"{self.scale}-{self.mixer}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of `sessa train`: the folder below the comparison's, its options and its steps."""

    name: str
    arguments: tuple[str, ...]
    steps: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared and how; everything that decides a result. Raises SessaError.

    Either `task` or `data` is given. `sweep_steps` and `control_steps` of 0 stand for a quarter of
    `steps` and for `steps`; `options` go to every run as they are.
    """

    task: str | None = None
    task_options: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    mixers: tuple[str, ...] = ("sessa", "attention", "mamba2", "nofeedback")
    scales: tuple[str, ...] = ("1m",)
    configs: tuple[str, ...] = ()
    seeds: int = 3
    steps: int = 1000
    batch_size: int = 32
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    sweep_steps: int = 0
    control_task_options: tuple[str, ...] = ()
    control_steps: int = 0
    control_threshold: float = 0.9
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.task is None) == (not self.data):
            raise SessaError("give either --task, or --data for a language model on text")
        for name in ("seeds", "steps", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise SessaError(f"{name} is {value}, expected 1 or more")
        for name in ("sweep_steps", "control_steps"):
            if (value := getattr(self, name)) < 0:
                raise SessaError(f"{name} is {value}, expected 0 or more")
        if not self.learning_rates or not all(0 < r < math.inf for r in self.learning_rates):
            raise SessaError(f"learning_rates is {self.learning_rates}, expected numbers above 0")
        if not 0 < self.control_threshold <= 1:
            raise SessaError(f"control_threshold is {self.control_threshold}, expected in (0, 1]")
        for name in ("mixers", "scales", "learning_rates"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise SessaError(f"{name} is {values}, expected one or more, each once")
        if self.task is not None and self.task not in EASY and not Path(self.task).is_dir():
            raise SessaError(
                f"task is {self.task!r}, expected {', '.join(EASY)} or a folder of `sessa data`"
            )
        given_options = (*self.task_options, *self.control_task_options)
        if given_options and self.task is None:
            raise SessaError(f"task option {given_options[0]!r} goes with --task, not with --data")
        for given in given_options:
            if "=" not in given:
                raise SessaError(f"task option {given!r}, expected name=value")

    def check_sources(self) -> None:
        """Raise SessaError for a task, an option of it or a name of text that no run could use."""
        if self.task is None:
            check_names(self.data)
            return
        read_task(self.task, self.task_options)
        if self.control_options:
            read_task(self.task, (*self.task_options, *self.control_options))

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Comparison:
        """Read the "options" of a plan.json."""
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in given.items()
        }
        try:
            return cls(**values)
        except TypeError as error:
            raise SessaError(f"{PLAN} is of another version ({error})") from None

    def models(self, vocab_size: int | None = None) -> list[Model]:
        """The models of all scales, checked to be matched within 1 % at each scale.

        Without a vocabulary the models are matched without their embeddings, a stricter check.
        """
        files = dict(_name_and_path(given) for given in self.configs)
        if unknown := sorted(files.keys() - set(self.mixers)):
            raise SessaError(f"--config names {', '.join(unknown)}, not one of --mixers")
        if files and len(self.scales) > 1:
            raise SessaError("--config gives one model, so it goes with one --scale only")
        found = [_model(scale, mixer, files) for scale in self.scales for mixer in self.mixers]
        for scale in self.scales:
            same = {
                model.name: _with_vocabulary(model.config, vocab_size or 1)
                for model in found
                if model.scale == scale and model.mixer not in UNMATCHED
            }
            check_matched(same)
        return found

    def sweep_jobs(self, model: Model) -> list[Job]:
        """A short run for each learning rate, none when there is no choice."""
        if len(self.learning_rates) == 1:
            return []
        steps = self.sweep_steps or max(1, self.steps // 4)
        return [
            self._job(f"sweep/{model.name}-lr{rate:g}", model, rate, steps, 0)
            for rate in self.learning_rates
        ]

    def control_job(self, model: Model, rate: float) -> Job | None:
        """The run on the easy version of the task; None for text and where no one knows it."""
        easy = self.control_options
        if not easy:
            return None
        steps = self.control_steps or self.steps
        return self._job(f"control/{model.name}", model, rate, steps, 0, easy)

    def seed_jobs(self, model: Model, rate: float) -> list[Job]:
        """The runs that the table is made of, one a seed."""
        return [
            self._job(f"runs/{model.name}-seed{seed}", model, rate, self.steps, seed)
            for seed in range(self.seeds)
        ]

    @property
    def control_options(self) -> tuple[str, ...]:
        """The task options of the control, which go over those of the task."""
        return self.control_task_options or EASY.get(self.task or "", ())

    def _job(
        self, name: str, model: Model, rate: float, steps: int, seed: int, easy: Iterable[str] = ()
    ) -> Job:
        source = [part for text in self.data for part in ("--data", text)]
        if self.task is not None:
            values = dict(given.split("=", 1) for given in (*self.task_options, *easy))
            source = ["--task", self.task]
            for key, value in values.items():
                source += ["--task-option", f"{key}={value}"]
        learning = {"steps": steps, "batch-size": self.batch_size, "lr": f"{rate:g}", "seed": seed}
        # The same shape of schedule and the same number of points whatever the length of the run.
        if "--warmup-steps" not in self.options:
            learning["warmup-steps"] = steps // 10
        if "--evaluate-every" not in self.options:
            learning["evaluate-every"] = max(1, steps // 20)
        numbers = [part for key, value in learning.items() for part in (f"--{key}", str(value))]
        arguments = (*source, *model.arguments, *numbers, *self.options)
        return Job(name=name, arguments=arguments, steps=steps)


def _name_and_path(given: str) -> tuple[str, str]:
    name, found, path = given.partition("=")
    if not (name and found and path):
        raise SessaError(f"--config {given!r}, expected mixer=path.json")
    return name, path


def _model(scale: str, mixer: str, files: Mapping[str, str]) -> Model:
    if mixer in files:
        path = Path(files[mixer])
        config = SessaConfig.from_dict(read_json(path), str(path))
        arguments = ("--config", str(path.resolve()))
        return Model(scale=scale, mixer=mixer, config=config, arguments=arguments)
    if mixer not in MIXERS:
        raise SessaError(
            f"mixer is {mixer!r}, expected of {', '.join(MIXERS)}, or --config {mixer}=path.json"
        )
    pattern, flags = MIXERS[mixer]
    if (preset := pattern.format(scale)) not in PRESETS:
        sizes = [name.removeprefix("sessa-") for name in PRESETS if name.startswith("sessa-")]
        raise SessaError(f"scale is {scale!r}, expected of {', '.join(sizes)}")
    config = dataclasses.replace(PRESETS[preset], feedback="--no-feedback" not in flags)
    return Model(scale=scale, mixer=mixer, config=config, arguments=("--preset", preset, *flags))


def _with_vocabulary(config: SessaConfig, size: int) -> SessaConfig:
    return dataclasses.replace(
        config, vocab_size=size, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )


def write_plan(out: Path, comparison: Comparison, commands: Mapping[str, Sequence[str]]) -> None:
    """Write plan.json: the options, every configuration, and every command as it is run."""
    models = {
        model.name: {"arguments": model.arguments, "config": model.config.to_dict()}
        for model in comparison.models()
    }
    plan = {"options": dataclasses.asdict(comparison), "models": models, "commands": commands}
    write_json(out / PLAN, plan)


def check_plan(out: Path, comparison: Comparison) -> None:
    """Raise SessaError when the folder holds another comparison; seeds and control_steps may grow.

    A control that failed is then trained anew, since the steps decide its schedule from the start.
    """
    if not (out / PLAN).exists():
        return
    before = read_plan(out)
    for field in dataclasses.fields(Comparison):
        there, given = getattr(before, field.name), getattr(comparison, field.name)
        grows = field.name == "seeds" and given >= there
        if field.name == "control_steps":
            grows = (given or comparison.steps) >= (there or before.steps)
        if there != given and not grows:
            raise SessaError(
                f"{out}: {field.name} is {there} in its {PLAN}, {given} was given; give the same "
                "options (only seeds and control-steps may grow), or another --out"
            )
    models = read_json(out / PLAN).get("models", {})
    for model in comparison.models():
        if models.get(model.name, {}).get("config") != model.config.to_dict():
            raise SessaError(
                f"{out}: the configuration of {model.name} is not the one in its {PLAN}; give the "
                "file as it was, or another --out"
            )


def read_plan(out: Path) -> Comparison:
    """The comparison that a folder was made by."""
    return Comparison.from_dict(read_json(out / PLAN).get("options", {}))


def read_result(folder: Path, steps: int) -> dict[str, Any] | None:
    """What a run of `sessa train` left: its result.json, for text the last validation; or None."""
    if (folder / "result.json").exists():
        return read_json(folder / "result.json")
    records = read_metrics(folder)
    last = {name: value for record in records for name, value in record.items()}
    settings = folder / "training.json"
    if not settings.exists() or read_json(settings).get("task") is not None:
        return None
    done = [r for r in records if r["step"] == steps and "validation_loss" in r]
    if not done:
        return None
    return {
        "parameters": parameter_count(SessaConfig.from_dict(read_json(folder / "config.json"))),
        "tokens_per_second": tokens_per_second(records),
        "validation_loss": last["validation_loss"],
        "perplexity": math.exp(min(last["validation_loss"], 700.0)),
    }


def best_rate(out: Path, comparison: Comparison, model: Model) -> float | None:
    """The learning rate of the sweep with the lowest validation loss; None when none finished."""
    if len(comparison.learning_rates) == 1:
        return comparison.learning_rates[0]
    losses = sweep_losses(out, comparison, model)
    finished = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(finished, key=finished.__getitem__) if finished else None


def sweep_losses(out: Path, comparison: Comparison, model: Model) -> dict[float, float | None]:
    """The validation loss of each learning rate of the sweep, None where the run did not end."""
    losses: dict[float, float | None] = {}
    for rate, job in zip(comparison.learning_rates, comparison.sweep_jobs(model), strict=False):
        loss = (read_result(out / job.name, job.steps) or {}).get("validation_loss")
        losses[rate] = loss if loss is not None and math.isfinite(loss) else None
    return losses


def aggregate(values: Sequence[Any]) -> Any:
    """Mean, sample standard deviation (None for one value) and count of numbers, leaf by leaf."""
    if all(isinstance(value, Mapping) for value in values):
        shared = [key for key in values[0] if all(key in value for value in values)]
        return {key: aggregate([value[key] for value in values]) for key in shared}
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(numbers) != len(values):
        return values[0]
    std = statistics.stdev(numbers) if len(numbers) > 1 else None
    return {"mean": statistics.fmean(numbers), "std": std, "n": len(numbers)}


def flops_per_token(config: SessaConfig, length: int) -> float:
    """Floating-point operations per training token of rows of `length`, forward and backward.

    Matrix products only, 2 operations a multiply-add, the backward pass twice the forward: 6 for
    each parameter (a lookup of an untied embedding is free), and per layer, with the mean of
    (T + 1) / 2 visible positions, 4 D (T + 1) / 2 forward for scores and values of attention; the
    feedback's scores and solve the same over the (T - 1) / 2 strictly past ones; Mamba-2's
    recurrence 6 E N (decay, update, read; its chunked form does more).
    """
    used = parameter_count(config)
    if not config.tie_word_embeddings:
        used -= config.vocab_size * config.hidden_size
    D, inner = config.hidden_size, config.mamba_expand * config.hidden_size
    forward = 0.0
    for mixer in config.mixers:
        if mixer == "mamba2":
            forward += 6 * inner * config.mamba_d_state
        else:
            forward += 2 * D * (length + 1)
        if mixer == "sessa" and config.feedback:
            forward += 2 * D * (length - 1)
    return 6 * used + 3 * forward


def collect(out: Path, comparison: Comparison) -> dict[str, Any]:
    """The results object: a row a model, aggregated over the seeds that are finished."""
    rows = [_row(out, comparison, model) for model in comparison.models()]
    threshold = comparison.control_threshold if comparison.control_options else None
    return {
        "task": comparison.task,
        "task_options": list(comparison.task_options),
        "data": list(comparison.data),
        "control_options": list(comparison.control_options),
        "control_threshold": threshold,
        "steps": comparison.steps,
        "batch_size": comparison.batch_size,
        "other_data": other_data(out, comparison),
        "models": rows,
    }


def _row(out: Path, comparison: Comparison, model: Model) -> dict[str, Any]:
    rate = best_rate(out, comparison, model)
    row: dict[str, Any] = {"name": model.name, "scale": model.scale, "mixer": model.mixer,
                           "learning_rate": rate, "seeds": {}, "unfinished": []}  # fmt: skip
    row["sweep"] = {f"{r:g}": loss for r, loss in sweep_losses(out, comparison, model).items()}
    row["control"] = control_result(out, comparison, model)
    # The names of the folders do not depend on the rate.
    for seed, job in enumerate(comparison.seed_jobs(model, rate or 1.0)):
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


def other_data(out: Path, comparison: Comparison) -> list[str]:
    """Runs not on the data of the first of their vocabulary and context: it changed since."""
    first: dict[tuple[int, int], str] = {}
    different = []
    # The names of the folders do not depend on the rate.
    jobs = (job for model in comparison.models() for job in comparison.seed_jobs(model, 1.0))
    for folder in (out / job.name for job in jobs):
        if (folder / STATE).exists():
            config = read_json(folder / "config.json")
            _, fingerprint = read_state_facts(folder)
            key = config["vocab_size"], config["max_position_embeddings"]
            if first.setdefault(key, fingerprint) != fingerprint:
                different.append(folder.relative_to(out).as_posix())
    return different


def _row_length(folder: Path, rows: int) -> int:
    """Tokens in a training row; the model's context may be longer, for the test."""
    tokens = next(record["tokens"] for record in read_metrics(folder) if "tokens" in record)
    return int(tokens // rows)


def control_result(out: Path, comparison: Comparison, model: Model) -> dict[str, Any] | None:
    """What a model's finished control gave, and whether it passed; None without one.

    Where even an exact decoder errs, the threshold is a share of that `ceiling`.
    """
    # The name of the folder does not depend on the rate.
    job = comparison.control_job(model, 1.0)
    result = None if job is None else read_result(out / job.name, job.steps)
    if result is None:
        return None
    test = result.get("test", {})
    accuracy = test.get("accuracy", result.get("validation_accuracy"))
    passed = accuracy >= comparison.control_threshold * test.get("ceiling", 1.0)
    shown = {"ceiling": test["ceiling"]} if "ceiling" in test else {}
    return {"accuracy": accuracy, **shown, "passed": passed, "steps": result["steps"]}


def report(out: Path, comparison: Comparison) -> dict[str, Any]:
    """Write results.json, results.md and the pictures from the finished runs; the results."""
    # The pictures are another file, so that this one stays readable at a sitting.
    from sessa_common.experiments.comparison_report import draw_curves, draw_lags, table

    results = collect(out, comparison)
    write_json(out / RESULTS, results)
    scratch = out / (TABLE + ".tmp")
    scratch.write_text(table(results), encoding="utf-8")
    os.replace(scratch, out / TABLE)
    if importlib.util.find_spec("matplotlib") is not None:
        draw_curves(out, comparison)
        draw_lags(out, results)
    return results
