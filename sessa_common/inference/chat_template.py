"""Chat templates: a conversation as the text that the model was trained to continue."""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sessa_common.errors import SessaError
from sessa_common.extras import install
from sessa_common.inference.model_tokenizer import ModelTokenizer, encode_prompt
from sessa_common.input_files import read_limited
from sessa_common.json_files import read_json

INSTALL = install("chat")
LARGEST_TEMPLATE = 2**20
# The template that fine-tuning gives to a model without one.
DEFAULT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'user' %}{{ 'User: ' + message.content | trim + '\\n' }}
{%- elif message.role == 'assistant' -%}
{{ 'Assistant: ' + message.content | trim + eos_token + '\\n' }}
{%- else %}{{ message.content | trim + '\\n' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif -%}
"""
# Characters that Unicode reserves for the inside of programs; they mark answers in a rendered text.
BEGIN, END = "\ufdd0", "\ufdd1"
MARKS_ANSWERS = re.compile(r"{%[-+]?\s*generation\b")

ROLES = ("system", "user", "assistant")

Message = Mapping[str, str]


@dataclass(frozen=True)
class ChatTemplate:
    """A template in Jinja, as tokenizers of transformers bring it; None is the plain template.

    `tokens` are the names of special tokens that the template may use, such as eos_token.
    """

    source: str | None = None
    tokens: Mapping[str, str] = field(default_factory=dict)
    where: str = "the chat template"

    @classmethod
    def open(cls, folder: Path | None) -> ChatTemplate:
        """Read chat_template.jinja of a folder, else the template in its tokenizer_config.json.

        A folder without either has the plain template. Raises SessaError for files that cannot be
        read.
        """
        if folder is None:
            return cls()
        path, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        given = read_json(settings) if settings.is_file() else {}
        if path.is_file():
            source = read_limited(path, LARGEST_TEMPLATE).decode("utf-8", errors="replace")
            return cls(source, _token_names(given), str(path))
        return cls(_template_of(given, settings), _token_names(given), str(settings))

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Texts that end an answer; with a Jinja template its end token does."""
        return () if self.source is not None else ("\nUser:",)

    def render(self, messages: Sequence[Message]) -> str:
        """Return the conversation and the beginning of the next answer.

        A message has a `role` ("system", "user" or "assistant") and its `content`. Raises
        SessaError when the template fails or refuses the conversation.
        """
        return self._render(messages, prompt=True)

    def answers(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """Return a conversation as text, and the range of characters of each answer in it.

        A range ends with whatever the template writes behind the answer, such as an end token.
        Tags {% generation %} in the template say where answers are; without them a conversation up
        to an answer is compared with one that includes it. Raises SessaError as `render` does, and
        when the template writes an earlier answer otherwise than a last one.
        """
        if self.source is not None and MARKS_ANSWERS.search(self.source):
            return _marked(self._render(messages, marks=True), self.where)
        whole = self._render(messages)
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        ranges = []
        for i in places:
            before, after = self._render(messages[:i], prompt=True), self._render(messages[: i + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise SessaError(
                    f"{self.where}: the chat template writes answer {i + 1} of {len(messages)} "
                    "otherwise when more follows, so its place is unknown; mark answers in the "
                    "template with {% generation %}, split the conversation, or set `loss_on` to "
                    "all"
                )
            ranges.append((len(before), len(after)))
        return whole, ranges

    def _render(
        self, messages: Sequence[Message], *, prompt: bool = False, marks: bool = False
    ) -> str:
        if self.source is None:
            return _plain(messages, prompt)
        try:
            template = _compiled(self.source, marks)
            return template.render(
                **self.tokens, messages=[dict(m) for m in messages], add_generation_prompt=prompt
            )
        except SessaError:
            raise
        except Exception as error:  # a template is a program, and fails in any way that one can
            raise SessaError(f"{self.where}: the chat template failed ({error})") from None

    def encode(self, tokenizer: ModelTokenizer, messages: Sequence[Message]) -> list[int]:
        """Token ids of `render`; a Jinja template's names of special tokens become the tokens."""
        text = self.render(messages)
        if self.source is None:
            return tokenizer.encode(text)
        plain = tokenizer.tokenizer.encode_special_tokens
        tokenizer.tokenizer.encode_special_tokens = False
        try:
            return encode_prompt(tokenizer.tokenizer, text, tokenizer.config)
        finally:
            tokenizer.tokenizer.encode_special_tokens = plain


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """Return messages behind a system message, if one is given."""
    before: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*before, *messages]


def check_messages(given: Any, where: str) -> list[Message]:
    """Return the messages of a conversation; SessaError unless each has a role and a content."""
    ok = isinstance(given, list) and len(given) > 0
    for message in given if ok else ():
        known = isinstance(message, dict) and message.get("role") in ROLES
        ok = ok and known and isinstance(message.get("content"), str)
    if not ok:
        raise SessaError(
            f'{where}: expected "messages", a list of objects with "role" ({", ".join(ROLES)}) '
            'and "content", a text'
        )
    return list(given)


def _plain(messages: Sequence[Message], prompt: bool) -> str:
    names = {"user": "User: ", "assistant": "Assistant: "}
    said = [names.get(m["role"], "") + m["content"].strip() for m in messages]
    return "\n".join([*said, *["Assistant:"] * prompt])


def _marked(text: str, where: str) -> tuple[str, list[tuple[int, int]]]:
    """Take the marks out of a text; the text and the ranges that they enclosed."""
    pieces = re.split(f"([{BEGIN}{END}])", text)
    if pieces[1::2] != [BEGIN, END] * (len(pieces) // 4):
        raise SessaError(f"{where}: tags {{% generation %}} inside another, or reserved characters")
    lengths = list(itertools.accumulate(map(len, pieces[::2])))
    ends = [(lengths[i], lengths[i + 1]) for i in range(0, len(lengths) - 1, 2)]
    return "".join(pieces[::2]), ends


def _template_of(settings: Mapping[str, Any], path: Path) -> str | None:
    """The template in a tokenizer_config.json: a text, or the one named "default" of a list."""
    given = settings.get("chat_template")
    if isinstance(given, list):
        named = {item.get("name"): item.get("template") for item in given if isinstance(item, dict)}
        given = named.get("default")
    if not isinstance(given, str | None):
        raise SessaError(f"{path}: chat_template is a {type(given).__name__}, expected a text")
    return given


def _token_names(settings: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        given = settings.get(name)
        given = given.get("content") if isinstance(given, dict) else given
        if isinstance(given, str):
            found[name] = given
    return found


@functools.lru_cache(maxsize=8)
def _compiled(source: str, marks: bool) -> Any:
    return _environment(marks).from_string(source)


def _environment(marks: bool) -> Any:
    """Jinja's sandbox, with the settings and functions that templates of transformers expect.

    With `marks` the tag {% generation %} puts BEGIN and END around an answer.
    """
    try:
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise SessaError(
            f"the model's chat template needs the package jinja2, which is not installed; {INSTALL}"
        ) from None

    class Generation(Extension):
        """The tag {% generation %}, which stands around answers."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (BEGIN, END))
            return [begin, *inside, end] if marks else inside

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=_now)
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise SessaError(f"the chat template refuses this conversation: {message}")


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
