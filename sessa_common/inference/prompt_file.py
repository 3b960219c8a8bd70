"""Continuation of every prompt in a file of JSON lines, which can be stopped and resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sessa_common.errors import SessaError
from sessa_common.inference.chat_template import ChatTemplate, check_messages, with_system
from sessa_common.inference.generation import token_budget
from sessa_common.inference.texts import TextWriter
from sessa_common.input_files import read_limited
from sessa_common.json_files import parse_json
from sessa_common.storage import atomic_path

LARGEST_FILE = 256 * 2**20
# Batches between two writes: enough to sort by length, few enough to lose little at a kill.
BATCHES_PER_WRITE = 8

Record = dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """Texts that are finished, of how many, and the tokens that were written for them."""

    done: int
    total: int
    tokens: int


@dataclass(frozen=True)
class PromptFile:
    """The lines of a file, read and checked, and the file for the same lines with their texts."""

    places: list[str]
    records: list[Record]
    target: Path
    digest: str

    @property
    def partial(self) -> Path:
        """The file that holds the finished lines until all are."""
        return self.target.with_name(self.target.name + ".partial")

    @classmethod
    def open(cls, source: Path, target: Path, *, force: bool = False) -> PromptFile:
        """Read a file; SessaError for a bad line, and for a target that exists unless `force`."""
        if target.exists() and not force:
            raise SessaError(f"{target} is there already; name another file, or give `force`")
        if not target.parent.is_dir():
            raise SessaError(f"{target.parent}: no such folder")
        content = read_limited(source, LARGEST_FILE)
        places, records = zip(*read_records(content, source), strict=True)
        return cls(list(places), list(records), target, hashlib.sha256(content).hexdigest())

    def complete(
        self,
        writer: TextWriter,
        *,
        template: ChatTemplate,
        chat: bool = False,
        system: str | None = None,
        model: str = "",
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Progress:
        """Continue each line's `prompt`, or its `messages`, and write the lines with their texts.

        The lines of the target are those of the source, in their order, with `text`, `tokens` and
        `finish` added. `chat` makes a prompt what a user says, after `system` if given; messages
        are a conversation in any case. Line r draws from the random stream (seed, r). Finished
        lines are kept in a file beside the target, and after a stop the same call goes on behind
        them; `model` names the model for which they were made. The target appears whole. Raises
        SessaError, before the model runs, that names the line of a prompt that cannot be continued.
        """
        prompts = [
            _encode(writer, record, where, template, chat, system)
            for where, record in zip(self.places, self.records, strict=True)
        ]
        budget = _budget(writer, prompts, self.places)
        settings = (self.digest, template.source, chat, system, model)
        journal = _Journal(self.target, self.partial, _fingerprint(writer, settings))
        done, tokens = journal.open(), 0
        size = BATCHES_PER_WRITE * writer.batch_size
        for start in range(done, len(prompts), size):
            part = prompts[start : start + size]
            lines = [dict(record) for record in self.records[start : start + size]]
            for row, made in writer.write(part, first=start, budget=budget):
                done, tokens = done + 1, tokens + made.tokens
                lines[row].update(dataclasses.asdict(made))
                if on_progress is not None:
                    on_progress(Progress(done, len(prompts), tokens))
            journal.add(lines)
        journal.finish()
        return Progress(done, len(prompts), tokens)


def read_records(content: bytes, source: Path) -> list[tuple[str, Record]]:
    """Return place and object of each line of a file of JSON lines; empty lines are skipped.

    Each has a `prompt` or `messages`. Raises SessaError that names the file and the line.
    """
    records = []
    for number, line in enumerate(content.split(b"\n"), 1):
        where = f"{source}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise SessaError(f"{where}: not UTF-8 text ({error.reason})") from None
        if text:
            records.append((where, _record(text, where)))
    if not records:
        raise SessaError(f"{source}: the file has no prompts")
    return records


def _record(text: str, where: str) -> Record:
    try:
        given = parse_json(text)
    except ValueError as error:
        raise SessaError(f"{where}: not readable JSON ({error})") from None
    if not isinstance(given, dict):
        raise SessaError(f"{where}: expected an object, found {type(given).__name__}")
    if isinstance(given.get("prompt"), str) == ("messages" in given):
        raise SessaError(f'{where}: expected a "prompt" that is a text, or "messages"')
    if "messages" in given:
        check_messages(given["messages"], where)
    record: Record = given
    return record


def _encode(
    writer: TextWriter,
    record: Record,
    where: str,
    template: ChatTemplate,
    chat: bool,
    system: str | None,
) -> list[int]:
    try:
        if "messages" not in record and not chat:
            return writer.tokenizer.encode(record["prompt"])
        said = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
        return template.encode(writer.tokenizer, with_system(said, system))
    except SessaError as error:
        raise SessaError(f"{where}: {error}") from None


def _budget(writer: TextWriter, prompts: Sequence[Sequence[int]], places: Sequence[str]) -> int:
    """The number of tokens that every text may have: what the longest prompt leaves room for."""
    longest = max(range(len(prompts)), key=lambda row: len(prompts[row]))
    try:
        return token_budget(writer.decoder.config, len(prompts[longest]), writer.max_tokens)
    except SessaError as error:
        raise SessaError(f"{places[longest]}: {error}") from None


def _fingerprint(writer: TextWriter, settings: Sequence[Any]) -> str:
    """A hash of everything that decides the texts."""
    decides = [
        writer.decoder.config.to_dict(),
        dataclasses.asdict(writer.sampling),
        None if writer.rules is None else dataclasses.asdict(writer.rules.rules),
        writer.max_tokens,
        *settings,
    ]
    return hashlib.sha256(json.dumps(decides, default=str).encode()).hexdigest()


class _Journal:
    """The finished lines beside the target, behind a first line that names what they belong to."""

    def __init__(self, target: Path, path: Path, fingerprint: str) -> None:
        self.target, self.path = target, path
        self.header = (json.dumps({"of": fingerprint}) + "\n").encode()

    def open(self) -> int:
        """Return the number of lines that an earlier call finished."""
        held = self.path.read_bytes() if self.path.is_file() else b""
        whole = held[: held.rfind(b"\n") + 1]  # a kill may have cut the last line
        finished = max(whole.count(b"\n") - 1, 0)
        if whole and not whole.startswith(self.header):
            raise SessaError(
                f"{self.path} holds {finished} texts of another request (other prompts, options or "
                "model); delete it, or name another target"
            )
        self.path.write_bytes(whole or self.header)
        return finished

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append finished lines."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with self.path.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Make the target of the finished lines."""
        with atomic_path(self.target) as scratch:
            scratch.write_bytes(self.path.read_bytes()[len(self.header) :])
        self.path.unlink()
