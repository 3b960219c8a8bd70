"""`sessa generate`: text from a checkpoint folder or an exported one, in any runtime."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from tokenizers import Tokenizer

from sessa_cli.common import choose_backend, framework, given_fields, print_json
from sessa_common.config import SessaConfig
from sessa_common.data.tokenizer import check_fits, parse_special_tokens, read_tokenizer
from sessa_common.errors import SessaError
from sessa_common.inference import generation
from sessa_common.inference.generation import Decoder, TextStream, encode_prompt, stop_tokens
from sessa_common.inference.sampling import SamplingConfig


def generate(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint folder, or a folder that sessa export wrote.")
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text to continue, '-' for standard input; several make a batch."),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File with the text to continue.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Most tokens to write; 200, or what the context has room for."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest token; 0.8 by default.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep the likeliest tokens that reach this probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens below this share of the likeliest one's.")
    ] = None,
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--parse-special-tokens",
            help="Read the name of a special token in a prompt as the token.",
        ),
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="auto, torch, mlx or onnx (an exported folder).")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Device of the framework, such as cpu, cuda, mps, gpu.")
    ] = None,
    native: Annotated[
        bool, typer.Option("--native", help="onnx: use the operator that sessa build-op made.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Continue text, streaming it as it is written.

    Example: sessa generate runs/first --prompt "The list of" --max-tokens 100
    """
    sampling = SamplingConfig(**given_fields(context.params, SamplingConfig))
    prompts = _prompts(prompt, prompt_file)
    decoder, tokenizer = _load(checkpoint, backend, device, native)
    parse_special_tokens(tokenizer, special_tokens)
    ids = [encode_prompt(tokenizer, text, decoder.config) for text in prompts]
    stop = stop_tokens(checkpoint, decoder.config)
    started = time.perf_counter()
    steps = generation.generate(decoder, ids, sampling, max_tokens=max_tokens, stop=stop)
    live = not json_output and len(prompts) == 1
    if live:
        _write(prompts[0])
    texts, counts = _collect(steps, tokenizer, ids, live)
    seconds = time.perf_counter() - started
    if json_output:
        rows = [{"prompt": p, "text": t, "tokens": n}
                for p, t, n in zip(prompts, texts, counts, strict=True)]  # fmt: skip
        print_json({"texts": rows, "seconds": seconds, "tokens_per_second": sum(counts) / seconds})
    elif live:
        _write("\n")
    else:
        for number, (given, text) in enumerate(zip(prompts, texts, strict=True), 1):
            _write(f"[{number}] {given}{text}\n")


def _prompts(prompt: list[str] | None, prompt_file: Path | None) -> list[str]:
    if prompt_file is not None and prompt:
        raise SessaError("give --prompt or --prompt-file, not both")
    if prompt_file is not None and str(prompt_file) != "-":
        try:
            return [prompt_file.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise SessaError(f"{prompt_file}: not a readable UTF-8 text file ({error})") from None
    given = ["-"] if prompt_file is not None else prompt or [""]
    if given.count("-") > 1:
        raise SessaError("standard input ('-') can be only one of the prompts")
    return [sys.stdin.read() if text == "-" else text for text in given]


def _load(
    checkpoint: Path, backend: str | None, device: str | None, native: bool
) -> tuple[Decoder, Tokenizer]:
    from sessa_export.runtime import find_model, load_decoder

    if not checkpoint.is_dir():
        raise SessaError(f"{checkpoint}: no such checkpoint folder")
    tokenizer = read_tokenizer(checkpoint)
    exported = find_model(checkpoint) is not None
    decoder: Decoder
    if backend == "onnx" or (backend in (None, "auto") and exported):
        if device not in (None, "cpu"):
            raise SessaError(f"device is {device!r}; ONNX Runtime runs on the cpu here")
        decoder = load_decoder(checkpoint, native=native)
    elif native:
        raise SessaError("--native is for a folder that `sessa export` wrote")
    else:
        twin = framework(choose_backend(backend), "decoding")
        decoder = twin.load_decoder(checkpoint, device=device)
    config: SessaConfig = decoder.config
    check_fits(tokenizer, config, str(checkpoint))
    return decoder, tokenizer


def _collect(
    steps: Iterator[list[int | None]], tokenizer: Tokenizer, prompts: list[list[int]], live: bool
) -> tuple[list[str], list[int]]:
    """Drain the generator into a text and a count a row; `live` writes pieces as they come."""
    streams = [TextStream(tokenizer, prompt) for prompt in prompts]
    texts, counts = [""] * len(prompts), [0] * len(prompts)
    for step in steps:
        for row, token in enumerate(step):
            if token is not None:
                piece = streams[row].push(token)
                texts[row] += piece
                counts[row] += 1
                if live:
                    _write(piece)
    for row, stream in enumerate(streams):
        piece = stream.finish()
        texts[row] += piece
        if live:
            _write(piece)
    return texts, counts


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
