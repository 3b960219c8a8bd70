"""Token shards: a folder of token ids on disk that training reads without holding them.

The folder has tokens.json, the tokenizer and files of little-endian uint16 or uint32 numbers, in
which the end token closes every document. Where texts of the tokenizer begin with ids such as bos,
so do the documents.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from sessa_common.errors import SessaError
from sessa_common.input_files import open_regular, require_regular
from sessa_common.json_files import read_json

TOKENS = "tokens.json"
FORMAT = 1
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
READ_BYTES = 2**22


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of tokens; `checksum` is the BLAKE2b (16 bytes, hexadecimal) of its content."""

    file: str
    tokens: int
    documents: int
    largest_id: int
    checksum: str


def token_dtype(vocab_size: int) -> str:
    """The name of the smallest type that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def is_token_folder(path: Path | str) -> bool:
    """Return True for a folder that `sessa data tokenize` has written."""
    # Not by Path: a path that may not be read is no such folder.
    return os.path.isfile(os.path.join(os.path.expanduser(path), TOKENS))


class TokenShards:
    """The tokens of a folder as one sequence, memory-mapped: len(shards) and shards[start:stop].

    `fingerprint` follows the checksums, which `verify` compares with the files. Raises SessaError
    for a folder without a readable tokens.json and for a file that is missing or has another size.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).expanduser()
        path = self.folder / TOKENS
        found = read_json(path)
        try:
            if found["format"] != FORMAT:
                raise SessaError(f"{path}: format {found['format']!r}, expected {FORMAT}")
            self.dtype = DTYPES[found["dtype"]]
            self.end_id, self.vocab_size = int(found["end_id"]), int(found["vocab_size"])
            self.begin_ids = [int(i) for i in found.get("begin_ids", ())]
            self.shards = read_shards(found["shards"])
        except (KeyError, TypeError, AttributeError) as error:
            raise SessaError(f"{path}: not written by sessa data tokenize ({error!r})") from None
        self.notes = [str(note) for note in found.get("notes", ())]
        for shard in self.shards:
            self._check_size(shard)
        self._ends = list(accumulate(shard.tokens for shard in self.shards))
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """The number of tokens."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, span: slice) -> np.ndarray:
        """The tokens of a span, copied from disk."""
        start, stop, _ = span.indices(len(self))
        parts = [np.empty(0, self.dtype)]
        while start < stop:
            number = bisect_right(self._ends, start)
            first = self._ends[number] - self.shards[number].tokens
            last = min(stop, self._ends[number])
            parts.append(self._map(number)[start - first : last - first])
            start = last
        return np.concatenate(parts)

    @property
    def documents(self) -> int:
        """The number of documents."""
        return sum(shard.documents for shard in self.shards)

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        return max((shard.largest_id for shard in self.shards), default=0)

    @property
    def fingerprint(self) -> str:
        """A digest of the checksums of all shards."""
        return digest("".join(shard.checksum for shard in self.shards).encode())

    def verify(self) -> None:
        """Read every shard; SessaError when one differs from what was written."""
        for shard in self.shards:
            path = self.folder / shard.file
            with open_regular(path) as file:
                found = digest_of(iter(lambda: file.read(READ_BYTES), b""))
            if found != shard.checksum:
                raise SessaError(
                    f"{path}: its content differs from what was written (checksum {found}, "
                    f"expected {shard.checksum}); tokenize the text again"
                )

    def _map(self, number: int) -> np.ndarray:
        if number not in self._maps:
            path = self.folder / self.shards[number].file
            self._maps[number] = np.memmap(path, self.dtype, mode="r")
        return self._maps[number]

    def _check_size(self, shard: Shard) -> None:
        path = self.folder / shard.file
        size, expected = require_regular(path).st_size, shard.tokens * self.dtype.itemsize
        if size != expected or not expected:
            raise SessaError(
                f"{path}: has {size:,} bytes, expected {expected:,} for {shard.tokens:,} tokens; "
                "the file is damaged, tokenize the text again"
            )


def read_shards(found: Iterable[Mapping[str, Any]]) -> list[Shard]:
    """The shards that a file of JSON lists; KeyError or TypeError when it has other entries."""
    names = {field.name for field in dataclasses.fields(Shard)}
    shards = [Shard(**{name: item[name] for name in names}) for item in found]
    for shard in shards:
        counts = (shard.tokens, shard.documents, shard.largest_id)
        if not all(type(count) is int and count >= 0 for count in counts):
            raise TypeError(f"{shard.file} has counts {counts}")
        if Path(shard.file).name != shard.file or not isinstance(shard.checksum, str):
            raise TypeError(f"{shard.file!r} is not the name of a file in the folder")
    return shards


def digest(content: bytes) -> str:
    """The BLAKE2b (16 bytes, hexadecimal) of some bytes."""
    return digest_of([content])


def digest_of(parts: Iterable[bytes | memoryview]) -> str:
    """The BLAKE2b (16 bytes, hexadecimal) of bytes that come in parts."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.hexdigest()
