"""Texts as token ids, and the text that a tokenizer has no token for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from tokenizers import Encoding, Tokenizer, models

from sessa_common.data.library_calls import interruptible, library_errors
from sessa_common.errors import check_text

# Most texts that are encoded at once, and most characters of them.
ENCODE_CHUNK, ENCODE_CHARACTERS = 256, 2**24


@dataclass
class DroppedText:
    """Counts of text that a tokenizer has no token for, counted by `encode_documents`."""

    bytes: int = 0
    documents: int = 0

    def notes(self) -> list[str]:
        """One sentence for each kind of loss."""
        notes = []
        if self.bytes:
            notes.append(
                f"the tokenizer has no token for {self.bytes:,} bytes of the text, which are "
                "left out and not counted"
            )
        if self.documents:
            notes.append(
                f"documents in which the tokenizer has a token for nothing: {self.documents:,}, "
                "left out"
            )
        return notes


def encode_documents(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    dropped: DroppedText | None = None,
    begin: Sequence[int] = (),
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield each text as token ids, int32 (n,), and the bytes of UTF-8 that they stand for.

    The ids `begin` stand before those of each text; no others are added. Text that the tokenizer
    has no token for is not among the bytes; a text without any known part is left out. Both are
    counted in `dropped`.
    """
    dropped = dropped or DroppedText()
    known = _KnownText(tokenizer)
    texts = iter(texts)
    while chunk := _take(texts):
        for text, encoding in zip(chunk, _encode(tokenizer, chunk, known.by_offsets), strict=True):
            size, lost = len(text.encode()), known.lost_bytes(text, encoding)
            dropped.bytes += lost
            if lost == size or not encoding.ids:
                dropped.documents += 1
            else:
                yield np.asarray([*begin, *encoding.ids], np.int32), size - lost


def encode_texts(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Yield the token ids of each text, int32 (n,), without special tokens added."""
    texts = iter(texts)
    while chunk := _take(texts):
        for encoding in _encode(tokenizer, chunk, offsets=False):
            yield np.asarray(encoding.ids, np.int32)


def encode_with_offsets(
    tokenizer: Tokenizer, texts: Iterable[str]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the token ids of each text, int32 (n,), and where in it each begins and ends, (n, 2).

    Special tokens are not added.
    """
    texts = iter(texts)
    while chunk := _take(texts):
        for encoding in _encode(tokenizer, chunk, offsets=True):
            places = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
            yield np.asarray(encoding.ids, np.int32), places


def _take(texts: Iterator[str]) -> list[str]:
    """The next texts to encode at once: not many, and not much text."""
    chunk, left = [], ENCODE_CHARACTERS
    for text in islice(texts, ENCODE_CHUNK):
        chunk.append(text)
        left -= len(text)
        if left <= 0:
            break
    return chunk


def encode_text(tokenizer: Tokenizer, text: str, where: str = "the text") -> list[int]:
    """Token ids of one text, without special tokens added; `where` names the text in errors."""
    [encoding] = _encode(tokenizer, [check_text(text, where)], offsets=False)
    return list(encoding.ids)


def _encode(tokenizer: Tokenizer, texts: list[str], offsets: bool) -> list[Encoding]:
    encode = tokenizer.encode_batch if offsets else tokenizer.encode_batch_fast
    with library_errors("the tokenizer fails on the text"):
        return interruptible(lambda: encode(texts, add_special_tokens=False))


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    if isinstance(tokenizer.model, models.Unigram):
        # Its token for unknown text stands in the file only.
        found: int | None = json.loads(tokenizer.to_str())["model"]["unk_id"]
        return found
    name = tokenizer.model.unk_token
    return None if name is None else tokenizer.token_to_id(name)


class _KnownText:
    """The parts of texts that a tokenizer has tokens for.

    A BPE knows or does not know single characters, which are tried once each. For the other models
    the offsets of the tokens tell; those of a BPE are wrong behind a dropped character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.by_offsets = not isinstance(tokenizer.model, models.BPE)
        self.unknown_id = _unknown_id(tokenizer)
        self.known: set[str] = set()
        self.lost: set[str] = set()

    def lost_bytes(self, text: str, encoding: Encoding) -> int:
        """The number of UTF-8 bytes of the text that no token stands for."""
        return self._outside(text, encoding) if self.by_offsets else self._unknown(text)

    def _unknown(self, text: str) -> int:
        characters = set(text)
        new = sorted(characters - self.known - self.lost)
        for character, encoding in zip(new, _encode(self.tokenizer, new, False), strict=True):
            known = encoding.ids and self.unknown_id not in encoding.ids
            (self.known if known else self.lost).add(character)
        return sum(text.count(c) * len(c.encode()) for c in self.lost & characters)

    def _outside(self, text: str, encoding: Encoding) -> int:
        lost, end = 0, 0
        for token, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            if token != self.unknown_id and last > end:
                lost += len(text[end:first].encode())
                end = last
        return lost + len(text[end:].encode())
