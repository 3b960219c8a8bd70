"""Fine-tuning of a trained model, whole or by an adapter, on texts or on examples."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sessa_common.checkpoint.folder import load_config, load_weights
from sessa_common.checkpoint.run_files import ADAPTER_CONFIG
from sessa_common.checkpoint.sharded_state import is_sharded, sharded_weights
from sessa_common.config import SessaConfig
from sessa_common.data.batches import BatchSource
from sessa_common.data.corpus import Tell, training_sequence_length
from sessa_common.data.stream import read_batches
from sessa_common.data.tokenizer import (
    check_fits,
    end_token_id,
    parse_special_tokens,
    read_tokenizer,
)
from sessa_common.errors import SessaError, expect
from sessa_common.inference.chat_template import DEFAULT_TEMPLATE, ChatTemplate
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_common.json_files import read_json
from sessa_common.train_config import TrainConfig
from sessa_common.training.example_batches import ExampleBatches
from sessa_common.training.examples import has_examples, read_examples
from sessa_common.training.run_folder import Run
from sessa_common.training.trained_parameters import trained_shapes, trains_adapter, with_adapter


@dataclass(frozen=True)
class _Text:
    """The tokenizer of a model, the id that ends its texts, and its chat template."""

    tokenizer: Tokenizer
    end_id: int
    template: ChatTemplate
    folder: Path

    @classmethod
    def open(cls, folder: Path, config: SessaConfig) -> _Text:
        tokenizer, end = read_tokenizer(folder), end_token_id(folder)
        check_fits(tokenizer, config, str(folder))
        return cls(tokenizer, end, ChatTemplate.open(folder), folder)

    def template_to_train(self) -> ChatTemplate:
        """The chat template of the model, or the one that fine-tuning gives to it."""
        if self.template.source is not None:
            return self.template
        end = self.tokenizer.id_to_token(self.end_id)
        tokens = {**self.template.tokens, "eos_token": str(end)}
        return ChatTemplate(DEFAULT_TEMPLATE, tokens, "the chat template of fine-tuning")


def finetune_run(
    folder: Path, base: Path, config: SessaConfig, settings: TrainConfig, tell: Tell
) -> Run:
    """A new run in `folder` that trains the model of the folder `base`.

    The tokenizer and what belongs to it stay as they are. Conversations for a model without a chat
    template give it `DEFAULT_TEMPLATE`. Raises SessaError when it cannot train.
    """
    expect(settings.tokenizer is None, "`tokenizer`", settings.tokenizer, "that of the model")
    expect(settings.task is None, "`task`", settings.task, "texts or examples in `data`")
    settings = _with_split_files(settings)
    # Fails early, for parts that the model does not have.
    trained_shapes(config, settings)
    text = _Text.open(base, config)
    examples = has_examples(settings.data, settings.text_field)
    for name in () if examples else ("loss_on", "packing"):
        if getattr(settings, name) != getattr(TrainConfig(), name):
            raise SessaError(
                f"`{name}` is about conversations and prompts, but `data` has texts, which fill "
                "their rows and count as a whole; leave it out"
            )
    settings = dataclasses.replace(settings, base=str(base.resolve()), examples=examples)
    source, has_messages = read_source(text, config, settings, tell)
    config = dataclasses.replace(config, dtype="float32")
    given = has_messages and text.template.source is None
    return Run(
        folder=folder,
        config=config,
        settings=settings,
        source=source,
        weights=with_adapter(config, settings, float32_weights(base)),
        tokenizer=text.tokenizer,
        end_id=text.end_id,
        base=base,
        chat_template=DEFAULT_TEMPLATE if given else None,
    )


def _with_split_files(settings: TrainConfig) -> TrainConfig:
    """Settings for a folder of data in mlx-lm's form: train.jsonl, and valid.jsonl if there is one.

    Its test.jsonl is left alone.
    """
    if len(settings.data) != 1:
        return settings
    train, valid = (Path(settings.data[0]) / f"{name}.jsonl" for name in ("train", "valid"))
    if not train.is_file():
        return settings
    held_out = settings.validation_data
    if not held_out and valid.is_file():
        held_out = (str(valid),)
    return dataclasses.replace(settings, data=(str(train),), validation_data=held_out)


def resumed_finetune_run(folder: Path, settings: TrainConfig, tell: Tell) -> Run:
    """The run in `folder` to go on with; the model of an adapter is read anew from its folder."""
    base = adapter_base(folder) if trains_adapter(settings) else folder
    config = load_config(base)
    text = _Text.open(folder, config)
    source, _ = read_source(text, config, settings, tell)
    return Run(
        folder=folder,
        config=config,
        settings=settings,
        source=source,
        weights=with_adapter(config, settings, float32_weights(base)),
        tokenizer=text.tokenizer,
        end_id=text.end_id,
        resumed=True,
        base=base,
    )


def adapter_base(folder: Path) -> Path:
    """The folder of the model that an adapter is for; SessaError when it is not there."""
    given: Any = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(given, str) or not Path(given).is_dir():
        raise SessaError(
            f"{folder}: is an adapter for {given}, which is no folder here; put the model "
            f"there, or name its folder in {ADAPTER_CONFIG}"
        )
    return Path(given)


def read_source(
    text: _Text, config: SessaConfig, settings: TrainConfig, tell: Tell
) -> tuple[BatchSource, bool]:
    """Read the data of a run; the second result says whether a chat template was used."""
    tokenizer = ModelTokenizer(
        tokenizer=text.tokenizer,
        config=dataclasses.replace(config, eos_token_id=text.end_id),
        folder=text.folder,
    )
    if not settings.examples:
        parse_special_tokens(text.tokenizer, settings.parse_special_tokens)
        source = read_batches(
            text.tokenizer, text.end_id, config, settings, tell, tokenizer.prefix_ids
        )
        return source, False
    training_sequence_length(config, settings)
    parse_special_tokens(text.tokenizer, settings.parse_special_tokens)
    read = functools.partial(
        read_examples,
        tokenizer=tokenizer,
        template=text.template_to_train(),
        loss_on=settings.loss_on,
        end_id=text.end_id,
        tell=tell,
    )
    examples, has_messages = read(settings.data)
    held_out = None
    if settings.validation_data:
        held_out, more = read(settings.validation_data)
        has_messages = has_messages or more
    return ExampleBatches(examples, tokenizer.config, settings, held_out), has_messages


def float32_weights(folder: Path) -> Mapping[str, np.ndarray]:
    """The weights of a checkpoint folder, in float32 whatever it stores.

    Weights of a run in shards are read one by one.
    """
    if is_sharded(folder):
        return sharded_weights(folder)
    return {name: value.astype(np.float32) for name, value in load_weights(folder)[1].items()}
