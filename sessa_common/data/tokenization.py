"""Text to token shards: once, by several processes, to be gone on with after an interruption.

The main process reads the documents in order and cuts them into chunks; the workers turn chunks
into tokens; the main process writes them in order. Chunks and shards depend on the text alone, so
the folder is the same for any number of processes. What is done lies in OUT.partial, which gets
the name OUT when everything is written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sessa_common.data.corpus import Tell, say_nothing
from sessa_common.data.encoding import DroppedText, encode_documents
from sessa_common.data.sources import ReadCounts, TextSource, local_paths, read_documents
from sessa_common.data.token_shards import (
    DTYPES,
    FORMAT,
    TOKENS,
    Shard,
    TokenShards,
    digest_of,
    read_shards,
    token_dtype,
)
from sessa_common.data.tokenizer import (
    begin_of,
    choose_tokenizer,
    first_characters,
    parse_special_tokens,
    read_tokenizer,
    vocabulary_size,
)
from sessa_common.errors import SessaError, expect
from sessa_common.json_files import read_json
from sessa_common.storage import (
    LOCK,
    MANIFEST,
    atomic_path,
    check_new_folder,
    is_empty,
    lock_folder,
    sync,
    write_json,
    write_text,
)

PARTIAL = "partial.json"
TOKENIZER = "tokenizer.json"
CHUNK_TEXTS, CHUNK_CHARACTERS = 1024, 2**20
SHARD_TOKENS = 2**26
# Chunks that wait for each worker, so that none is ever without work.
AHEAD = 3


@dataclass(frozen=True, kw_only=True)
class TokenizeRequest:
    """The arguments of `tokenize`.

    `sources` are names as `read_documents` takes them. `tokenizer` is "bytes", the size of a BPE to
    train on the text, or a path. A shard gets `shard_tokens` tokens and the rest of its last chunk.
    """

    sources: tuple[str, ...]
    out: Path | str
    tokenizer: str
    source: TextSource = field(default_factory=TextSource)
    special_tokens: bool = False
    shard_tokens: int = SHARD_TOKENS
    jobs: int = 1

    def __post_init__(self) -> None:
        for name in ("shard_tokens", "jobs"):
            value = getattr(self, name)
            expect(isinstance(value, int) and value > 0, name, value, "1 or more")
        expect(len(self.sources) > 0, "sources", self.sources, "at least one file or folder")

    def decisive(self) -> dict[str, Any]:
        """The arguments that decide the content of the folder."""
        values = dataclasses.asdict(self)
        del values["out"], values["jobs"]
        return {**values, "sources": list(self.sources)}


@dataclass(frozen=True)
class Chunk:
    """Some documents, and the digest of all documents up to the last of them."""

    texts: list[str]
    digest: str


@dataclass(frozen=True)
class Encoded:
    """The tokens of a chunk, each document followed by the end token."""

    tokens: np.ndarray
    documents: int
    dropped: DroppedText


def tokenize(request: TokenizeRequest, tell: Tell = say_nothing) -> TokenShards:
    """Write the tokens of the sources into the folder `out`, or go on where a killed run stopped.

    Raises SessaError, with nothing written, for sources or a tokenizer that cannot be used and for
    a folder that holds something; and, with what is done kept in OUT.partial, for text that cannot
    be read, or that is not the text with which OUT.partial was begun.
    """
    out = Path(request.out)
    check_new_folder(out, inputs=local_paths(request.sources))
    counts = ReadCounts()
    texts = read_documents(request.sources, request.source, counts)
    first = next(texts, None)
    if first is None:
        raise SessaError("; ".join(["the text is empty", *counts.notes()]))
    work = out.with_name(f"{out.name}.partial")
    tokenizer, begin, end = _tokenizer_of(work, request, tell)
    work.mkdir(parents=True, exist_ok=True)
    with lock_folder(work):
        journal = _open_journal(work, request)
        write_text(work / TOKENIZER, tokenizer.to_str())
        build = _Build(work, request, tokenizer, begin, end, journal)
        with closing(build.run(chain([first], texts))) as progress:
            for shards, tokens in progress:
                tell(f"tokenizing: {tokens:,} tokens, {shards} shards on disk")
        build.finish(counts)
        if out.exists():
            (out / LOCK).unlink(missing_ok=True)
            out.rmdir()
        os.rename(work, out)
        sync(out.parent)
        (out / LOCK).unlink(missing_ok=True)
    return TokenShards(out)


def _open_journal(work: Path, request: TokenizeRequest) -> dict[str, Any]:
    """The journal of an earlier run in the folder, or of a new one."""
    new = {"request": request.decisive(), "shards": []}
    if not (work / PARTIAL).is_file():
        if not is_empty(work):
            raise SessaError(f"{work}: has no {PARTIAL} to go on from; remove the folder")
        return new
    found = read_json(work / PARTIAL)
    if not found.get("shards"):
        return new
    if found.get("request") != new["request"]:
        raise SessaError(
            f"{work}: was begun with other sources or settings; repeat those to go on, or remove "
            "the folder to begin anew"
        )
    return found


def _tokenizer_of(
    work: Path, request: TokenizeRequest, tell: Tell
) -> tuple[Tokenizer, list[int], int]:
    """The tokenizer of the folder that is gone on with, or the one that is asked for.

    The second and third results are the ids before a document and the one behind it.
    """
    journal = _open_journal(work, request)
    if journal["shards"]:
        tokenizer = read_tokenizer(work)
        begin, end = journal.get("begin_ids", []), int(journal["end_id"])
    else:
        tell("preparing the tokenizer")
        texts = first_characters(read_documents(request.sources, request.source))
        tokenizer, end = choose_tokenizer(request.tokenizer, texts)
        begin = begin_of(tokenizer, request.tokenizer)
    parse_special_tokens(tokenizer, request.special_tokens)
    return tokenizer, begin, end


class _Build:
    """The writing of the shards into a working folder with its journal."""

    def __init__(
        self,
        work: Path,
        request: TokenizeRequest,
        tokenizer: Tokenizer,
        begin: list[int],
        end: int,
        journal: dict[str, Any],
    ) -> None:
        self.work, self.request, self.journal = work, request, journal
        self.tokenizer, self.begin, self.end = tokenizer, begin, end
        self.dtype = token_dtype(vocabulary_size(tokenizer))
        journal |= {"begin_ids": begin, "end_id": end}
        write_json(work / PARTIAL, journal)

    def run(self, texts: Iterable[str]) -> Generator[tuple[int, int], None, None]:
        """Write the shards that are missing; yield the numbers of shards and tokens."""
        chunks = self._behind(_chunks(texts))
        writer = _ShardWriter(self)
        tokenized = _encode_in_order(
            _Encoder(self.tokenizer, self.begin, self.end, self.dtype), chunks, self.request.jobs
        )
        with closing(tokenized):
            for chunk, encoded in tokenized:
                writer.add(chunk, encoded)
                yield len(self.journal["shards"]), writer.total
            writer.end_shard()

    def _behind(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """The chunks behind those of the shards on disk, whose text must be the same again."""
        done = self.journal["shards"][-1] if self.journal["shards"] else None
        count = 0
        while done is not None and count < done["texts"]:
            chunk = next(chunks, None)
            count += 0 if chunk is None else len(chunk.texts)
            if chunk is None or (count == done["texts"] and chunk.digest != done["digest"]):
                raise SessaError(
                    f"{self.work}: the text has changed since the work was begun; remove the "
                    "folder to begin anew"
                )
        yield from chunks

    def record(self, shard: Shard, texts: int, text_digest: str, dropped: DroppedText) -> None:
        """Note in the journal that a shard is on disk."""
        earlier = self.journal["shards"][-1]["texts"] if self.journal["shards"] else 0
        self.journal["shards"].append(
            {
                **dataclasses.asdict(shard),
                "texts": earlier + texts,
                "digest": text_digest,
                "dropped": [dropped.bytes, dropped.documents],
            }
        )
        write_json(self.work / PARTIAL, self.journal)

    def finish(self, counts: ReadCounts) -> None:
        """Write tokens.json in place of the journal."""
        lost = [item["dropped"] for item in self.journal["shards"]]
        dropped = DroppedText(*(sum(numbers) for numbers in zip(*lost, strict=True)))
        notes = counts.notes() + dropped.notes()
        shards = read_shards(self.journal["shards"])
        if not sum(shard.documents for shard in shards):
            raise SessaError("; ".join(["the text has no tokens", *notes]))
        content = {
            "format": FORMAT,
            "dtype": self.dtype,
            "begin_ids": self.begin,
            "end_id": self.end,
            "vocab_size": vocabulary_size(self.tokenizer),
            "tokens": sum(shard.tokens for shard in shards),
            "documents": sum(shard.documents for shard in shards),
            "request": self.journal["request"],
            "notes": notes,
            "shards": [dataclasses.asdict(shard) for shard in shards],
        }
        write_json(self.work / TOKENS, content)
        write_json(self.work / MANIFEST, {"format": 1})
        (self.work / PARTIAL).unlink()


class _ShardWriter:
    """Collects chunks into shards, each of which appears whole."""

    def __init__(self, build: _Build) -> None:
        self.build = build
        self.total = sum(item["tokens"] for item in build.journal["shards"])
        self._begin()

    def _begin(self) -> None:
        self.parts: list[np.ndarray] = []
        self.tokens = self.documents = self.texts = 0
        self.dropped, self.digest = DroppedText(), ""

    def add(self, chunk: Chunk, encoded: Encoded) -> None:
        """Add a chunk; a shard that is full is written."""
        self.parts.append(encoded.tokens)
        self.tokens += len(encoded.tokens)
        self.total += len(encoded.tokens)
        self.documents += encoded.documents
        self.texts += len(chunk.texts)
        self.dropped.bytes += encoded.dropped.bytes
        self.dropped.documents += encoded.dropped.documents
        self.digest = chunk.digest
        if self.tokens >= self.build.request.shard_tokens:
            self.end_shard()

    def end_shard(self) -> None:
        """Write what was collected as a shard."""
        if not self.tokens:
            return
        name = f"tokens-{len(self.build.journal['shards']):05}.bin"
        with atomic_path(self.build.work / name) as scratch, scratch.open("wb") as file:
            for part in self.parts:
                file.write(part.data)
        shard = Shard(
            file=name,
            tokens=self.tokens,
            documents=self.documents,
            largest_id=max(int(part.max(initial=0)) for part in self.parts),
            checksum=digest_of(part.data for part in self.parts),
        )
        self.build.record(shard, self.texts, self.digest, self.dropped)
        self._begin()


def _chunks(texts: Iterable[str]) -> Iterator[Chunk]:
    """Cut the documents into chunks of CHUNK_TEXTS or CHUNK_CHARACTERS, whatever comes first."""
    found = hashlib.blake2b(digest_size=16)
    chunk, left = list[str](), CHUNK_CHARACTERS
    for text in texts:
        content = text.encode()
        found.update(len(content).to_bytes(8, "little") + content)
        chunk.append(text)
        left -= len(text)
        if left <= 0 or len(chunk) == CHUNK_TEXTS:
            yield Chunk(chunk, found.hexdigest())
            chunk, left = [], CHUNK_CHARACTERS
    if chunk:
        yield Chunk(chunk, found.hexdigest())


@dataclass(frozen=True)
class _Encoder:
    """The tokens of texts, each between the ids `begin` and the id `end`."""

    tokenizer: Tokenizer
    begin: list[int]
    end: int
    dtype: str

    def __call__(self, texts: Sequence[str]) -> Encoded:
        dropped = DroppedText()
        encoded = encode_documents(self.tokenizer, texts, dropped, self.begin)
        documents = [ids for ids, _ in encoded]
        closed = [part for ids in documents for part in (ids, np.array([self.end], np.int32))]
        tokens = np.concatenate(closed or [np.empty(0, np.int32)]).astype(DTYPES[self.dtype])
        return Encoded(tokens, len(documents), dropped)


def _encode_in_order(
    encode: _Encoder, chunks: Iterable[Chunk], jobs: int
) -> Generator[tuple[Chunk, Encoded], None, None]:
    """Yield each chunk with its tokens, in order, encoded by `jobs` processes."""
    if jobs == 1:
        for chunk in chunks:
            yield chunk, encode(chunk.texts)
        return
    waiting: deque[tuple[Chunk, Future[Encoded]]] = deque()
    settings = (encode, encode.tokenizer.encode_special_tokens)
    # A process with threads must not be forked.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, _start_worker, settings)
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_work, chunk.texts)))
            if len(waiting) > AHEAD * jobs:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool:
        raise SessaError(
            "a worker process was ended from outside, perhaps for lack of memory; give fewer "
            "`jobs` and repeat the command, which goes on where it stopped"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: _Encoder


def _start_worker(encode: _Encoder, plain_special: bool) -> None:
    global _worker
    # Ctrl-C goes to all processes of a terminal; the main one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A pickled tokenizer is its tokenizer.json, which does not say this.
    encode.tokenizer.encode_special_tokens = plain_special
    _worker = encode


def _end_with_parent() -> None:
    """End this process when the main one is gone, which a waiting worker would not notice."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(texts: Sequence[str]) -> Encoded:
    return _worker(texts)
