"""Settings of a training run: the only place where their defaults are written down."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sessa_common.errors import expect, is_count, require
from sessa_common.fields import read_fields

PRECISIONS = ("auto", "float32", "bfloat16")
CHECKPOINTS = ("none", "selective", "layers")
DOCUMENTS = ("separate", "joined")
TRAINED = ("all", "lora", "feedback", "feedback+lora")
LOSS_ON = ("answers", "all")
OPTIMIZERS = ("adamw", "muon")
# Fields that hold one of several words, and fields that hold a list of texts.
CHOICES = {
    "precision": PRECISIONS,
    "checkpoint_activations": CHECKPOINTS,
    "train": TRAINED,
    "optimizer": OPTIMIZERS,
    "loss_on": LOSS_ON,
    "documents": DOCUMENTS,
}
LISTS = ("data", "validation_data", "task_options", "lora_targets", "track")
TRACKERS = ("tensorboard", "wandb")
# Names that fields of TrainConfig had before version 0.2, for training.json files of that time.
RENAMED_FIELDS = {
    "accumulation": "gradient_accumulation_steps",
    "clip_norm": "max_grad_norm",
    "window": "sequence_length",
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a training run besides the model and the device.

    The defaults are the demonstration run of `sessa train`. Raises SessaError for values that
    cannot train. `tokenizer` is None (a byte-level BPE of the model's vocab_size), a size, "bytes"
    or a path; `sequence_length` is the number of tokens in a training row, 0 for the model's
    max_position_embeddings; the `documents` of a row are "separate" (none reads another,
    positions begin anew, and the first token of a document is no target) or "joined"; a step uses
    batch_size * gradient_accumulation_steps rows; the optimizer is "adamw", or "muon" for the
    layers' matrices beside AdamW for the rest; the learning rate rises linearly over warmup_steps
    and falls along a cosine to min_lr_ratio of itself; each layer learns with layer_rate_decay
    times the rate of the layer after it, the embedding like a layer before the first, and feedback
    projections and gains with feedback_rate times that; mup_base_width is the hidden_size that the
    learning rate was found for, which scales it to the model's by muP, and 0 leaves it; an interval
    of 0 means "only at the end"; the last keep_checkpoints saves are kept, and the best by
    validation loss. `task` is "symbolsoup", "diffuse-mqar" or a folder of `sessa data`, to
    train on instead of text; `task_options` are "name=value" texts for its fields. `compile` lets
    the framework compile the training step, with the same numbers but for rounding; None compiles
    with MLX on a GPU and nowhere else. `checkpoint_activations` is "none",
    "layers" (the backward pass computes each layer again, which takes time and saves memory) or
    "selective" (the same, but the results of attention and feedback are kept).
    Of several processes, each group of `context_parallel` shares the tokens of the same rows, and
    each group of `shard_processes` shares one copy of weights, gradients and optimizer moments: 1
    for a copy in every process, 0 for one copy in all. With `sharded_checkpoints` each process
    saves its own part of a shared copy, while training goes on; without, one process gathers and
    saves the whole. Only PyTorch knows these three.

    `train` is "all" weights of the model, or the parts of an adapter: "lora", "feedback" or
    "feedback+lora". LoRA adds lora_alpha / lora_rank * B A to the linear layers that `lora_targets`
    names, such as "mixer.q_proj"; without names to all of them. `base` is the folder of the model
    that is fine-tuned. With `examples` the data are conversations and prompts with completions;
    fine-tuning sets both. The loss on examples counts the tokens of `loss_on`, which is "answers"
    or "all"; `packing` puts several of them in one row. `track` names trackers that get the
    metrics: "tensorboard", "wandb".
    """

    task: str | None = None
    task_options: tuple[str, ...] = ()
    data: tuple[str, ...] = ("pydoc",)
    validation_data: tuple[str, ...] = ()
    validation_fraction: float = 0.05
    text_field: str = "text"
    split: str = "train"
    subset: str | None = None
    max_documents: int = 0
    tokenizer: str | None = None
    parse_special_tokens: bool = False
    sequence_length: int = 0
    documents: str = "separate"
    steps: int = 800
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 3e-3
    min_lr_ratio: float = 0.1
    layer_rate_decay: float = 1.0
    feedback_rate: float = 1.0
    mup_base_width: int = 0
    warmup_steps: int = 80
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    max_grad_norm: float = 1.0
    precision: str = "auto"
    compile: bool | None = None
    checkpoint_activations: str = "none"
    context_parallel: int = 1
    shard_processes: int = 1
    sharded_checkpoints: bool = False
    seed: int = 0
    evaluate_every: int = 100
    evaluate_batches: int = 8
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    train: str = "all"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ()
    base: str | None = None
    examples: bool = False
    loss_on: str = "answers"
    packing: bool = False
    track: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "gradient_accumulation_steps",
            "context_parallel",
            "evaluate_batches",
            "keep_checkpoints",
            "lora_rank",
        ):
            value = getattr(self, name)
            expect(is_count(value), name, value, "a positive integer")
        for name in (
            "sequence_length",
            "max_documents",
            "warmup_steps",
            "mup_base_width",
            "shard_processes",
            "seed",
            "evaluate_every",
            "checkpoint_every",
        ):
            value = getattr(self, name)
            none = isinstance(value, int) and not isinstance(value, bool) and value == 0
            expect(none or is_count(value), name, value, "0 or more")
        for name in ("learning_rate", "feedback_rate", "adam_eps", "max_grad_norm", "lora_alpha"):
            value = self._as_float(name)
            expect(0 < value < math.inf, name, value, "above 0")
        value = self._as_float("layer_rate_decay")
        expect(0 < value <= 1, "layer_rate_decay", value, "above 0, at most 1")
        for name in ("min_lr_ratio", "weight_decay"):
            value = self._as_float(name)
            expect(0 <= value <= 1, name, value, "from 0 to 1")
        for name in ("beta1", "beta2", "validation_fraction"):
            value = self._as_float(name)
            expect(0 <= value < 1, name, value, "from 0 to below 1")
        require(
            self.task is not None or not self.task_options,
            "task options are given without a task; give `task` too",
        )
        require(len(self.data) > 0, "data is empty, expected at least one file, folder or name")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            expect(value in choices, name, value, ", ".join(map(str, choices)))
        for name in self.track:
            expect(name in TRACKERS, "track", name, ", ".join(TRACKERS))
        flags = ("compile", "parse_special_tokens", "examples", "packing", "sharded_checkpoints")
        for name in flags:
            value = getattr(self, name)
            chosen = isinstance(value, bool) or (name == "compile" and value is None)
            expect(chosen, name, value, "true or false")
        require(
            self.optimizer != "muon" or self.shard_processes == 1,
            f"`optimizer` is muon, which needs whole matrices, but `shard_processes` is "
            f"{self.shard_processes}; give `shard_processes` 1, or `optimizer` adamw",
        )
        require(
            self.mup_base_width == 0 or self.train == "all",
            f"`mup_base_width` scales the training of whole models, and `train` is {self.train}; "
            "leave one of them out",
        )
        require(
            not self.sharded_checkpoints or self.train == "all",
            f"`train` is {self.train}, which saves a small adapter; `sharded_checkpoints` is for "
            "the weights of a model",
        )
        self._check_texts()
        for field in dataclasses.fields(self):
            lora = field.name.startswith("lora_") and "lora" not in self.train
            require(
                not lora or getattr(self, field.name) == field.default,
                f"`{field.name}` has no effect, because `train` is {self.train}; leave it out",
            )

    def _as_float(self, name: str) -> float:
        # A file may write 0 for 0.0, which PyTorch's optimizer does not take.
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        expect(number, name, value, "a number")
        object.__setattr__(self, name, float(value))
        return float(value)

    def _check_texts(self) -> None:
        for name in ("text_field", "split"):
            value = getattr(self, name)
            expect(isinstance(value, str), name, value, "a text")
        for name in ("task", "tokenizer", "subset", "base"):
            value = getattr(self, name)
            require(
                value is None or isinstance(value, str),
                f'{name} is {value!r}, expected a text such as "{value}"',
            )
        for name in LISTS:
            values = getattr(self, name)
            require(
                all(isinstance(value, str) for value in values),
                f"{name} is {list(values)!r}, expected a list of texts",
            )

    @classmethod
    def for_task(cls, task: str) -> TrainConfig:
        """The defaults of training on a task: more and larger steps than the demonstration's."""
        return cls(
            task=task,
            steps=4000,
            batch_size=32,
            learning_rate=1e-3,
            warmup_steps=200,
            evaluate_every=250,
            evaluate_batches=16,
            checkpoint_every=1000,
        )

    @classmethod
    def for_finetuning(cls, train: str = "lora") -> TrainConfig:
        """The defaults of fine-tuning: few steps, small ones where every weight is trained."""
        return cls(
            train=train,
            steps=200,
            learning_rate=2e-5 if train == "all" else 2e-4,
            warmup_steps=10,
            weight_decay=0.0,
            beta2=0.999,
            evaluate_every=50,
            checkpoint_every=100,
        )

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], where: str = "training config") -> TrainConfig:
        """Read the keys of a training.json; an unknown key is an error that names it."""
        given = {RENAMED_FIELDS.get(name, name): value for name, value in given.items()}
        known = dict(given)
        for name in LISTS:
            if name in known:
                require(
                    isinstance(known[name], (list, tuple)),
                    f"{where}: {name} is {known[name]!r}, expected a list",
                )
                known[name] = tuple(known[name])
        return read_fields(cls, known, where)

    def to_dict(self) -> dict[str, Any]:
        """The keys of training.json."""
        return dataclasses.asdict(self)
