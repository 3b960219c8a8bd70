"""From the choices of a person to a `Run`: model, data, tokenizer, first weights; nothing written.

Everything here can fail, for bad input, and leaves every folder as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sessa_common.checkpoint.folder import load_config
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.checkpoint.lazy_tensors import LazyTensors, Spec
from sessa_common.checkpoint.run_files import STATE, TRAINING
from sessa_common.checkpoint.sharded_state import is_sharded
from sessa_common.config import SessaConfig, parameter_shapes
from sessa_common.data.batches import BatchSource
from sessa_common.data.corpus import (
    Tell,
    say_nothing,
    told,
    training_sequence_length,
)
from sessa_common.data.sources import TextSource, local_paths, read_documents, split_weights
from sessa_common.data.stream import read_batches
from sessa_common.data.task_registry import load_data
from sessa_common.data.tasks import TaskBatches
from sessa_common.data.token_shards import TokenShards, is_token_folder
from sessa_common.data.tokenizer import (
    begin_of,
    begin_token_ids,
    check_fits,
    choose_tokenizer,
    end_token_id,
    first_characters,
    parse_special_tokens,
    read_tokenizer,
    vocabulary_size,
    word_tokenizer,
)
from sessa_common.errors import SessaError
from sessa_common.fields import build, split_fields
from sessa_common.json_files import read_json
from sessa_common.presets import PRESETS
from sessa_common.storage import check_new_folder
from sessa_common.train_config import TrainConfig
from sessa_common.training.finetuning import (
    finetune_run,
    float32_weights,
    resumed_finetune_run,
)
from sessa_common.training.run_folder import Run
from sessa_common.training.saved_state import has_state
from sessa_common.training.trained_parameters import trains_adapter
from sessa_common.training.width_scaling import scale_initial

DEFAULT_FOLDER, FINETUNED_FOLDER = Path("runs/pydoc"), Path("runs/finetuned")
# Settings that may change in a resumed run; that the data give the same tokens is checked apart.
FREE_ON_RESUME = {
    "steps",
    "evaluate_every",
    "evaluate_batches",
    "checkpoint_every",
    "keep_checkpoints",
    "track",
    "data",
    "validation_data",
    "text_field",
    "split",
    "subset",
    "max_documents",
    "context_parallel",
    "shard_processes",
    "sharded_checkpoints",
}
# Settings that a task has no use for.
TEXT_SETTINGS = (
    "data",
    "validation_data",
    "validation_fraction",
    "text_field",
    "split",
    "subset",
    "max_documents",
    "tokenizer",
    "parse_special_tokens",
    "sequence_length",
    "documents",
)
# Arguments that only a new run can have.
NEW_RUN = ("out", "preset", "config", "init", "train_config", "force")


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """The arguments of `train`: a new run in `out`, or the run in `resume` to go on with.

    A new run's model is `preset` ("demo" if nothing is named), `config` or the checkpoint `init`,
    its settings are `train_config`; `fields` of SessaConfig and TrainConfig replace theirs. With
    `finetune` the defaults are those of fine-tuning, and the tokenizer of `init` stays as it is.
    """

    out: Path | str | None = None
    preset: str | None = None
    config: SessaConfig | Path | str | None = None
    init: Path | str | None = None
    train_config: TrainConfig | Path | str | None = None
    resume: Path | str | None = None
    force: bool = False
    finetune: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)


def prepare(request: TrainRequest, tell: Tell = say_nothing) -> Run:
    """Read everything that a run needs; SessaError, with nothing written, when it cannot train.

    `tell` is called with a few words while something takes long.
    """
    model_fields, settings_fields = split_fields(request.fields, SessaConfig, TrainConfig)
    if request.resume is not None:
        for name in NEW_RUN:
            if getattr(request, name):
                raise SessaError(f"`{name}` starts a new run, so it does not go with `resume`")
        return _resumed_run(Path(request.resume), model_fields, settings_fields, tell)
    default = FINETUNED_FOLDER if request.finetune else DEFAULT_FOLDER
    out = default if request.out is None else Path(request.out)
    config = _choose_config(request, model_fields)
    settings = _choose_settings(request, settings_fields)
    check_new_folder(out, force=request.force, inputs=_inputs(request, settings))
    init = None if request.init is None else Path(request.init)
    if init is not None and (request.finetune or trains_adapter(settings)):
        return finetune_run(out, init, config, settings, tell)
    if trains_adapter(settings):
        raise SessaError(
            f"`train` {settings.train} makes an adapter for a trained model; name one by `init`"
        )
    settings = dataclasses.replace(settings, base=None, examples=False)
    if settings.task is not None:
        fixed_context = init is not None or "max_position_embeddings" in model_fields
        return _task_run(out, config, settings, init, fixed_context=fixed_context)
    fixed_vocabulary = not (request.config is None and init is None) or "vocab_size" in model_fields
    return _text_run(out, config, settings, init, tell, fixed_vocabulary=fixed_vocabulary)


def _inputs(request: TrainRequest, settings: TrainConfig) -> list[Path]:
    """The files and folders that a new run reads, which its folder must not replace."""
    names = [request.init, request.config, request.train_config, settings.task, settings.tokenizer]
    paths = [Path(name) for name in names if isinstance(name, (str, Path))]
    texts = local_paths((*settings.data, *settings.validation_data))
    return [*(path for path in paths if path.exists()), *texts]


def _choose_config(request: TrainRequest, given: Mapping[str, Any]) -> SessaConfig:
    named = (request.preset, request.config, request.init)
    if sum(name is not None for name in named) > 1:
        raise SessaError("`preset`, `config` and `init` each name a model; give only one of them")
    if request.init is not None:
        config = load_config(request.init)
        _refuse_changes(config, given, str(request.init))
        return config
    if isinstance(request.config, SessaConfig):
        return override(request.config, given)
    if request.config is not None:
        path = Path(request.config)
        return override(SessaConfig.from_dict(read_json(path), str(path)), given)
    preset = request.preset or "demo"
    if preset not in PRESETS:
        raise SessaError(f"preset is {preset!r}, expected one of {', '.join(PRESETS)}")
    return override(PRESETS[preset], given)


def _choose_settings(request: TrainRequest, given: Mapping[str, Any]) -> TrainConfig:
    base, task = request.train_config, given.get("task")
    if base is None and request.finetune:
        if "data" not in given:
            raise SessaError("there is nothing to fine-tune on; give `data`")
        base = TrainConfig.for_finetuning(given.get("train", "lora"))
    elif base is None:
        base = TrainConfig() if task is None else TrainConfig.for_task(task)
    elif not isinstance(base, TrainConfig):
        base = TrainConfig.from_dict(read_json(Path(base)), str(base))
    return build(TrainConfig, base.to_dict() | dict(given))


def override(config: SessaConfig, given: Mapping[str, Any]) -> SessaConfig:
    """Replace fields; head width and full key/value heads follow a new width or head count."""
    values = dict(given)
    if {"hidden_size", "num_attention_heads"} & values.keys():
        values.setdefault("head_dim", 0)
        if config.num_key_value_heads == config.num_attention_heads:
            values.setdefault("num_key_value_heads", 0)
        if config.intermediate_size == 4 * config.hidden_size:
            values.setdefault("intermediate_size", 0)
        if config.feedback_key_dim == config.hidden_size:
            values.setdefault("feedback_key_dim", 0)
    return build(SessaConfig, {**dataclasses.asdict(config), **values})


def _refuse_changes(config: SessaConfig, given: Mapping[str, Any], where: str) -> None:
    for name, value in given.items():
        if (there := getattr(config, name)) != value:
            raise SessaError(f"{where}: another architecture: {name} is {there}, {value} was given")


def _text_run(
    out: Path,
    config: SessaConfig,
    settings: TrainConfig,
    init: Path | None,
    tell: Tell,
    *,
    fixed_vocabulary: bool,
) -> Run:
    """A new run on text; the embedding gets the tokenizer's size unless the vocabulary is fixed."""
    training_sequence_length(config, settings)
    tokens = next(filter(is_token_folder, split_weights(settings.data)[0]), None)
    if init is not None and settings.tokenizer is None:
        tokenizer, end = read_tokenizer(init), end_token_id(init)
        begin = begin_token_ids(tokenizer, init, config.bos_token_id)
    elif tokens is not None and settings.tokenizer is None:
        shards = TokenShards(tokens)
        tokenizer, begin, end = read_tokenizer(tokens), shards.begin_ids, shards.end_id
    else:
        spec = settings.tokenizer or str(config.vocab_size)
        tokenizer, end = choose_tokenizer(spec, _bpe_sample(settings, tell))
        begin = begin_of(tokenizer, spec)
    parse_special_tokens(tokenizer, settings.parse_special_tokens)
    if not fixed_vocabulary:
        config = dataclasses.replace(config, vocab_size=vocabulary_size(tokenizer))
    check_fits(tokenizer, config, settings.tokenizer or str(init or out))
    config = dataclasses.replace(
        config,
        dtype="float32",
        bos_token_id=begin[-1] if begin else end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return Run(
        folder=out,
        config=config,
        settings=settings,
        source=read_batches(tokenizer, end, config, settings, tell, begin),
        weights=_first_weights(config, settings, init),
        tokenizer=tokenizer,
        end_id=end,
        begin_ids=begin,
    )


def _task_run(
    out: Path, config: SessaConfig, settings: TrainConfig, init: Path | None, *, fixed_context: bool
) -> Run:
    """A new run on a task, which brings its vocabulary, and its context unless that is fixed."""
    _refuse_text_settings(settings)
    data = load_data(settings.task or "", settings.task_options)
    words, tokenizer = data.task.vocabulary, word_tokenizer(data.task.vocabulary)
    if init is not None and read_tokenizer(init).get_vocab() != tokenizer.get_vocab():
        raise SessaError(f"{init}: its tokenizer is not the vocabulary of {data.task.name}")
    if not fixed_context:
        config = dataclasses.replace(config, max_position_embeddings=data.task.context)
    config = dataclasses.replace(
        config,
        dtype="float32",
        vocab_size=len(words),
        bos_token_id=words.index("<bos>"),
        eos_token_id=0,
        pad_token_id=0,
    )
    return Run(
        folder=out,
        config=config,
        settings=settings,
        source=TaskBatches(data, config, settings),
        weights=_first_weights(config, settings, init),
        tokenizer=tokenizer,
        end_id=0,
    )


def _refuse_text_settings(settings: TrainConfig) -> None:
    defaults = TrainConfig()
    for name in TEXT_SETTINGS:
        if getattr(settings, name) != getattr(defaults, name):
            raise SessaError(f"`{name}` is about text; it does not go with `task` {settings.task}")


def read_settings(folder: Path) -> TrainConfig:
    """The settings of the run in a folder, whatever version has written them."""
    stored = read_json(folder / TRAINING)
    if stored.get("documents") is None:
        # Older runs had joined documents at first, and later where processes shared their tokens.
        joined = "documents" not in stored or stored.get("context_parallel", 1) > 1
        stored["documents"] = "joined" if joined else "separate"
    return TrainConfig.from_dict(stored, str(folder / TRAINING))


def _resumed_run(
    folder: Path, model_fields: Mapping[str, Any], given: Mapping[str, Any], tell: Tell
) -> Run:
    """The run in a folder, to go on with; SessaError when a field would make it another run."""
    if not folder.is_dir():
        raise SessaError(f"{folder}: no such checkpoint folder")
    settings = read_settings(folder)
    for name, value in given.items():
        if name not in FREE_ON_RESUME and getattr(settings, name) != value:
            raise SessaError(
                f"{folder}: {name} is {getattr(settings, name)} in this run, {value} was given; "
                "leave it out, or start a new run with `init`"
            )
    settings = build(TrainConfig, settings.to_dict() | dict(given))
    if not has_state(folder):
        raise SessaError(f"{folder}: no {STATE} in it, so there is no run to resume; use `init`")
    if settings.base is not None:
        run = resumed_finetune_run(folder, settings, tell)
        _refuse_changes(run.config, model_fields, str(folder))
        return run
    config = load_config(folder)
    _refuse_changes(config, model_fields, str(folder))
    tokenizer, end = read_tokenizer(folder), config.eos_token_id
    if end is None:
        raise SessaError(f"{folder}: its config.json has no eos_token_id, which ends a text")
    check_fits(tokenizer, config, str(folder))
    return Run(
        folder=folder,
        config=config,
        settings=settings,
        source=_read_source(folder, tokenizer, end, config, settings, tell),
        # Of weights in shards the backend reads those that its process holds.
        weights=_zeros(config) if is_sharded(folder) else float32_weights(folder),
        tokenizer=tokenizer,
        end_id=end,
        resumed=True,
    )


def _zeros(config: SessaConfig) -> LazyTensors:
    weights = LazyTensors()
    for name, shape in parameter_shapes(config).items():
        weights.defer(name, Spec(shape, np.dtype(np.float32)), partial(np.zeros, shape, np.float32))
    return weights


def _read_source(
    folder: Path,
    tokenizer: Tokenizer,
    end: int,
    config: SessaConfig,
    settings: TrainConfig,
    tell: Tell,
) -> BatchSource:
    if settings.task is not None:
        return TaskBatches(load_data(settings.task, settings.task_options), config, settings)
    parse_special_tokens(tokenizer, settings.parse_special_tokens)
    begin = begin_token_ids(tokenizer, folder, config.bos_token_id)
    return read_batches(tokenizer, end, config, settings, tell, begin)


def _first_weights(
    config: SessaConfig, settings: TrainConfig, init: Path | None
) -> Mapping[str, np.ndarray]:
    if init is None:
        return scale_initial(initial_weights(config, settings.seed), config, settings)
    return float32_weights(init)


def _bpe_sample(settings: TrainConfig, tell: Tell) -> Iterator[str]:
    texts = read_documents(split_weights(settings.data)[0], TextSource.of(settings))
    yield from first_characters(told(texts, "reading text for the tokenizer", tell))
    tell("training the tokenizer")
