"""`sessa generate`: continue text with a checkpoint or an exported model, in any runtime."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sessa_cli import generation_options as options
from sessa_cli.common import Stopwatch, print_json
from sessa_cli.generate_file import open_lines, write_lines
from sessa_cli.generation_options import read_rules, read_sampling
from sessa_cli.runtimes import open_decoder
from sessa_cli.terminal import for_output, read_standard_input
from sessa_common.data.formats import decode
from sessa_common.errors import SessaError
from sessa_common.inference.chat_template import ChatTemplate, with_system
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_common.inference.texts import BATCH_SIZE, Continuation, TextWriter
from sessa_common.input_files import read_limited

LARGEST_PROMPT = 64 * 2**20


def generate(
    context: typer.Context,
    checkpoint: options.Checkpoint,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text to continue, or - for standard input; repeatable, for a batch."),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File with the text to continue.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help='File of JSON lines, each with a "prompt" or "messages", for --output.'),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="With --file: file for its lines with their texts; resumed if stopped."),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Answer each prompt, by the model's chat template."),
    ] = False,
    system: options.System = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Largest number of tokens to write. Default: 200, or the room in the context."
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Largest number of prompts that run at once.")
    ] = BATCH_SIZE,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    logit_bias: options.LogitBias = None,
    json_schema: options.JsonSchema = None,
    parse_special_tokens: Annotated[
        bool,
        typer.Option(
            "--parse-special-tokens",
            help="Read the name of a special token in a prompt as the token.",
        ),
    ] = False,
    seed: options.Seed = None,
    backend: options.Backend = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    native: options.Native = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --output.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Continue text, streaming it as it is written. --system asks for --chat.

    Example: sessa generate runs/first --prompt "The list of" --max-tokens 100
    """
    sampling, rules = read_sampling(context.params), read_rules(context.params)
    if file is not None and (prompt or prompt_file):
        raise SessaError("give `file`, or `prompt` and `prompt_file`, not both")
    lines = open_lines(file, output, force)
    prompts = [] if lines is not None else _prompts(prompt, prompt_file)
    decoder = open_decoder(checkpoint, backend, device, dtype, native)
    tokenizer = ModelTokenizer.open(checkpoint, decoder.config, parse_special_tokens)
    template = ChatTemplate.open(checkpoint)
    chat = chat or system is not None
    writer = TextWriter(
        decoder,
        tokenizer,
        sampling,
        rules=rules,
        max_tokens=max_tokens,
        batch_size=batch_size,
        stop_texts=template.stop_texts if chat else (),
    )
    if lines is not None:
        asked = {"template": template, "chat": chat, "system": system}
        write_lines(writer, lines, json_output, model=str(checkpoint.resolve()), **asked)
    elif chat:
        said = [with_system([{"role": "user", "content": text}], system) for text in prompts]
        ids = [template.encode(tokenizer, messages) for messages in said]
        _write_texts(writer, [""] * len(prompts), prompts, ids, json_output)
    else:
        ids = [tokenizer.encode(text) for text in prompts]
        _write_texts(writer, prompts, prompts, ids, json_output)


def _write_texts(
    writer: TextWriter,
    before: list[str],  # what is shown before each text
    prompts: list[str],
    ids: list[list[int]],
    json_output: bool,
) -> None:
    live = not json_output and len(prompts) == 1
    # The prompt is written before its first continuation, so after the check of the request.
    unwritten = [before[0]] if live else []

    def write(row: int, piece: str) -> None:
        _write("".join([*unwritten, piece]))
        unwritten.clear()

    watch = Stopwatch()
    ended = dict(writer.write(ids, on_text=write if live else None))
    found = [ended[row] for row in range(len(prompts))]
    if json_output:
        print_json(_as_json(prompts, found, watch.seconds))
    elif live:
        _write("".join([*unwritten, "\n"]))
    else:
        for number, (given, made) in enumerate(zip(before, found, strict=True), 1):
            _write(f"[{number}] {given}{made.text}\n")


def _as_json(prompts: list[str], found: list[Continuation], seconds: float) -> dict[str, Any]:
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


def _write(text: str) -> None:
    sys.stdout.write(for_output(text))
    sys.stdout.flush()
