"""The plan of a comparison: matched models, what they are trained on, and every run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sessa_common.config import SessaConfig, check_matched
from sessa_common.data.sources import check_names
from sessa_common.data.task_registry import TASKS, read_task
from sessa_common.errors import SessaError, expect
from sessa_common.json_files import read_json
from sessa_common.presets import PRESETS
from sessa_common.storage import write_json
from sessa_common.train_config import TrainConfig

PLAN = "plan.json"


@dataclass(frozen=True, kw_only=True)
class ModelKind:
    """A kind of model that can be compared, at any scale.

    `preset` is the name of its preset with {} for the scale, `fields` are the fields of SessaConfig
    that differ from the preset. A kind that is not matched may have fewer parameters than the rest.
    """

    preset: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    is_matched: bool = True


MODELS = {
    "sessa": ModelKind(preset="sessa-{}"),
    "transformer": ModelKind(preset="transformer-{}"),
    "transformer-deep": ModelKind(preset="transformer-{}-deep"),
    "mamba2": ModelKind(preset="mamba2-{}"),
    # An ablation: Sessa without its feedback, so without the parameters of the feedback.
    "gated_attention": ModelKind(
        preset="sessa-{}", fields={"layer_kinds": "gated_attention"}, is_matched=False
    ),
}
# Names of before version 0.2. The command line still accepts them, and old plans hold them.
OLD_NAMES = {
    "attention": "transformer",
    "attention-deep": "transformer-deep",
    "nofeedback": "gated_attention",
}
TEXT_SETTINGS = ("tokenizer", "text_field", "validation_data")


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """A model at a scale, one row of the table; `fields` name it as the arguments of `train` do."""

    scale: str
    kind: str
    config: SessaConfig
    fields: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the model in folders and tables."""
        return f"{self.scale}-{self.kind}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run: its folder inside the comparison's, and the arguments of `train`."""

    name: str
    fields: Mapping[str, Any]
    steps: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that decides the results of a comparison. Raises SessaError.

    Either `task` or `data` is given. `models` are names of MODELS, or of `configs`, which are
    "name=path" of config.json files. A `sweep_steps` of 0 stands for a quarter of `steps`, a
    `control_steps` of 0 for `steps`. `settings` are fields of TrainConfig, and
    `max_position_embeddings`, that hold in every run.
    """

    task: str | None = None
    task_options: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    models: tuple[str, ...] = ("sessa", "transformer", "mamba2", "gated_attention")
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
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_numbers()
        for name in ("models", "scales", "learning_rates"):
            values = getattr(self, name)
            distinct = bool(values) and len(set(values)) == len(values)
            expect(distinct, f"`{name}`", values, "one or more, each once")
        self._check_task()
        known = {each.name for each in dataclasses.fields(TrainConfig)} | {
            "max_position_embeddings"
        }
        if unknown := sorted(self.settings.keys() - known):
            raise SessaError(f"settings has {unknown[0]}, which is no field of a training run")

    def _check_numbers(self) -> None:
        for name in ("seeds", "steps", "batch_size"):
            value = getattr(self, name)
            expect(value >= 1, f"`{name}`", value, "1 or more")
        for name in ("sweep_steps", "control_steps"):
            value = getattr(self, name)
            expect(value >= 0, f"`{name}`", value, "0 or more")
        rates, threshold = self.learning_rates, self.control_threshold
        positive = all(0 < rate < math.inf for rate in rates)
        expect(positive, "`learning_rates`", rates, "numbers above 0")
        expect(0 < threshold <= 1, "`control_threshold`", threshold, "above 0 and at most 1")

    def _check_task(self) -> None:
        given = (*self.task_options, *self.control_task_options)
        if (self.task is None) == (not self.data):
            raise SessaError("give either `task`, or `data` to compare language models on text")
        if self.task is None:
            if given:
                raise SessaError(f"task option {given[0]!r} goes with `task`, not with `data`")
            return
        if self.task not in TASKS and not Path(self.task).is_dir():
            raise SessaError(
                f"`task` is {self.task!r}, expected {', '.join(TASKS)} or a folder of `sessa data`"
            )
        for option in given:
            if "=" not in option:
                raise SessaError(f"task option is {option!r}, expected name=value")
        for name in TEXT_SETTINGS:
            if self.settings.get(name):
                raise SessaError(f"`{name}` is about text; it does not go with task {self.task}")

    def check_sources(self) -> None:
        """Raise SessaError for a task, a task option or a name of text that no run could read."""
        if self.task is None:
            check_names(self.data)
            check_names(self.settings.get("validation_data", ()))
            return
        read_task(self.task, self.task_options)
        if self.control_options:
            read_task(self.task, (*self.task_options, *self.control_options))

    def compared_models(self, vocab_size: int | None = None) -> list[ComparedModel]:
        """Return the models of all scales; SessaError unless those of a scale match within 1 %.

        Without a vocabulary the embeddings do not count, which makes the check stricter.
        """
        files = dict(_name_and_path(given) for given in self.configs)
        if unknown := sorted(files.keys() - set(self.models)):
            raise SessaError(f"`configs` names {', '.join(unknown)}, which is not one of `models`")
        if files and len(self.scales) > 1:
            raise SessaError("`configs` gives a model of one size, so it goes with one scale only")
        found = [
            _compared_model(scale, kind, files) for scale in self.scales for kind in self.models
        ]
        for scale in self.scales:
            matched = {
                model.name: _with_vocabulary(model.config, vocab_size or 1)
                for model in found
                if model.scale == scale and is_matched(model.kind)
            }
            check_matched(matched)
        return found

    def sweep_jobs(self, model: ComparedModel) -> list[Job]:
        """Return a short run for each learning rate, none when there is only one rate."""
        if len(self.learning_rates) == 1:
            return []
        steps = self.sweep_steps or max(1, self.steps // 4)
        return [
            self._job(f"sweep/{model.name}-lr{rate:g}", model, rate, steps, seed=0)
            for rate in self.learning_rates
        ]

    def control_job(self, model: ComparedModel, rate: float) -> Job | None:
        """Return the run on the easy version of the task; None where there is no easy version."""
        easy = self.control_options
        if not easy:
            return None
        steps = self.control_steps or self.steps
        return self._job(f"control/{model.name}", model, rate, steps, seed=0, easy=easy)

    def seed_jobs(self, model: ComparedModel, rate: float) -> list[Job]:
        """Return the runs whose results the table shows, one for each seed."""
        return [
            self._job(f"runs/{model.name}-seed{seed}", model, rate, self.steps, seed)
            for seed in range(self.seeds)
        ]

    @property
    def control_options(self) -> tuple[str, ...]:
        """Options of the control; they replace options of the task with the same names."""
        known = TASKS.get(self.task or "")
        return self.control_task_options or (known.easy_options if known else ())

    def _job(
        self,
        name: str,
        model: ComparedModel,
        rate: float,
        steps: int,
        seed: int,
        easy: Iterable[str] = (),
    ) -> Job:
        source: dict[str, Any] = {"data": self.data}
        if self.task is not None:
            options = dict(given.split("=", 1) for given in (*self.task_options, *easy))
            source = {
                "task": self.task,
                "task_options": tuple(f"{key}={value}" for key, value in options.items()),
            }
        fields = {
            **source,
            **model.fields,
            "steps": steps,
            "batch_size": self.batch_size,
            "learning_rate": rate,
            "seed": seed,
            # The schedule keeps its shape, and the curves their points, at any number of steps.
            "warmup_steps": steps // 10,
            "evaluate_every": max(1, steps // 20),
            **self.settings,
        }
        return Job(name=name, fields=fields, steps=steps)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Comparison:
        """Read the "options" of a plan.json; SessaError for those of another version."""
        values = _with_tuples(given)
        if is_old_plan(given):
            # The settings of the runs are left out: they decide no number of the report.
            values["models"] = values.pop("mixers")
            del values["options"]
        try:
            return cls(**values)
        except TypeError as error:
            raise SessaError(f"{PLAN} is of another version ({error})") from None


def is_matched(kind: str) -> bool:
    """Return True for a kind whose parameters must match those of the other models."""
    known = MODELS.get(OLD_NAMES.get(kind, kind))
    return known is None or known.is_matched


def _with_tuples(value: Any) -> Any:
    """Undo what JSON does to tuples."""
    if isinstance(value, Mapping):
        return {name: _with_tuples(part) for name, part in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _name_and_path(given: str) -> tuple[str, str]:
    name, found, path = given.partition("=")
    if not (name and found and path):
        raise SessaError(f"`configs` has {given!r}, expected name=path.json")
    return name, path


def _compared_model(scale: str, kind: str, files: Mapping[str, str]) -> ComparedModel:
    if kind in files:
        path = Path(files[kind])
        config = SessaConfig.from_dict(read_json(path), str(path))
        fields: dict[str, Any] = {"config": str(path.resolve())}
        return ComparedModel(scale=scale, kind=kind, config=config, fields=fields)
    known = MODELS.get(OLD_NAMES.get(kind, kind))
    if known is None:
        raise SessaError(
            f"`models` has {kind!r}, expected of {', '.join(MODELS)}, or a name that `configs` "
            f"defines, as {kind}=path.json"
        )
    if (preset := known.preset.format(scale)) not in PRESETS:
        sizes = [name.removeprefix("sessa-") for name in PRESETS if name.startswith("sessa-")]
        raise SessaError(f"`scales` has {scale!r}, expected of {', '.join(sizes)}")
    config = dataclasses.replace(PRESETS[preset], **known.fields)
    fields = {"preset": preset, **known.fields}
    return ComparedModel(scale=scale, kind=kind, config=config, fields=fields)


def _with_vocabulary(config: SessaConfig, size: int) -> SessaConfig:
    return dataclasses.replace(
        config, vocab_size=size, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )


def write_plan(out: Path, comparison: Comparison, commands: Mapping[str, Sequence[str]]) -> None:
    """Write plan.json: the options, every model, and the command of every run."""
    models = {
        model.name: {"fields": model.fields, "config": model.config.to_dict()}
        for model in comparison.compared_models()
    }
    plan = {"options": dataclasses.asdict(comparison), "models": models, "commands": commands}
    write_json(out / PLAN, plan)


def read_plan(out: Path) -> Comparison:
    """Read the comparison that made a folder."""
    return Comparison.from_dict(read_json(out / PLAN).get("options", {}))


def is_old_plan(options: Mapping[str, Any]) -> bool:
    """Return True for the options of a plan of before version 0.2, which can only be reported."""
    return "mixers" in options and "options" in options


def check_plan(out: Path, comparison: Comparison) -> None:
    """Raise SessaError when the folder holds another comparison.

    `seeds` and `control_steps` may grow. More control steps change the learning rate schedule from
    its start, so a control that failed is then trained anew.
    """
    if not (out / PLAN).exists():
        return
    plan = read_json(out / PLAN)
    if is_old_plan(plan.get("options", {})):
        raise SessaError(
            f"{out}: an earlier version made this comparison; only its report can be made again, "
            "so give another `out` for new runs"
        )
    before = read_plan(out)
    for each in dataclasses.fields(Comparison):
        there, given = getattr(before, each.name), getattr(comparison, each.name)
        grows = each.name == "seeds" and given >= there
        if each.name == "control_steps":
            grows = (given or comparison.steps) >= (there or before.steps)
        if there != given and not grows:
            raise SessaError(
                f"{out}: `{each.name}` is {there} in its {PLAN}, {given} was given; give the same "
                "options (only `seeds` and `control_steps` may grow), or another `out`"
            )
    models = plan.get("models", {})
    for model in comparison.compared_models():
        if models.get(model.name, {}).get("config") != model.config.to_dict():
            raise SessaError(
                f"{out}: the configuration of {model.name} is not the one in its {PLAN}; give the "
                "file as it was, or another `out`"
            )
