"""`sessa eval`: measure loss, perplexity and bits per byte of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sessa_cli.common import make_console, print_json, say
from sessa_common.frameworks import choose_backend, framework
from sessa_common.inference.evaluation import Score


# Named eval on the command line; the function's name leaves Python's eval alone.
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.", show_default=False)],
    data: Annotated[
        list[str], typer.Option("--data", help="Text as in `sessa train`; repeatable.")
    ],
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
        int, typer.Option(min=0, help="Read only the first documents; 0 for all.")
    ] = 0,
    stride: Annotated[
        int | None, typer.Option(help="Tokens that the window moves by. Default: half the window.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens in a window. Default: the model's whole context.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in one forward pass.")] = 8,
    backend: Annotated[str | None, typer.Option(help="auto, mlx or torch.")] = None,
    device: Annotated[
        str | None, typer.Option(help="torch: cpu, cuda, mps; mlx: cpu, gpu.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type to compute in. Default: the type of the checkpoint.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure loss, perplexity and bits per byte of texts; a window slides over the long ones.

    Every token is scored exactly once. The first token of a document is predicted from the end
    token that precedes documents in training.

    Example: sessa eval runs/pydoc --data notes.txt --stride 64 --json
    """
    backend = choose_backend(backend)
    score = framework(backend, "evaluation").evaluate(
        checkpoint,
        data,
        text_field=text_field,
        split=split,
        subset=subset,
        max_documents=max_documents,
        parse_special_tokens=parse_special_tokens,
        sequence_length=sequence_length,
        stride=stride,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
    )
    _show(score, json_output, backend)


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
