"""`sessa chat`: a conversation in the terminal, in any runtime."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from sessa_cli import generation_options as options
from sessa_cli.common import make_console, say
from sessa_cli.generation_options import read_rules, read_sampling, read_shortcuts
from sessa_cli.messages import name_options
from sessa_cli.runtimes import find_home
from sessa_cli.terminal import for_output
from sessa_common.checkpoint.adapters import text_folder
from sessa_common.errors import SessaError
from sessa_common.inference.chat_template import ChatTemplate, check_messages
from sessa_common.inference.conversation import Conversation
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_common.inference.prompt_cache import CacheOwner
from sessa_common.inference.prompt_cache import save_prompt_cache as write_cache
from sessa_common.inference.shortcuts import start_conversation
from sessa_common.json_files import read_json
from sessa_common.storage import write_json

HELP = """\
/help       this list
/reset      forget the conversation, but not the system message
/save FILE  write the conversation to a JSON file, for --conversation
Ctrl-C      stop the answer
Ctrl-D      end"""


def chat(
    context: typer.Context,
    checkpoint: options.Checkpoint,
    adapter: options.Adapter = None,
    system: options.System = None,
    conversation: Annotated[
        Path | None, typer.Option(help="File that /save wrote, with a conversation to go on with.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Largest number of tokens in an answer. Default: the room that is left."),
    ] = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    logit_bias: options.LogitBias = None,
    json_schema: options.JsonSchema = None,
    seed: options.Seed = None,
    prompt_cache: options.PromptCache = None,
    save_prompt_cache: options.SavePromptCache = None,
    draft_model: options.DraftModel = None,
    draft_tokens: options.DraftTokens = None,
    prompt_lookup: options.PromptLookup = None,
    backend: options.Backend = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    native: options.Native = False,
    no_graphs: options.NoGraphs = False,
) -> None:
    """Talk with a model; /help lists what can be typed.

    Example: sessa chat runs/first --system "You are brief."
    """
    sampling, rules = read_sampling(context.params), read_rules(context.params)
    shortcuts = read_shortcuts(context.params)
    before = [] if conversation is None else _read(conversation)
    home = find_home(checkpoint, backend, device, dtype, native, no_graphs, adapter)
    decoder = home.open(checkpoint)
    texts = text_folder(checkpoint, adapter)
    tokenizer = ModelTokenizer.open(texts, decoder.config)
    begun = start_conversation(shortcuts, decoder, tokenizer, home)
    talk = Conversation(
        begun.decoder,
        tokenizer,
        ChatTemplate.open(texts),
        sampling,
        rules=rules,
        max_tokens=max_tokens,
        system=system,
        cached=begun.prompts[0][: begun.cached],
    )
    talk.restore(before)
    if talk.template.source is None:
        _tell("the model has no chat template; it continues a plain record of the conversation")
    _tell("/help lists what can be typed, Ctrl-D ends")
    for line in _lines():
        if line.startswith("/"):
            _obey(talk, line)
        elif line:
            _answer(talk, line)
    if begun.acceptance is not None:
        _tell(str(begun.acceptance))
    if begun.owner is not None and save_prompt_cache is not None:
        _save_cache(talk, save_prompt_cache, begun.owner)


def _save_cache(talk: Conversation, path: Path, owner: CacheOwner) -> None:
    if ids := talk.cached[: talk.decoder.length]:
        write_cache(path, talk.decoder, ids, owner)
        _tell(f"the cache of {len(ids)} tokens is in {path}")
    else:
        _tell(f"nothing was said, so {path} was not written")


def _lines() -> Iterator[str]:
    """Yield what is typed, line after line; Ctrl-C begins the line again."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (edits lines and recalls them)
    while True:
        try:
            yield (input("> ") if interactive else _read_line()).strip()
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            print()
            _tell("Ctrl-D ends")


def _read_line() -> str:
    if not (line := sys.stdin.readline()):
        raise EOFError
    return line


def _answer(talk: Conversation, text: str) -> None:
    dropped = talk.dropped
    try:
        with _interrupts() as is_stopped:
            for piece in talk.reply(text, is_stopped):
                sys.stdout.write(for_output(piece))
                sys.stdout.flush()
            stopped = is_stopped()
        sys.stdout.write("\n")
        sys.stdout.flush()
        if stopped:
            _tell("stopped")
        if talk.dropped > dropped:
            _tell(f"the context is full: the oldest {talk.dropped} messages are left out")
    except KeyboardInterrupt:
        print()
        _tell("stopped")
    except SessaError as error:
        _tell(f"error: {name_options(str(error), {})}")


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Note the first Ctrl-C instead of raising it, because a step must not end half-way."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped.is_set
        return

    def note(number: int, frame: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stopped.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _obey(talk: Conversation, line: str) -> None:
    command, _, rest = line.partition(" ")
    if command == "/help":
        _tell(HELP)
    elif command == "/reset":
        talk.reset()
        _tell("the conversation begins anew")
    elif command == "/save":
        _save(talk, rest.strip())
    else:
        _tell(f"{command} is no command; /help lists them")


def _save(talk: Conversation, name: str) -> None:
    if not name:
        _tell("/save needs the name of a file")
        return
    path = Path(name).expanduser()
    try:
        write_json(path, {"messages": talk.messages})
        _tell(f"{len(talk.messages)} messages in {path}")
    except OSError as error:
        _tell(f"{path}: cannot be written ({error.strerror or error})")


def _read(path: Path) -> list:
    return check_messages(read_json(path).get("messages"), str(path))


def _tell(text: str) -> None:
    say(make_console(json_output=True), text)
