"""`sessa train`: train a language model on text or on a task, in either framework."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sessa_cli.common import INTERRUPTED, Stopwatch, given_fields, make_console, print_json, say
from sessa_cli.progress import TerminalReporter
from sessa_cli.terminal import for_output
from sessa_common.checkpoint.run_files import LOSS_PICTURE, RESULT
from sessa_common.config import SessaConfig
from sessa_common.data.task_registry import TASKS
from sessa_common.errors import SessaError
from sessa_common.frameworks import choose_backend, framework
from sessa_common.layer_kinds import KINDS
from sessa_common.presets import PRESETS
from sessa_common.train_config import TrainConfig

if TYPE_CHECKING:
    from sessa_common.training.session import TrainResult

# A small model's tail of unlikely tokens is noise; without it the closing paragraph reads better.
PARAGRAPH = {"temperature": 0.6, "top_p": 0.9}


def _options(panel: str) -> Callable[[str, str], Any]:
    def option(names: str, help: str) -> Any:
        return typer.Option(*names.split(), help=help, rich_help_panel=panel, show_default=False)

    return option


of_model, of_data = _options("Model"), _options("Data")
of_learning, of_run = _options("Optimization"), _options("Run")


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
    data: Annotated[
        list[str] | None,
        of_data(
            "--data",
            "File, folder or wildcard of .txt .md .py .jsonl .parquet (also .gz, .zst), hf:owner/"
            "name of a Hugging Face data set, or - for standard input; repeatable. Default: "
            "pydoc, the reference text inside Python.",
        ),
    ] = None,
    validation_data: Annotated[
        list[str] | None,
        of_data("--validation-data", "Held-out text, instead of a part of --data."),
    ] = None,
    validation_fraction: Annotated[
        float | None, of_data("--validation-fraction", "Part of the data that is held out.")
    ] = None,
    text_field: Annotated[
        str | None, of_data("--text-field", "Field or column with the text.")
    ] = None,
    split: Annotated[str | None, of_data("--split", "Split of a Hugging Face data set.")] = None,
    subset: Annotated[
        str | None, of_data("--subset", "Configuration of a Hugging Face data set.")
    ] = None,
    max_documents: Annotated[
        int | None, of_data("--max-documents", "Read only the first documents; 0 for all.")
    ] = None,
    parse_special_tokens: Annotated[
        bool | None,
        of_data(
            "--parse-special-tokens/--plain-special-tokens",
            "Read the name of a special token in the text, such as <|endoftext|>, as the token. "
            "Default: as plain text.",
        ),
    ] = None,
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
    train_config: Annotated[
        Path | None, of_learning("--train-config", "A training.json; other options override it.")
    ] = None,
    steps: Annotated[int | None, of_learning("--steps", "Optimizer steps.")] = None,
    batch_size: Annotated[
        int | None, of_learning("--batch-size", "Rows in one forward pass.")
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None, of_learning("--gradient-accumulation-steps", "Forward passes in one step.")
    ] = None,
    sequence_length: Annotated[
        int | None,
        of_learning("--sequence-length", "Tokens in a training row; 0 for the whole context."),
    ] = None,
    learning_rate: Annotated[
        float | None, of_learning("--learning-rate --lr", "Highest learning rate.")
    ] = None,
    min_lr_ratio: Annotated[
        float | None,
        of_learning("--min-lr-ratio", "End of the cosine, as a part of the learning rate."),
    ] = None,
    warmup_steps: Annotated[
        int | None, of_learning("--warmup-steps", "Steps of the linear rise of the learning rate.")
    ] = None,
    weight_decay: Annotated[
        float | None, of_learning("--weight-decay", "Decoupled decay of matrices.")
    ] = None,
    beta1: Annotated[float | None, of_learning("--beta1", "Adam's first decay.")] = None,
    beta2: Annotated[float | None, of_learning("--beta2", "Adam's second decay.")] = None,
    max_grad_norm: Annotated[
        float | None, of_learning("--max-grad-norm", "Largest global gradient norm.")
    ] = None,
    precision: Annotated[
        str | None, of_learning("--precision", "auto, float32 or bfloat16.")
    ] = None,
    compile: Annotated[
        bool | None,
        of_learning(
            "--compile/--no-compile",
            "Compile the training step: slow start, fast steps. Default: with MLX on a GPU.",
        ),
    ] = None,
    checkpoint_activations: Annotated[
        str | None,
        of_learning(
            "--checkpoint-activations",
            "none, or layers: the backward pass computes each layer again, to save memory.",
        ),
    ] = None,
    seed: Annotated[int | None, of_learning("--seed", "Seed of weights and data order.")] = None,
    context_parallel: Annotated[
        int | None,
        of_run(
            "--context-parallel",
            "Processes of torchrun that share the tokens of the same rows. Default: 1.",
        ),
    ] = None,
    shard_processes: Annotated[
        int | None,
        of_run(
            "--shard-processes",
            "Processes of torchrun that share one copy of the weights; 0 for all. Default: 1.",
        ),
    ] = None,
    out: Annotated[Path | None, of_run("--out -o", "Folder to write. Default: runs/pydoc.")] = None,
    force: Annotated[bool, of_run("--force", "Replace a folder that is not empty.")] = False,
    resume: Annotated[
        Path | None,
        of_run(
            "--resume", "Continue the run in this folder; the numbers are those of an unbroken run."
        ),
    ] = None,
    backend: Annotated[
        str | None, of_run("--backend", "auto (MLX on Apple silicon, else PyTorch), mlx or torch.")
    ] = None,
    device: Annotated[
        str | None, of_run("--device", "torch: cpu, cuda, mps; mlx: cpu, gpu.")
    ] = None,
    evaluate_every: Annotated[
        int | None, of_run("--evaluate-every", "Steps between evaluations; 0: only at the end.")
    ] = None,
    evaluate_batches: Annotated[
        int | None, of_run("--evaluate-batches", "Batches in an evaluation.")
    ] = None,
    checkpoint_every: Annotated[
        int | None, of_run("--checkpoint-every", "Steps between saves; 0: only at the end.")
    ] = None,
    keep_checkpoints: Annotated[
        int | None,
        of_run("--keep-checkpoints", "Saves to keep, the last ones; the best stays as well."),
    ] = None,
    prompt: Annotated[str, of_run("--prompt", "First words of the closing paragraph.")] = "The",
    json_output: Annotated[bool, of_run("--json", "Print the result as JSON on stdout.")] = False,
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
            **_fields(ctx.params),
        )
    if not result.is_main:
        return  # The main process of the run prints for all.
    summary = _summary(result, backend)
    if not result.finished:
        again = f"sessa train --resume {result.folder}"
        say(console, f"stopped at step {summary['step']} and saved; go on with: {again}")
    elif result.task_result is not None:
        say(console, _test_line(result.task_result["test"]))
        say(console, f"wrote {result.folder} in {watch.seconds:.0f} s, with {RESULT}")
    else:
        summary["text"] = _paragraph(result.folder, backend, device, prompt)
        console.print(f"\n{for_output(summary['text'])}\n", markup=False, highlight=False)
        again = f"sessa generate {result.folder}"
        say(console, f"wrote {result.folder} in {watch.seconds:.0f} s; try: {again}")
    if not importlib.util.find_spec("matplotlib"):
        say(console, f"no {LOSS_PICTURE}: it needs matplotlib (pip install matplotlib)")
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


def _summary(result: TrainResult, backend: str) -> dict[str, Any]:
    return {
        "folder": str(result.folder),
        "backend": backend,
        "finished": result.finished,
        "parameters": result.parameters,
        **result.metrics,
        **(result.task_result or {}),
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
