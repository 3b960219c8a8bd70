"""`sessa train`: a language model from text, resumable, on either framework."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sessa_cli.common import (
    INTERRUPTED,
    choose_backend,
    framework,
    given_fields,
    make_console,
    print_json,
    say,
)
from sessa_cli.progress import TerminalReporter
from sessa_common.config import MIXERS, PRESETS, SessaConfig, TrainConfig
from sessa_common.data.task_registry import TASKS
from sessa_common.errors import SessaError
from sessa_common.inference.generation import encode_prompt, generate, stop_tokens
from sessa_common.inference.sampling import SamplingConfig
from sessa_common.json_files import read_json
from sessa_common.training.metrics import read_metrics
from sessa_common.training.run_folder import (
    RESULT,
    Run,
    choose_config,
    resume_run,
    start_run,
    write_result,
)
from sessa_common.training.trainer import STATE, Trainer

DEFAULT_OUT = Path("runs/pydoc")
# A small model's tail of unlikely tokens is noise; what is left reads better.
PARAGRAPH = SamplingConfig(temperature=0.6, top_p=0.9)


def _options(panel: str) -> Callable[[str, str], Any]:
    def option(names: str, help: str) -> Any:
        return typer.Option(*names.split(), help=help, rich_help_panel=panel, show_default=False)

    return option


of_model, of_data = _options("The model"), _options("The data")
of_learning, of_run = _options("The learning"), _options("The run")


# The parameters are named like the fields of SessaConfig and TrainConfig that they override, and
# are read through the context, so that no default is written down twice.
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
        list[str] | None, of_data("--task-option", "name=value of the task; repeatable.")
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
        float | None, of_data("--validation-fraction", "Part of --data that is held out.")
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
        Path | None, of_model("--config", "A config.json with the architecture.")
    ] = None,
    init: Annotated[
        Path | None, of_model("--init", "Fine-tune the model of this checkpoint folder.")
    ] = None,
    mixer: Annotated[
        str | None,
        of_model("--mixer", f"{', '.join(MIXERS)}; or a comma list with one for each layer."),
    ] = None,
    attention_block: Annotated[
        str | None,
        of_model("--attention-block", "Around attention: mlp (standard) or gated (Sessa's)."),
    ] = None,
    num_hidden_layers: Annotated[int | None, of_model("--layers", "Number of layers.")] = None,
    hidden_size: Annotated[int | None, of_model("--width", "Width of the model.")] = None,
    num_attention_heads: Annotated[
        int | None, of_model("--heads", "Number of attention heads.")
    ] = None,
    num_key_value_heads: Annotated[
        int | None, of_model("--kv-heads", "Number of key/value heads.")
    ] = None,
    max_position_embeddings: Annotated[
        int | None, of_model("--context", "Longest text that the model reads, in tokens.")
    ] = None,
    gamma_max: Annotated[
        float | None, of_model("--gamma-max", "Bound of the feedback gain.")
    ] = None,
    feedback: Annotated[
        bool | None, of_model("--feedback/--no-feedback", "Without feedback: the paper's ablation.")
    ] = None,
    use_forward_rope: Annotated[
        bool | None, of_model("--rope/--no-rope", "Rotary positions in the forward attention.")
    ] = None,
    tie_word_embeddings: Annotated[
        bool | None, of_model("--tie/--no-tie", "One matrix for embedding and head.")
    ] = None,
    train_config: Annotated[
        Path | None, of_learning("--train-config", "A training.json; other options go over it.")
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
    learning_rate: Annotated[float | None, of_learning("--lr", "Highest learning rate.")] = None,
    min_lr_ratio: Annotated[
        float | None, of_learning("--min-lr-ratio", "Where the cosine ends, as a part of --lr.")
    ] = None,
    warmup_steps: Annotated[
        int | None, of_learning("--warmup-steps", "Steps of the linear rise.")
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
        of_learning("--compile/--no-compile", "Compile the training step: slow start, fast steps."),
    ] = None,
    seed: Annotated[int | None, of_learning("--seed", "Seed of weights and data order.")] = None,
    out: Annotated[Path | None, of_run("--out -o", "Folder to write. Default: runs/pydoc.")] = None,
    force: Annotated[bool, of_run("--force", "Replace a folder that is not empty.")] = False,
    resume: Annotated[
        Path | None, of_run("--resume", "Go on with the run in this folder, bit for bit.")
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
    prompt: Annotated[str, of_run("--prompt", "What the closing paragraph begins with.")] = "The",
    json_output: Annotated[bool, of_run("--json", "Print the result as JSON on stdout.")] = False,
) -> None:
    """Train a model on text or on a task; without options, a small Sessa model, in some minutes.

    Example: sessa train --data "books/*.txt" --preset sessa-9m --tokenizer 4096 --out runs/books

    Example: sessa train --task diffuse-mqar --preset transformer-1m --out runs/mqar
    """
    began = time.perf_counter()
    backend = choose_backend(backend)
    console = make_console(json_output)
    device = framework(backend, "training").choose_device(device)
    run = _resume(ctx, resume) if resume is not None else _start(ctx)
    finished = _train(run, backend, device, console)
    summary = _summary(run, backend, finished)
    if finished and run.settings.task is not None:
        say(console, _test_line(summary["test"]))
        took = time.perf_counter() - began
        say(console, f"wrote {run.folder} in {took:.0f} s, with {RESULT}")
    elif finished:
        summary["text"] = _paragraph(run, backend, device, prompt)
        console.print(f"\n{summary['text']}\n", markup=False, highlight=False)
        took = time.perf_counter() - began
        say(console, f"wrote {run.folder} in {took:.0f} s; try: sessa generate {run.folder}")
    else:
        again = f"sessa train --resume {run.folder}"
        say(console, f"stopped at step {summary['step']} and saved; go on with: {again}")
    if not importlib.util.find_spec("matplotlib"):
        say(console, "no loss.png: it needs matplotlib (pip install matplotlib)")
    if json_output:
        print_json(summary)
    if not finished:
        raise typer.Exit(INTERRUPTED)


def _start(ctx: typer.Context) -> Run:
    params = ctx.params
    # Not every version of Typer has made paths of these strings.
    config_file, init, train_config, out = (
        None if params[name] is None else Path(params[name])
        for name in ("config", "init", "train_config", "out")
    )
    given = _model_fields(params)
    config = choose_config(given, preset=params["preset"], file=config_file, init=init)
    base = TrainConfig() if params["task"] is None else TrainConfig.for_task(params["task"])
    if train_config is not None:
        base = TrainConfig.from_dict(read_json(train_config), str(train_config))
    settings = TrainConfig(**base.to_dict() | given_fields(params, TrainConfig))
    return start_run(
        out or DEFAULT_OUT,
        config,
        settings,
        fixed_vocabulary=config_file is not None,
        fixed_context="max_position_embeddings" in given,
        init=init,
        force=params["force"],
    )


def _resume(ctx: typer.Context, folder: Path) -> Run:
    params = ctx.params
    for name in ("preset", "config", "init", "train_config", "out", "force"):
        if params[name]:
            raise SessaError(
                f"--{name.replace('_', '-')} starts a new run, so it does not go with --resume"
            )
    return resume_run(folder, _model_fields(params), given_fields(params, TrainConfig))


def _model_fields(params: dict[str, Any]) -> dict[str, Any]:
    given = given_fields(params, SessaConfig)
    if "," in given.get("mixer", ""):
        given["mixer"] = tuple(name.strip() for name in given["mixer"].split(","))
    return given


def _train(run: Run, backend: str, device: str | None, console: Console) -> bool:
    try:
        learner = framework(backend, "training").TrainBackend(
            run.config, run.settings, run.weights, device
        )
        trainer = Trainer(learner, run.source, run.config, run.settings, run.folder)
    except BaseException:
        # Nothing is learned yet: the same command must not find a folder that is in its way.
        if not (run.folder / STATE).exists():
            shutil.rmtree(run.folder)
        raise
    task = run.settings.task is not None
    steps = run.settings.steps
    # A run that was killed between its last step and the test has no result of these steps yet.
    untested = task and trainer.step == steps and not _has_result(run.folder, steps)
    if trainer.step >= steps and not untested:
        raise SessaError(
            f"{run.folder}: all {steps} steps are done; give a larger --steps to go on"
        )
    say(
        console,
        f"{_parameter_count(run):,} parameters, {run.source.summary}, "
        f"vocabulary {run.config.vocab_size:,}; {backend} on "
        f"{learner.device} in {learner.precision}; writing {run.folder}",
    )
    for note in run.source.notes:
        say(console, note)
    with TerminalReporter(console, steps, trainer.step) as trainer.reporter:
        finished = trainer.run()
    if finished and task:
        write_result(run, learner)
    return finished


def _has_result(folder: Path, steps: int) -> bool:
    path = folder / RESULT
    return path.exists() and read_json(path).get("steps") == steps


def _test_line(test: dict[str, Any]) -> str:
    parts = [f"test accuracy {test['accuracy']:.3f} of {test['examples']:,} examples"]
    parts += [f"{name} {test[name]:.3f}" for name in ("ceiling", "unigram") if name in test]
    parts += [f"lag {lag} {share:.3f}" for lag, share in test.get("by_lag", {}).items()]
    return ", ".join(parts)


def _summary(run: Run, backend: str, finished: bool) -> dict[str, Any]:
    records = read_metrics(run.folder)
    last = {name: value for record in records for name, value in record.items()}
    names = ("step", "loss", "validation_loss", "validation_perplexity")
    measured = read_json(run.folder / RESULT) if finished and run.settings.task else {}
    return {
        "folder": str(run.folder),
        "backend": backend,
        "finished": finished,
        "parameters": _parameter_count(run),
        **{name: last[name] for name in names if name in last},
        **measured,
    }


def _parameter_count(run: Run) -> int:
    return sum(value.size for value in run.weights.values())


def _paragraph(run: Run, backend: str, device: str | None, prompt: str) -> str:
    decoder = framework(backend, "decoding").load_decoder(run.folder, device=device)
    ids = encode_prompt(run.tokenizer, prompt, run.config)
    ids = ids[: run.config.max_position_embeddings - 1]
    turns = generate(decoder, [ids], PARAGRAPH, stop=stop_tokens(run.folder, run.config))
    return run.tokenizer.decode(ids + [token for (token,) in turns if token is not None])
