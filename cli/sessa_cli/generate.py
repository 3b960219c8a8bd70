"""`sessa generate`: continue text with a checkpoint or an exported model, in any runtime."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sessa_cli.common import Stopwatch, given_fields, make_console, print_json, say
from sessa_cli.terminal import for_output, read_standard_input
from sessa_common.data.formats import decode
from sessa_common.errors import SessaError
from sessa_common.fields import build
from sessa_common.frameworks import choose_backend, framework
from sessa_common.inference.generation import Decoder
from sessa_common.inference.logit_rules import LogitRules
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_common.inference.sampling import SamplingConfig
from sessa_common.inference.texts import Continuation, generate_texts
from sessa_common.input_files import read_limited
from sessa_common.json_files import read_json

LARGEST_PROMPT = 64 * 2**20


def generate(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint folder, or a folder that sessa export wrote.")
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text to continue, or - for standard input; repeatable, for a batch."),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File with the text to continue.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Largest number of tokens to write. Default: 200, or the room in the context."
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest token. Default: 0.8.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep the likeliest tokens that reach this probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens below this share of the likeliest one's.")
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Make tokens of the prompt and the text less likely; 1 is off."),
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(help="Subtract this from the logits of tokens in the text.")
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(help="Subtract this for every time that the text has a token.")
    ] = None,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(help="ID=NUMBER to add to a token's logit, -inf to forbid it; repeatable."),
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="File with a JSON schema that the text must follow.")
    ] = None,
    parse_special_tokens: Annotated[
        bool,
        typer.Option(
            "--parse-special-tokens",
            help="Read the name of a special token in a prompt as the token.",
        ),
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the sampling; the same seed gives the same text.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="auto, torch, mlx or onnx (an exported folder).")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Device of the framework, such as cpu, cuda, mps, gpu.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type to compute in. Default: the type of the checkpoint.")
    ] = None,
    native: Annotated[
        bool,
        typer.Option(
            "--native", help="onnx: use the native operator that sessa build-op compiled."
        ),
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Continue text, streaming it as it is written.

    Example: sessa generate runs/first --prompt "The list of" --max-tokens 100
    """
    sampling = build(SamplingConfig, given_fields(context.params, SamplingConfig))
    rules = read_rules(context.params)
    prompts = _prompts(prompt, prompt_file)
    decoder = _load(checkpoint, backend, device, dtype, native)
    tokenizer = ModelTokenizer.open(checkpoint, decoder.config, parse_special_tokens)
    live = not json_output and len(prompts) == 1
    # The prompt is written before its first continuation, so after the check of the request.
    unwritten = [prompts[0]] if live else []

    def write(row: int, piece: str) -> None:
        _write("".join([*unwritten, piece]))
        unwritten.clear()

    watch = Stopwatch()
    found = generate_texts(
        decoder,
        tokenizer,
        prompts,
        sampling,
        rules=rules,
        max_tokens=max_tokens,
        on_text=write if live else None,
    )
    if json_output:
        print_json(_as_json(prompts, found, watch.seconds))
    elif live:
        _write("".join([*unwritten, "\n"]))
    else:
        for number, (given, made) in enumerate(zip(prompts, found, strict=True), 1):
            _write(f"[{number}] {given}{made.text}\n")


def read_rules(params: dict[str, Any]) -> LogitRules:
    """The rules on logits that the options of a command ask for."""
    fields = given_fields(params, LogitRules)
    if "logit_bias" in fields:
        fields["logit_bias"] = dict(_bias(text) for text in fields["logit_bias"])
    if "json_schema" in fields:
        fields["json_schema"] = read_json(fields["json_schema"])
    return build(LogitRules, fields)


def _bias(text: str) -> tuple[int, float]:
    token, _, number = text.partition("=")
    try:
        return int(token), float(number)
    except ValueError:
        raise SessaError(f"`logit_bias` is {text!r}, expected ID=NUMBER, such as 17=-5") from None


def _as_json(prompts: list[str], found: list[Continuation], seconds: float) -> dict:
    rows = [
        {"prompt": prompt, **dataclasses.asdict(made)}
        for prompt, made in zip(prompts, found, strict=True)
    ]
    speed = sum(made.tokens for made in found) / seconds
    return {"texts": rows, "seconds": seconds, "tokens_per_second": speed}


def _prompts(prompt: list[str] | None, prompt_file: Path | None) -> list[str]:
    if prompt_file is not None and prompt:
        raise SessaError("give `prompt` or `prompt_file`, not both")
    if prompt_file is not None and str(prompt_file) != "-":
        return [decode(read_limited(prompt_file, LARGEST_PROMPT), str(prompt_file))]
    given = ["-"] if prompt_file is not None else prompt or [""]
    if given.count("-") > 1:
        raise SessaError("standard input ('-') can be only one of the prompts")
    return [read_standard_input() if text == "-" else text for text in given]


def _load(
    checkpoint: Path, backend: str | None, device: str | None, dtype: str | None, native: bool
) -> Decoder:
    from sessa_export.runtime import is_exported, load_decoder

    if not checkpoint.is_dir():
        raise SessaError(f"{checkpoint}: no such checkpoint folder")
    if backend == "onnx" or (backend in (None, "auto") and is_exported(checkpoint)):
        if device not in (None, "cpu"):
            raise SessaError(f"device is {device!r}; ONNX Runtime runs on the cpu here")
        if dtype is not None:
            raise SessaError("`dtype` is for a checkpoint; an exported model has its own")
        decoder: Decoder = load_decoder(checkpoint, native=native)
        _say_runtime(f"{checkpoint}: an exported model, run by ONNX Runtime")
        return decoder
    if native:
        raise SessaError("`native` is for a folder that `sessa export` wrote")
    name = choose_backend(backend)
    decoder = framework(name, "decoding").load_decoder(checkpoint, dtype=dtype, device=device)
    _say_runtime(f"{checkpoint}: a checkpoint, run by {name}")
    return decoder


def _say_runtime(text: str) -> None:
    """Print a line on stderr, so that stdout holds the generated text alone."""
    say(make_console(json_output=True), text)


def _write(text: str) -> None:
    sys.stdout.write(for_output(text))
    sys.stdout.flush()
