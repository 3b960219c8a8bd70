"""From the options of `sessa train` to a run folder: model, tokenizer, data and first weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sessa_common.checkpoint.folder import (
    check_new_folder,
    load_config,
    load_weights,
    new_folder,
    save_weights,
    write_json,
)
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.config import PRESETS, SessaConfig, TrainConfig, parameter_count
from sessa_common.data.corpus import TextBatches, read_text_batches, training_sequence_length
from sessa_common.data.sources import TextSource, read_documents
from sessa_common.data.task_registry import load_data
from sessa_common.data.tasks import TaskBatches, options_of
from sessa_common.data.tokenizer import (
    check_fits,
    choose_tokenizer,
    end_token_id,
    parse_special_tokens,
    read_tokenizer,
    vocabulary_size,
    word_tokenizer,
    write_tokenizer,
)
from sessa_common.errors import SessaError
from sessa_common.json_files import read_json
from sessa_common.training.metrics import read_metrics, tokens_per_second
from sessa_common.training.trainer import STATE, TRAINING, TrainBackend

# What a finished run on a task measured on the test examples.
RESULT = "result.json"

# What a tokenizer may decide, so not what makes an architecture another one.
TOKEN_FIELDS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "dtype")
# What may change in a resumed run; that the data give the same tokens is checked for itself.
FREE_ON_RESUME = ("steps", "evaluate_every", "evaluate_batches", "checkpoint_every", "data",
                  "validation_data", "text_field", "split", "subset", "max_documents")  # fmt: skip
# A BPE is trained on the first characters of the data; more of them hardly change it.
BPE_CHARACTERS = 100_000_000


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder that is ready to train in, or to go on in."""

    folder: Path
    config: SessaConfig
    settings: TrainConfig
    weights: dict[str, np.ndarray]
    source: TextBatches | TaskBatches
    tokenizer: Tokenizer


def choose_config(
    given: Mapping[str, Any],
    *,
    preset: str | None = None,
    file: Path | None = None,
    init: Path | None = None,
) -> SessaConfig:
    """The architecture of a preset ("demo"), a config.json or a checkpoint, then `given`."""
    named = [name for name in (preset, file, init) if name is not None]
    if len(named) > 1:
        raise SessaError("--preset, --config and --init each name a model; give only one of them")
    if preset is not None and preset not in PRESETS:
        raise SessaError(f"preset is {preset!r}, expected one of {', '.join(PRESETS)}")
    base = PRESETS[preset or "demo"]
    if file is not None:
        base = SessaConfig.from_dict(read_json(file), str(file))
    if init is not None:
        base = load_config(init)
        refuse_changes(base, given, f"--init {init}")
    return override(base, given)


def override(config: SessaConfig, given: Mapping[str, Any]) -> SessaConfig:
    """Replace fields; head width and full key/value heads follow a new width or head count."""
    values = dict(given)
    if {"hidden_size", "num_attention_heads"} & values.keys():
        values.setdefault("head_dim", 0)
        if config.num_key_value_heads == config.num_attention_heads:
            values.setdefault("num_key_value_heads", 0)
        if config.intermediate_size == 4 * config.hidden_size:
            values.setdefault("intermediate_size", 0)
    return dataclasses.replace(config, **values)


def refuse_changes(config: SessaConfig, given: Mapping[str, Any], where: str) -> None:
    """Raise SessaError when a given field differs from the architecture that is there."""
    for name, value in given.items():
        if (there := getattr(config, name)) != value:
            raise SessaError(f"{where}: another architecture: {name} is {there}, {value} was given")


def start_run(
    folder: Path,
    config: SessaConfig,
    settings: TrainConfig,
    *,
    fixed_vocabulary: bool = False,
    fixed_context: bool = False,
    init: Path | None = None,
    force: bool = False,
) -> Run:
    """Read the data, make the tokenizer and write a new run folder with the first weights.

    The embedding gets the tokenizer's size, unless the vocabulary is fixed (by a config file or by
    the checkpoint `init`). A task brings its own vocabulary, and its context unless that is fixed.
    Raises SessaError, with nothing written, for anything that cannot train.
    """
    if settings.task is not None:
        return _start_task(folder, config, settings, fixed_context, init, force)
    with new_folder(folder, force=force) as scratch:
        training_sequence_length(config, settings)
        if init is not None and settings.tokenizer is None:
            tokenizer, end = read_tokenizer(init), end_token_id(init)
        else:
            spec = settings.tokenizer or str(config.vocab_size)
            tokenizer, end = choose_tokenizer(spec, _bpe_sample(settings))
        parse_special_tokens(tokenizer, settings.parse_special_tokens)
        if not (fixed_vocabulary or init is not None):
            config = dataclasses.replace(config, vocab_size=vocabulary_size(tokenizer))
        check_fits(tokenizer, config, settings.tokenizer or str(init or folder))
        config = dataclasses.replace(
            config, dtype="float32", bos_token_id=end, eos_token_id=end, pad_token_id=end
        )
        source = read_text_batches(tokenizer, end, config, settings)
        weights = _write_start(scratch, config, settings, tokenizer, end, init)
    return Run(folder=folder, config=config, settings=settings, weights=weights, source=source,
               tokenizer=tokenizer)  # fmt: skip


def _start_task(
    folder: Path,
    config: SessaConfig,
    settings: TrainConfig,
    fixed_context: bool,
    init: Path | None,
    force: bool,
) -> Run:
    refuse_text_options(settings)
    check_new_folder(folder, force=force)
    data = load_data(settings.task or "", settings.task_options)
    words, tokenizer = data.task.vocabulary, word_tokenizer(data.task.vocabulary)
    if init is not None and read_tokenizer(init).get_vocab() != tokenizer.get_vocab():
        raise SessaError(f"--init {init}: its tokenizer is not the vocabulary of {data.task.name}")
    if not (fixed_context or init is not None):
        config = dataclasses.replace(config, max_position_embeddings=data.task.context)
    config = dataclasses.replace(config, dtype="float32", vocab_size=len(words), eos_token_id=0,
                                 bos_token_id=words.index("<bos>"), pad_token_id=0)  # fmt: skip
    source = TaskBatches(data, config, settings)
    with new_folder(folder, force=force) as scratch:
        weights = _write_start(scratch, config, settings, tokenizer, 0, init)
    return Run(folder=folder, config=config, settings=settings, weights=weights, source=source,
               tokenizer=tokenizer)  # fmt: skip


def refuse_text_options(settings: TrainConfig) -> None:
    """Raise SessaError for settings that are about text, where a task is trained on."""
    defaults = TrainConfig()
    for name in ("data", "validation_data", "validation_fraction", "text_field", "split", "subset",
                 "max_documents", "tokenizer", "parse_special_tokens",
                 "sequence_length"):  # fmt: skip
        if getattr(settings, name) != getattr(defaults, name):
            option = name.replace("_", "-")
            raise SessaError(
                f"--{option} is about text; it does not go with --task {settings.task}"
            )


def _write_start(
    scratch: Path,
    config: SessaConfig,
    settings: TrainConfig,
    tokenizer: Tokenizer,
    end: int,
    init: Path | None,
) -> dict[str, np.ndarray]:
    weights = _first_weights(config, settings, init)
    save_weights(scratch, config, weights)
    write_tokenizer(scratch, tokenizer, end, config.max_position_embeddings)
    write_json(scratch / TRAINING, settings.to_dict())
    return weights


def write_result(run: Run, learner: TrainBackend) -> dict[str, Any]:
    """Measure a finished run on its task's test examples, write result.json and return it."""
    assert isinstance(run.source, TaskBatches)
    records = read_metrics(run.folder)
    last = {name: value for record in records for name, value in record.items()}
    task = run.source.data.task
    result: dict[str, Any] = {
        "task": task.name,
        "task_options": options_of(task),
        "parameters": parameter_count(run.config),
        "tokens_per_second": tokens_per_second(records),
        "steps": run.settings.steps,
        **{name: last[name] for name in ("validation_loss", "validation_accuracy") if name in last},
        "test": run.source.test(learner.predict),
    }
    write_json(run.folder / RESULT, result)
    return result


def resume_run(folder: Path, config_given: Mapping[str, Any], given: Mapping[str, Any]) -> Run:
    """Open a run folder to go on; SessaError when an option would make it another run."""
    config = load_config(folder)
    refuse_changes(config, config_given, str(folder))
    settings = TrainConfig.from_dict(read_json(folder / TRAINING), str(folder / TRAINING))
    for name, value in given.items():
        if name not in FREE_ON_RESUME and getattr(settings, name) != value:
            raise SessaError(
                f"{folder}: {name} is {getattr(settings, name)} in this run, {value} was given; "
                "leave it out, or start a new run with --init"
            )
    settings = dataclasses.replace(settings, **given)
    tokenizer, end = read_tokenizer(folder), config.eos_token_id
    if end is None or not (folder / STATE).is_file():
        raise SessaError(f"{folder}: no {STATE} in it, so there is no run to resume; use --init")
    check_fits(tokenizer, config, str(folder))
    _, weights = load_weights(folder)
    source: TextBatches | TaskBatches
    if settings.task is not None:
        source = TaskBatches(load_data(settings.task, settings.task_options), config, settings)
    else:
        parse_special_tokens(tokenizer, settings.parse_special_tokens)
        source = read_text_batches(tokenizer, end, config, settings)
    return Run(folder=folder, config=config, settings=settings, weights=weights, source=source,
               tokenizer=tokenizer)  # fmt: skip


def _first_weights(
    config: SessaConfig, settings: TrainConfig, init: Path | None
) -> dict[str, np.ndarray]:
    if init is None:
        return initial_weights(config, settings.seed)
    return {name: value.astype(np.float32) for name, value in load_weights(init)[1].items()}


def _bpe_sample(settings: TrainConfig) -> Iterator[str]:
    left = BPE_CHARACTERS
    for text in read_documents(settings.data, TextSource.of(settings)):
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return
