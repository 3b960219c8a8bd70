"""`sessa train`: train a language model on text or on a task, in either framework."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sessa_cli import training_options as options
from sessa_cli.common import INTERRUPTED, Stopwatch, given_fields, make_console, print_json, say
from sessa_cli.progress import TerminalReporter
from sessa_cli.terminal import for_output
from sessa_cli.training_options import of_data, of_model, of_run
from sessa_common.checkpoint.adapters import is_adapter
from sessa_common.checkpoint.run_files import LOSS_PICTURE, RESULT, TRACE
from sessa_common.checkpoint.sharded_state import is_sharded
from sessa_common.config import SessaConfig
from sessa_common.data.task_registry import TASKS
from sessa_common.errors import SessaError
from sessa_common.extras import install
from sessa_common.frameworks import choose_backend, framework
from sessa_common.layer_kinds import KINDS
from sessa_common.presets import PRESETS
from sessa_common.train_config import TrainConfig

if TYPE_CHECKING:
    from sessa_common.training.session import TrainResult

# A small model's tail of unlikely tokens is noise; without it the closing paragraph reads better.
PARAGRAPH = {"temperature": 0.6, "top_p": 0.9}


# The parameters have the names of the fields of SessaConfig and TrainConfig that they override, and
# are read through the context, so that no default is written twice.
def train(
    ctx: typer.Context,
    task: Annotated[
        str | None,
        of_data(
            "--task",
            f"Train on {', '.join(TASKS)} or on a folder of `sessa data`, not on text.",
        ),
    ] = None,
    task_options: Annotated[
        list[str] | None,
        of_data("--task-option", "A setting of the task, as name=value; repeatable."),
    ] = None,
    data: options.Data = None,
    validation_data: options.ValidationData = None,
    validation_fraction: options.ValidationFraction = None,
    text_field: options.TextField = None,
    split: options.Split = None,
    subset: options.Subset = None,
    max_documents: options.MaxDocuments = None,
    parse_special_tokens: options.ParseSpecialTokens = None,
    tokenizer: Annotated[
        str | None,
        of_data(
            "--tokenizer",
            "A tokenizer.json, the size of a byte-level BPE to train, or bytes. Default: a BPE "
            "of the model's vocab_size.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        of_model("--preset", f"A named size: {', '.join(PRESETS)}. Default: demo."),
    ] = None,
    config: Annotated[
        Path | None, of_model("--config", "A config.json with the architecture of the model.")
    ] = None,
    init: Annotated[
        Path | None, of_model("--init", "Fine-tune the model of this checkpoint folder.")
    ] = None,
    layer_kinds: Annotated[
        str | None,
        of_model("--layer-kinds", f"{', '.join(KINDS)}; or a comma list with one for each layer."),
    ] = None,
    num_hidden_layers: Annotated[
        int | None, of_model("--num-hidden-layers --layers", "Number of layers.")
    ] = None,
    hidden_size: Annotated[
        int | None, of_model("--hidden-size --width", "Width of the model.")
    ] = None,
    num_attention_heads: Annotated[
        int | None, of_model("--num-attention-heads --heads", "Number of attention heads.")
    ] = None,
    num_key_value_heads: Annotated[
        int | None, of_model("--num-key-value-heads --kv-heads", "Number of key/value heads.")
    ] = None,
    max_position_embeddings: Annotated[
        int | None,
        of_model(
            "--max-position-embeddings --context", "Longest text that the model reads, in tokens."
        ),
    ] = None,
    gamma_max: Annotated[
        float | None, of_model("--gamma-max", "Bound of the feedback gain.")
    ] = None,
    use_forward_rope: Annotated[
        bool | None, of_model("--rope/--no-rope", "Rotary positions in the forward attention.")
    ] = None,
    tie_word_embeddings: Annotated[
        bool | None, of_model("--tie/--no-tie", "One matrix for embedding and head.")
    ] = None,
    train: options.Train = None,
    lora_rank: options.LoraRank = None,
    lora_alpha: options.LoraAlpha = None,
    lora_targets: options.LoraTargets = None,
    train_config: options.TrainConfigFile = None,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    gradient_accumulation_steps: options.GradientAccumulationSteps = None,
    sequence_length: options.SequenceLength = None,
    documents: options.Documents = None,
    optimizer: options.Optimizer = None,
    learning_rate: options.LearningRate = None,
    min_lr_ratio: options.MinLrRatio = None,
    layer_rate_decay: options.LayerRateDecay = None,
    feedback_rate: options.FeedbackRate = None,
    mup_base_width: options.MupBaseWidth = None,
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
    out: Annotated[Path | None, of_run("--out -o", "Folder to write. Default: runs/pydoc.")] = None,
    force: options.Force = False,
    resume: options.Resume = None,
    backend: options.Backend = None,
    device: options.Device = None,
    evaluate_every: options.EvaluateEvery = None,
    evaluate_batches: options.EvaluateBatches = None,
    checkpoint_every: options.CheckpointEvery = None,
    keep_checkpoints: options.KeepCheckpoints = None,
    track: options.Track = None,
    prompt: Annotated[str, of_run("--prompt", "First words of the closing paragraph.")] = "The",
    profile: Annotated[
        bool,
        of_run("--profile", "Measure and trace a few steps: speed, memory, kernels (PyTorch)."),
    ] = False,
    json_output: options.JsonOutput = False,
) -> None:
    """Train a model on text or on a task; without options, a small Sessa model in a few minutes.

    Example: sessa train --data "books/*.txt" --preset sessa-9m --tokenizer 4096 --out runs/books

    Example: sessa train --task diffuse-mqar --preset transformer-1m --out runs/mqar
    """
    watch = Stopwatch()
    backend = choose_backend(backend)
    console = make_console(json_output)
    with TerminalReporter(console, backend) as reporter:
        result = framework(backend, "training").train(
            out,
            preset=preset,
            config=config,
            init=init,
            train_config=train_config,
            resume=resume,
            force=force,
            device=device,
            reporter=reporter,
            profile=profile,
            **_fields(ctx.params),
        )
    if not result.is_main:
        return  # The main process of the run prints for all.
    for line in _profile_lines(result):
        say(console, line)
    summary = _summary(result, backend)
    if not result.finished:
        again = f"sessa train --resume {result.folder}"
        say(console, f"stopped at step {summary['step']} and saved; go on with: {again}")
    elif result.task_result is not None:
        say(console, _test_line(result.task_result["test"]))
        say(console, f"wrote {result.folder} in {watch.seconds:.0f} s, with {RESULT}")
    elif is_adapter(result.folder):
        again = f"sessa generate {init or 'MODEL'} --adapter {result.folder}"
        say(console, f"wrote {result.folder} in {watch.seconds:.0f} s; try: {again}")
    elif is_sharded(result.folder):
        again = f"sessa convert {result.folder} OUT"
        say(console, f"wrote {result.folder} in {watch.seconds:.0f} s, in shards; export: {again}")
    else:
        summary["text"] = _paragraph(result.folder, backend, device, prompt)
        console.print(f"\n{for_output(summary['text'])}\n", markup=False, highlight=False)
        again = f"sessa generate {result.folder}"
        say(console, f"wrote {result.folder} in {watch.seconds:.0f} s; try: {again}")
    if not importlib.util.find_spec("matplotlib"):
        say(console, f"no {LOSS_PICTURE}: it needs matplotlib ({install('plot')})")
    if json_output:
        print_json(summary)
    if not result.finished:
        raise typer.Exit(INTERRUPTED)


def _fields(params: dict[str, Any]) -> dict[str, Any]:
    given = given_fields(params, SessaConfig, TrainConfig)
    if "," in given.get("layer_kinds", ""):
        given["layer_kinds"] = tuple(name.strip() for name in given["layer_kinds"].split(","))
    return given


def _test_line(test: dict[str, Any]) -> str:
    parts = [f"test accuracy {test['accuracy']:.3f} of {test['examples']:,} examples"]
    parts += [f"{name} {test[name]:.3f}" for name in ("ceiling", "unigram") if name in test]
    parts += [f"lag {lag} {share:.3f}" for lag, share in test.get("by_lag", {}).items()]
    return ", ".join(parts)


def _profile_lines(result: TrainResult) -> list[str]:
    """Return lines about the profile of a run, none where it has none."""
    found = result.profile
    if found is None:
        return []
    used = found["utilisation"]
    share = "" if used is None else f", model-FLOP utilisation {used:.3f}"
    memory = [f"{kind} {size / 2**20:,.1f} MiB" for kind, size in found["bytes"].items()]
    kernels = found.get("milliseconds_by_kind", {}).items()
    times = [f"{kind} {value:.1f} ms" for kind, value in kernels if isinstance(value, float)]
    return [
        f"a step takes {found['milliseconds']:.1f} ms, {found['tokens_per_second']:,.0f} tokens/s, "
        f"{found['operations_per_second'] / 1e12:.1f} TFLOP/s{share}",
        f"memory of this process: {', '.join(memory)}",
        *([f"kernels of a step: {', '.join(times)}"] if times else []),
        f"trace for ui.perfetto.dev: {result.folder / TRACE}",
    ]


def _summary(result: TrainResult, backend: str) -> dict[str, Any]:
    return {
        "folder": str(result.folder),
        "backend": backend,
        "finished": result.finished,
        "parameters": result.parameters,
        **result.metrics,
        **(result.task_result or {}),
        **({"profile": result.profile} if result.profile else {}),
    }


def _paragraph(folder: Path, backend: str, device: str | None, prompt: str) -> str:
    """Return the prompt and its continuation, or the reason why there is none.

    The run itself is whole, so a prompt that cannot be continued does not fail the command.
    """
    try:
        (text,) = framework(backend, "decoding").generate(
            folder, prompt, device=device, **PARAGRAPH
        )
    except SessaError as error:
        return f"(no text: {error})"
    return prompt + text
