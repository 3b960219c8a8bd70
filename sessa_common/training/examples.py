"""Examples to fine-tune on: conversations, and prompts with completions, in JSON lines.

The rows are those of mlx-lm and TRL: {"messages": [...]}, or {"prompt": ..., "completion": ...}
with texts or with lists of messages. A text prompt is continued as it is; messages become text by
the chat template of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sessa_common.data.corpus import Tell, told
from sessa_common.data.encoding import encode_with_offsets
from sessa_common.data.formats import format_of, read_json_lines
from sessa_common.data.sources import HUB_PREFIX, STANDARD_INPUT, find_files, split_weights
from sessa_common.data.token_shards import is_token_folder
from sessa_common.errors import SessaError, check_text
from sessa_common.inference.chat_template import ChatTemplate, Message, check_messages
from sessa_common.inference.model_tokenizer import ModelTokenizer

EXPECTED = '"messages", "prompt" and "completion", or "text"'
KINDS = ("messages", "prompt", "text")


@dataclass(frozen=True)
class Example:
    """Token ids int32 (n,), and True where the loss counts the token, bool (n,).

    In a row of several examples `starts` int32 (n,) is the first position of each token's example.
    """

    tokens: np.ndarray
    counted: np.ndarray
    starts: np.ndarray | None = None


@dataclass(frozen=True)
class _Written:
    """An example as text: `answers` are ranges of characters, `ends` asks for the end token."""

    text: str
    answers: Sequence[tuple[int, int]]
    ends: bool
    where: str


def has_examples(names: Sequence[str], text_field: str) -> bool:
    """Return True when the named files have conversations or prompts, and False for texts.

    The first row of each .jsonl file decides. Raises SessaError for rows of another kind, and when
    some files have examples and others texts.
    """
    kinds: dict[str, Path | str] = {}
    for name in split_weights(names)[0]:
        if (
            name in ("pydoc", STANDARD_INPUT)
            or name.startswith(HUB_PREFIX)
            or is_token_folder(name)
        ):
            kinds["text"] = name
        else:
            kinds |= {_kind_of_file(path, text_field): path for path in find_files(name)}
    examples = {kind: path for kind, path in kinds.items() if kind != "text"}
    if examples and "text" in kinds:
        path = next(iter(examples.values()))
        raise SessaError(
            f"{path} has conversations and {kinds['text']} has texts; train on one kind at a time"
        )
    return bool(examples)


def _kind_of_file(path: Path, text_field: str) -> str:
    if format_of(path) != ".jsonl":
        return "text"
    for row, where in read_json_lines(path):
        return _kind_of_row(row, where, text_field)
    raise SessaError(f"{path}: no row in it; expected JSON objects with {EXPECTED}")


def _kind_of_row(row: Mapping[str, Any], where: str, text_field: str = "text") -> str:
    if text_field in row and text_field != "text":
        return "text"
    for kind in KINDS:
        if kind in row:
            return kind
    raise SessaError(f"{where}: expected {EXPECTED}; it has {', '.join(row) or 'nothing'}")


def read_examples(
    names: Sequence[str],
    tokenizer: ModelTokenizer,
    template: ChatTemplate,
    loss_on: str,
    end_id: int,
    tell: Tell,
) -> tuple[list[Example], bool]:
    """Read every example of the named .jsonl files; the second result says if any has messages.

    `loss_on` is "answers" or "all", `end_id` ends a completion. Raises SessaError with file and
    line for a row that is no example, and for messages that the template refuses.
    """
    written = [
        _write(row, where, template)
        for name in names
        for path in find_files(name)
        for row, where in read_json_lines(path)
    ]
    plain = tokenizer.tokenizer.encode_special_tokens
    begin = tokenizer.prefix_ids
    examples = []
    # The names of special tokens that a template writes are the tokens; others stay plain text.
    for from_template in (True, False):
        group = [item for item in written if item.ends is not from_template]
        tokenizer.tokenizer.encode_special_tokens = plain and not from_template
        texts = told((item.text for item in group), "tokenizing the examples", tell)
        encoded = encode_with_offsets(tokenizer.tokenizer, texts)
        for item, (ids, places) in zip(group, encoded, strict=True):
            example = _example(item, ids, places, loss_on)
            # A template writes the tokens that begin and end a text; a plain prompt has none.
            examples.append(_enclosed(example, begin, end_id) if item.ends else example)
    tokenizer.tokenizer.encode_special_tokens = plain
    return examples, any(not item.ends for item in written)


def _write(row: Mapping[str, Any], where: str, template: ChatTemplate) -> _Written:
    kind = _kind_of_row(row, where)
    if kind == "text":
        raise SessaError(
            f'{where}: has "text", but earlier rows are conversations or prompts; train on one '
            "kind at a time"
        )
    if row.get("tools"):
        raise SessaError(f'{where}: has "tools", which chat templates do not get here')
    if kind == "messages":
        return _conversation(check_messages(row["messages"], where), 0, where, template)
    prompt, completion = row["prompt"], row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return _completion(prompt, completion, where)
    if isinstance(prompt, list) and isinstance(completion, list):
        parts = [check_messages(part, where) for part in (prompt, completion)]
        return _conversation([*parts[0], *parts[1]], len(parts[0]), where, template)
    raise SessaError(f'{where}: "prompt" and "completion" must both be texts, or lists of messages')


def _completion(prompt: str, completion: str, where: str) -> _Written:
    if not completion:
        raise SessaError(f'{where}: the "completion" is empty, so there is nothing to learn')
    text = check_text(prompt + completion, where)
    return _Written(text, [(len(prompt), len(text))], True, where)


def _conversation(
    messages: Sequence[Message], first: int, where: str, template: ChatTemplate
) -> _Written:
    """Write messages as text; only the answers from message number `first` on count."""
    for message in messages:
        check_text(message["content"], where)
    before, after = (
        sum(message["role"] == "assistant" for message in part)
        for part in (messages[:first], messages[first:])
    )
    if not after:
        raise SessaError(f"{where}: no message of the assistant, so there is nothing to learn")
    try:
        text, answers = template.answers(messages)
    except SessaError as error:
        raise SessaError(f"{where}: {error}") from None
    if len(answers) != before + after:
        raise SessaError(
            f"{where}: {template.where} marks {len(answers)} answers of {before + after}"
        )
    return _Written(text, answers[before:], False, where)


def _example(item: _Written, ids: np.ndarray, places: np.ndarray, loss_on: str) -> Example:
    counted = np.full(len(ids), loss_on == "all")
    for first, last in item.answers:
        # A token that begins before the answer is not drawn when the model answers.
        counted |= (places[:, 0] >= first) & (places[:, 1] <= last) & (places[:, 1] > first)
    return Example(ids, counted)


def _enclosed(example: Example, begin: Sequence[int], end: int) -> Example:
    """An example between the ids that begin a text and the one that ends it, which counts."""
    tokens = np.concatenate([np.array(begin, np.int32), example.tokens, [np.int32(end)]])
    return Example(tokens, np.concatenate([np.zeros(len(begin), bool), example.counted, [True]]))
