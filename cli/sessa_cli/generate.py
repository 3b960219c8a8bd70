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
from sessa_cli.generation_options import read_rules, read_sampling, read_shortcuts
from sessa_cli.runtimes import find_home, say_aside
from sessa_cli.terminal import for_output, read_standard_input
from sessa_common.checkpoint.adapters import text_folder
from sessa_common.data.formats import decode
from sessa_common.errors import SessaError
from sessa_common.inference.chat_template import ChatTemplate, with_system
from sessa_common.inference.logit_rules import prepare_rules
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_common.inference.prompt_cache import cache_owner
from sessa_common.inference.shortcuts import Start, start
from sessa_common.inference.speculation import Acceptance
from sessa_common.inference.texts import BATCH_SIZE, Continuation, TextWriter
from sessa_common.input_files import read_limited

LARGEST_PROMPT = 64 * 2**20


def generate(
    context: typer.Context,
    checkpoint: options.Checkpoint,
    adapter: options.Adapter = None,
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
    no_graphs: options.NoGraphs = False,
    prompt_cache: options.PromptCache = None,
    save_prompt_cache: options.SavePromptCache = None,
    draft_model: options.DraftModel = None,
    draft_tokens: options.DraftTokens = None,
    prompt_lookup: options.PromptLookup = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --output.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Continue text, streaming it as it is written. --system asks for --chat.

    Example: sessa generate runs/first --prompt "The list of" --max-tokens 100
    """
    sampling, rules = read_sampling(context.params), read_rules(context.params)
    shortcuts = read_shortcuts(context.params)
    if file is not None and (prompt or prompt_file):
        raise SessaError("give `file`, or `prompt` and `prompt_file`, not both")
    lines = open_lines(file, output, force)
    prompts = [] if lines is not None else _prompts(prompt, prompt_file)
    home = find_home(checkpoint, backend, device, dtype, native, no_graphs, adapter)
    decoder = home.open(checkpoint)
    texts = text_folder(checkpoint, adapter)
    tokenizer = ModelTokenizer.open(texts, decoder.config, parse_special_tokens)
    template = ChatTemplate.open(texts)
    chat = chat or system is not None
    if chat:
        said = [with_system([{"role": "user", "content": text}], system) for text in prompts]
        asked = [template.encode(tokenizer, messages) for messages in said]
    prepared = prepare_rules(rules, tokenizer)  # refused before a prompt cache is written
    begun = start(shortcuts, decoder, tokenizer, asked if chat else prompts, home, max_tokens)
    for note in begun.notes:
        say_aside(note)
    writer = TextWriter(
        begun.decoder,
        tokenizer,
        sampling,
        rules=prepared,
        max_tokens=max_tokens,
        batch_size=begun.batch_size or batch_size,
        stop_texts=template.stop_texts if chat else (),
    )
    if lines is not None:
        fields = {"template": template, "chat": chat, "system": system}
        owner = cache_owner(checkpoint, decoder.config, tokenizer.tokenizer, home.files(checkpoint))
        write_lines(writer, lines, json_output, model=str(owner), **fields)
    else:
        before = [""] * len(prompts) if chat else prompts
        _write_texts(writer, before, prompts, begun, json_output)
    if begun.acceptance is not None:
        say_aside(str(begun.acceptance))


def _write_texts(
    writer: TextWriter,
    before: list[str],  # what is shown before each text
    prompts: list[str],
    begun: Start,
    json_output: bool,
) -> None:
    live = not json_output and len(prompts) == 1
    # The prompt is written before its first continuation, so after the check of the request.
    unwritten = [before[0]] if live else []

    def write(row: int, piece: str) -> None:
        _write("".join([*unwritten, piece]))
        unwritten.clear()

    watch = Stopwatch()
    on_text = write if live else None
    ended = dict(writer.write(begun.prompts, cached=begun.cached, on_text=on_text))
    found = [ended[row] for row in range(len(prompts))]
    if json_output:
        print_json(_as_json(prompts, found, watch.seconds, begun.acceptance))
    elif live:
        _write("".join([*unwritten, "\n"]))
    else:
        for number, (given, made) in enumerate(zip(before, found, strict=True), 1):
            _write(f"[{number}] {given}{made.text}\n")


def _as_json(
    prompts: list[str], found: list[Continuation], seconds: float, acceptance: Acceptance | None
) -> dict[str, Any]:
    rows = [
        {"prompt": prompt, **dataclasses.asdict(made)}
        for prompt, made in zip(prompts, found, strict=True)
    ]
    speed = sum(made.tokens for made in found) / seconds
    answer = {"texts": rows, "seconds": seconds, "tokens_per_second": speed}
    if acceptance is not None:
        counts = dataclasses.asdict(acceptance)
        answer["speculation"] = {**counts, "acceptance_rate": acceptance.rate}
    return answer


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
