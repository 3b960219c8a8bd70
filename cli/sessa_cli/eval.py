"""`sessa eval`: loss, perplexity and bits per byte of texts, and scores of benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from sessa_cli.common import make_console, print_json, say
from sessa_cli.runtimes import open_decoder
from sessa_common.checkpoint.adapters import text_folder
from sessa_common.errors import SessaError
from sessa_common.frameworks import choose_backend, framework
from sessa_common.inference.evaluation import Score
from sessa_common.inference.harness import TaskScores, evaluate_tasks, require_harness
from sessa_common.inference.model_tokenizer import ModelTokenizer


# Named eval on the command line; the function's name leaves Python's eval alone.
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.", show_default=False)],
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Text as in `sessa train`; repeatable.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Benchmarks of lm-evaluation-harness, such as arc_easy,hellaswag."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with tasks of your own as yaml files.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Solved examples before each question. Default: the task's.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field or column with the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a Hugging Face data set.")] = "test",
    subset: Annotated[
        str | None, typer.Option(help="Configuration of a Hugging Face data set.")
    ] = None,
    parse_special_tokens: Annotated[
        bool,
        typer.Option(
            "--parse-special-tokens",
            help="Read the name of a special token, such as <|endoftext|>, in a text as the token.",
        ),
    ] = False,
    max_documents: Annotated[
        int, typer.Option(min=0, help="Read only the first documents (of each task); 0 for all.")
    ] = 0,
    stride: Annotated[
        int | None, typer.Option(help="Tokens that the window moves by. Default: half the window.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens in a window. Default: the model's whole context.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Windows or answers in one forward pass.")
    ] = 8,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder that sessa finetune wrote for this model.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="auto, mlx, torch; with --tasks also onnx.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="torch: cpu, cuda, mps; mlx: cpu, gpu.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type to compute in. Default: the type of the checkpoint.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure loss, perplexity and bits per byte of texts, or run benchmarks with --tasks.

    A window slides over long texts. Every token is scored exactly once. The first token of a
    document is predicted from the end token that precedes documents in training.

    Example: sessa eval runs/pydoc --data notes.txt --stride 64 --json
    """
    reading: dict[str, Any] = {
        "text_field": (text_field, "text"),
        "split": (split, "test"),
        "subset": (subset, None),
        "parse_special_tokens": (parse_special_tokens, False),
        "stride": (stride, None),
        "sequence_length": (sequence_length, None),
    }
    if tasks is not None:
        _refuse("tasks", {**reading, "data": (data, None)})
        require_harness()
        decoder = open_decoder(checkpoint, backend, device, dtype, native=False, adapter=adapter)
        scores = evaluate_tasks(
            decoder,
            ModelTokenizer.open(
                text_folder(checkpoint, adapter), decoder.config, parse_special=True
            ),
            [name.strip() for name in tasks.split(",")],
            include_path=include_path,
            num_fewshot=num_fewshot,
            max_documents=max_documents,
            batch_size=batch_size,
        )
        return _show_tasks(scores, json_output)
    if not data:
        raise SessaError("nothing to evaluate; give `data` or `tasks`")
    _refuse("data", {"include_path": (include_path, None), "num_fewshot": (num_fewshot, None)})
    backend = choose_backend(backend)
    score = framework(backend, "evaluation").evaluate(
        checkpoint,
        data,
        **{name: value for name, (value, _) in reading.items()},
        max_documents=max_documents,
        batch_size=batch_size,
        adapter=adapter,
        dtype=dtype,
        device=device,
    )
    _show(score, json_output, backend)


def _refuse(chosen: str, others: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise SessaError for an option that was given and that `chosen` does not use."""
    for name, (value, default) in others.items():
        if value != default:
            raise SessaError(f"`{name}` has no effect with `{chosen}`; leave it out")


def _show_tasks(scores: Mapping[str, TaskScores], json_output: bool) -> None:
    if json_output:
        return print_json({name: dataclasses.asdict(score) for name, score in scores.items()})
    table = Table("task", "metric", "value", "error", "examples", "documents", box=None)
    for name, score in scores.items():
        for metric, value in score.metrics.items():
            if "_stderr" in metric:
                continue
            first, comma, kind = metric.partition(",")
            error = score.metrics.get(f"{first}_stderr{comma}{kind}")
            table.add_row(
                name,
                metric,
                f"{value:.4f}",
                "" if error is None else f"{error:.4f}",
                "" if score.num_fewshot is None else str(score.num_fewshot),
                f"{score.documents:,}",
            )
    make_console().print(table)


def _show(score: Score, json_output: bool, backend: str) -> None:
    console = make_console(json_output)
    for note in score.notes:
        say(console, note)
    values: dict[str, Any] = {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "documents": score.documents,
        "skipped_rows": score.skipped_rows,
        "skipped_documents": score.skipped_documents,
        "dropped_bytes": score.dropped_bytes,
    }
    if json_output:
        return print_json({**values, "backend": backend})
    say(
        console,
        f"loss {score.loss:.4f} nats per token, perplexity {score.perplexity:.3f}, "
        f"{score.bits_per_byte:.4f} bits per byte; {score.tokens:,} tokens, {score.bytes:,} bytes, "
        f"{score.documents:,} documents; {backend}",
    )
