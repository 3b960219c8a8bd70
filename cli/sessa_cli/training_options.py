"""Options that `sessa train` and `sessa finetune` share: data, optimization, the run itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sessa_common.train_config import OPTIMIZERS, TRACKERS, TRAINED


def panel(name: str) -> Callable[[str, str], Any]:
    """Make a function for the options of one panel of the help text, from their names and help."""

    def option(names: str, help: str) -> Any:
        return typer.Option(*names.split(), help=help, rich_help_panel=name, show_default=False)

    return option


of_model, of_data = panel("Model"), panel("Data")
of_learning, of_run = panel("Optimization"), panel("Run")

Data = Annotated[
    list[str] | None,
    of_data(
        "--data",
        "File, folder or wildcard of .txt .md .py .jsonl .parquet (also .gz, .zst), hf:owner/"
        "name of a Hugging Face data set, hf-stream:owner/name to read it while training, or - for "
        "standard input; repeatable. Default: pydoc, the reference text inside Python.",
    ),
]
ValidationData = Annotated[
    list[str] | None,
    of_data("--validation-data", "Held-out text, instead of a part of --data."),
]
ValidationFraction = Annotated[
    float | None, of_data("--validation-fraction", "Part of the data that is held out.")
]
TextField = Annotated[str | None, of_data("--text-field", "Field or column with the text.")]
Split = Annotated[str | None, of_data("--split", "Split of a Hugging Face data set.")]
Subset = Annotated[str | None, of_data("--subset", "Configuration of a Hugging Face data set.")]
MaxDocuments = Annotated[
    int | None, of_data("--max-documents", "Read only the first documents; 0 for all.")
]
ParseSpecialTokens = Annotated[
    bool | None,
    of_data(
        "--parse-special-tokens/--plain-special-tokens",
        "Read the name of a special token in the text, such as <|endoftext|>, as the token. "
        "Default: as plain text.",
    ),
]
Train = Annotated[
    str | None,
    of_learning(
        "--train",
        f"{', '.join(TRAINED)}: all weights, or an adapter for the model, which stays as it is.",
    ),
]
LoraRank = Annotated[int | None, of_learning("--lora-rank", "Rank of LoRA. Default: 8.")]
LoraAlpha = Annotated[
    float | None, of_learning("--lora-alpha", "LoRA counts alpha / rank times. Default: 16.")
]
LoraTargets = Annotated[
    list[str] | None,
    of_learning(
        "--lora-target",
        "Linear layer that gets LoRA, such as mixer.q_proj or q_proj; repeatable. Default: all.",
    ),
]
TrainConfigFile = Annotated[
    Path | None, of_learning("--train-config", "A training.json; other options override it.")
]
Steps = Annotated[int | None, of_learning("--steps", "Optimizer steps.")]
BatchSize = Annotated[int | None, of_learning("--batch-size", "Rows in one forward pass.")]
GradientAccumulationSteps = Annotated[
    int | None, of_learning("--gradient-accumulation-steps", "Forward passes in one step.")
]
SequenceLength = Annotated[
    int | None,
    of_learning("--sequence-length", "Tokens in a training row; 0 for the whole context."),
]
Documents = Annotated[
    str | None,
    of_learning(
        "--documents",
        "separate: the documents of a row do not read each other; or joined. Default: separate.",
    ),
]
Optimizer = Annotated[
    str | None,
    of_learning(
        "--optimizer",
        f"{' or '.join(OPTIMIZERS)}; muon takes the layers' matrices, AdamW the rest. "
        "Default: adamw.",
    ),
]
LearningRate = Annotated[
    float | None, of_learning("--learning-rate --lr", "Highest learning rate.")
]
MinLrRatio = Annotated[
    float | None,
    of_learning("--min-lr-ratio", "End of the cosine, as a part of the learning rate."),
]
LayerRateDecay = Annotated[
    float | None,
    of_learning(
        "--layer-rate-decay",
        "Learning rate of a layer, as a part of that of the layer after it. Default: 1.",
    ),
]
FeedbackRate = Annotated[
    float | None,
    of_learning(
        "--feedback-rate", "The feedback's learning rate, as a multiple of its layer's. Default: 1."
    ),
]
MupBaseWidth = Annotated[
    int | None,
    of_learning(
        "--mup-base-width",
        "Width of the model that the learning rate was found for; muP scales it to this model's. "
        "Default: 0, as it is.",
    ),
]
WarmupSteps = Annotated[
    int | None, of_learning("--warmup-steps", "Steps of the linear rise of the learning rate.")
]
WeightDecay = Annotated[float | None, of_learning("--weight-decay", "Decoupled decay of matrices.")]
Beta1 = Annotated[float | None, of_learning("--beta1", "Adam's first decay.")]
Beta2 = Annotated[float | None, of_learning("--beta2", "Adam's second decay.")]
MaxGradNorm = Annotated[
    float | None, of_learning("--max-grad-norm", "Largest global gradient norm.")
]
Precision = Annotated[str | None, of_learning("--precision", "auto, float32 or bfloat16.")]
Compile = Annotated[
    bool | None,
    of_learning(
        "--compile/--no-compile",
        "Compile the training step: slow start, fast steps. Default: with MLX on a GPU.",
    ),
]
CheckpointActivations = Annotated[
    str | None,
    of_learning(
        "--checkpoint-activations",
        "none; layers: the backward pass computes each layer again, to save memory; selective: "
        "all of it but attention and feedback.",
    ),
]
Seed = Annotated[int | None, of_learning("--seed", "Seed of weights and data order.")]
Force = Annotated[bool, of_run("--force", "Replace a folder that is not empty.")]
Resume = Annotated[
    Path | None,
    of_run(
        "--resume", "Continue the run in this folder; the numbers are those of an unbroken run."
    ),
]
Backend = Annotated[
    str | None, of_run("--backend", "auto (MLX on Apple silicon, else PyTorch), mlx or torch.")
]
Device = Annotated[str | None, of_run("--device", "torch: cpu, cuda, mps; mlx: cpu, gpu.")]
ContextParallel = Annotated[
    int | None,
    of_run(
        "--context-parallel",
        "Processes of torchrun that share the tokens of the same rows. Default: 1.",
    ),
]
ShardProcesses = Annotated[
    int | None,
    of_run(
        "--shard-processes",
        "Processes of torchrun that share one copy of the weights; 0 for all. Default: 1.",
    ),
]
ShardedCheckpoints = Annotated[
    bool | None,
    of_run(
        "--sharded-checkpoints/--whole-checkpoints",
        "With --shard-processes: each process saves its part while training goes on; sessa convert "
        "makes an ordinary checkpoint of it. Default: the first process gathers and saves the "
        "whole, which its memory must hold.",
    ),
]
Track = Annotated[
    list[str] | None,
    of_run("--track", f"Tracker that gets the metrics: {', '.join(TRACKERS)}; repeatable."),
]
EvaluateEvery = Annotated[
    int | None, of_run("--evaluate-every", "Steps between evaluations; 0: only at the end.")
]
EvaluateBatches = Annotated[int | None, of_run("--evaluate-batches", "Batches in an evaluation.")]
CheckpointEvery = Annotated[
    int | None, of_run("--checkpoint-every", "Steps between saves; 0: only at the end.")
]
KeepCheckpoints = Annotated[
    int | None,
    of_run("--keep-checkpoints", "Saves to keep, the last ones; the best stays as well."),
]
JsonOutput = Annotated[bool, of_run("--json", "Print the result as JSON on stdout.")]
