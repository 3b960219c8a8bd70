"""`sessa eval`: loss, perplexity and bits per byte of texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from tokenizers import Tokenizer

from sessa_cli.common import choose_backend, framework, make_console, print_json, say
from sessa_common.checkpoint.folder import load_config
from sessa_common.config import DTYPES, SessaConfig
from sessa_common.data.corpus import check_ids
from sessa_common.data.sources import ReadCounts, TextSource, read_documents
from sessa_common.data.tokenizer import (
    DroppedText,
    check_fits,
    encode_documents,
    end_token_id,
    parse_special_tokens,
    read_tokenizer,
)
from sessa_common.errors import SessaError
from sessa_common.inference.evaluation import Score, score_documents


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
    special_tokens: Annotated[
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
        str | None, typer.Option(help="Compute in another type than the checkpoint's.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Loss, perplexity and bits per byte of texts; a window slides over the long ones.

    Every token is scored exactly once, the first of a document from the end token before it.

    Example: sessa eval runs/pydoc --data notes.txt --stride 64 --json
    """
    backend = choose_backend(backend)
    if dtype is not None and dtype not in DTYPES:
        raise SessaError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    config = load_config(checkpoint)
    tokenizer = read_tokenizer(checkpoint)
    parse_special_tokens(tokenizer, special_tokens)
    check_fits(tokenizer, config, str(checkpoint))
    context = config.max_position_embeddings
    if sequence_length is not None and not 0 < sequence_length <= context:
        raise SessaError(
            f"sequence_length is {sequence_length}, expected from 1 to the model's context "
            f"of {context}"
        )
    source = TextSource(
        text_field=text_field, split=split, subset=subset, max_documents=max_documents
    )
    counts, dropped = ReadCounts(), DroppedText()
    texts = read_documents(data, source, counts)
    training = framework(backend, "training")
    model = framework(backend, "checkpoint").load_model(
        checkpoint, dtype=dtype, device=training.choose_device(device)
    )
    score = score_documents(
        training.logits_function(model),
        _documents(tokenizer, config, texts, dropped),
        start_id=_start_id(checkpoint, config),
        context=sequence_length or context,
        stride=stride,
        batch_size=batch_size,
    )
    _show(score, counts, dropped, json_output, backend)


def _documents(
    tokenizer: Tokenizer, config: SessaConfig, texts: Iterator[str], dropped: DroppedText
) -> Iterator[tuple[np.ndarray, int]]:
    for ids, size in encode_documents(tokenizer, texts, dropped):
        check_ids(ids, config, "the evaluation text")
        yield ids, size


def _start_id(folder: Path, config: SessaConfig) -> int:
    return config.eos_token_id if config.eos_token_id is not None else end_token_id(folder)


def _show(
    score: Score, counts: ReadCounts, dropped: DroppedText, json_output: bool, backend: str
) -> None:
    console = make_console(json_output)
    for note in counts.notes() + dropped.notes():
        say(console, note)
    values: dict[str, Any] = {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "documents": score.documents,
        "skipped_rows": counts.null_rows,
        "skipped_documents": counts.blank + dropped.documents,
        "dropped_bytes": dropped.bytes,
    }
    if json_output:
        return print_json({**values, "backend": backend})
    say(
        console,
        f"loss {score.loss:.4f} nats per token, perplexity {score.perplexity:.3f}, "
        f"{score.bits_per_byte:.4f} bits per byte; {score.tokens:,} tokens, {score.bytes:,} bytes, "
        f"{score.documents:,} documents; {backend}",
    )
