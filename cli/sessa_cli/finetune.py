"""`sessa finetune`: fine-tune a model on conversations, prompts with completions, or texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sessa_cli import training_options as options
from sessa_cli.common import INTERRUPTED, Stopwatch, given_fields, make_console, print_json, say
from sessa_cli.progress import TerminalReporter
from sessa_cli.training_options import of_data, of_run
from sessa_common.checkpoint.adapters import is_adapter
from sessa_common.frameworks import choose_backend, framework
from sessa_common.train_config import TrainConfig


# As in `train`, the parameters have the names of the fields of TrainConfig that they override.
def finetune(
    ctx: typer.Context,
    model: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder of the model.", show_default=False)
    ] = None,
    data: Annotated[
        list[str] | None,
        of_data(
            "--data",
            'Files of JSON lines with "messages", or with "prompt" and "completion"; or texts as '
            "in `sessa train`; repeatable.",
        ),
    ] = None,
    validation_data: options.ValidationData = None,
    validation_fraction: options.ValidationFraction = None,
    loss_on: Annotated[
        str | None,
        of_data("--loss-on", "answers, or all tokens of an example. Default: answers."),
    ] = None,
    packing: Annotated[
        bool | None,
        of_data("--packing/--no-packing", "Put several examples into a row. Default: one a row."),
    ] = None,
    text_field: options.TextField = None,
    split: options.Split = None,
    subset: options.Subset = None,
    max_documents: options.MaxDocuments = None,
    parse_special_tokens: options.ParseSpecialTokens = None,
    train: options.Train = None,
    lora_rank: options.LoraRank = None,
    lora_alpha: options.LoraAlpha = None,
    lora_targets: options.LoraTargets = None,
    train_config: options.TrainConfigFile = None,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    gradient_accumulation_steps: options.GradientAccumulationSteps = None,
    sequence_length: options.SequenceLength = None,
    optimizer: options.Optimizer = None,
    learning_rate: options.LearningRate = None,
    min_lr_ratio: options.MinLrRatio = None,
    layer_rate_decay: options.LayerRateDecay = None,
    feedback_rate: options.FeedbackRate = None,
    warmup_steps: options.WarmupSteps = None,
    weight_decay: options.WeightDecay = None,
    beta1: options.Beta1 = None,
    beta2: options.Beta2 = None,
    max_grad_norm: options.MaxGradNorm = None,
    precision: options.Precision = None,
    compile: options.Compile = None,
    checkpoint_activations: options.CheckpointActivations = None,
    seed: options.Seed = None,
    context_parallel: options.ContextParallel = None,
    shard_processes: options.ShardProcesses = None,
    sharded_checkpoints: options.ShardedCheckpoints = None,
    out: Annotated[
        Path | None, of_run("--out -o", "Folder to write. Default: runs/finetuned.")
    ] = None,
    force: options.Force = False,
    resume: options.Resume = None,
    backend: options.Backend = None,
    device: options.Device = None,
    evaluate_every: options.EvaluateEvery = None,
    evaluate_batches: options.EvaluateBatches = None,
    checkpoint_every: options.CheckpointEvery = None,
    keep_checkpoints: options.KeepCheckpoints = None,
    track: options.Track = None,
    json_output: options.JsonOutput = False,
) -> None:
    """Fine-tune a model: LoRA on the answers of conversations, unless options say otherwise.

    Example: sessa finetune runs/first --data chat.jsonl --out runs/chat

    Example: sessa finetune runs/first --data chat.jsonl --train all --out runs/chat-whole
    """
    watch = Stopwatch()
    backend = choose_backend(backend)
    console = make_console(json_output)
    with TerminalReporter(console, backend) as reporter:
        result = framework(backend, "training").finetune(
            model,
            out,
            train_config=train_config,
            resume=resume,
            force=force,
            device=device,
            reporter=reporter,
            **given_fields(ctx.params, TrainConfig),
        )
    if not result.is_main:
        return  # The main process of the run prints for all.
    folder = result.folder
    if not result.finished:
        again = f"sessa finetune --resume {folder}"
        say(console, f"stopped at step {result.metrics['step']} and saved; go on with: {again}")
    else:
        whole = f"{model or 'MODEL'} --adapter {folder}" if is_adapter(folder) else folder
        say(console, f"wrote {folder} in {watch.seconds:.0f} s; try: sessa chat {whole}")
    if json_output:
        print_json(
            {
                "folder": str(folder),
                "backend": backend,
                "finished": result.finished,
                "adapter": is_adapter(folder),
                "parameters": result.parameters,
                **result.metrics,
            }
        )
    if not result.finished:
        raise typer.Exit(INTERRUPTED)
