"""Tokenizers: read from tokenizer.json, trained as a byte-level BPE, or plain bytes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers

from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError, check_text
from sessa_common.input_files import read_limited
from sessa_common.json_files import read_json

END_OF_TEXT = "<|endoftext|>"
# Usual names of the token that ends a document, for a tokenizer without tokenizer_config.json.
KNOWN_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]")
SMALLEST_BPE = 257
# Training a BPE reserves memory for its whole size at once; no vocabulary in use is as large.
LARGEST_BPE = 2**20
# A BPE is trained on the first characters of the data; more of them hardly change it.
BPE_CHARACTERS = 100_000_000
LARGEST_FILE = 256 * 2**20
# The embedding has a row for every id, so ids with few tokens between them waste memory.
MOST_UNUSED_IDS = 2**16
BPE_END_ID, BYTES_END_ID = 0, 256
ENCODE_CHUNK, ENCODE_CHARACTERS = 256, 2**24
# The time to train a BPE grows with the square of a word's length, so longer words are cut.
LONGEST_WORD = 2048
RUN = re.compile(r"\S+|\s+")
RUN_PIECE = 2**20
PROBE = "One text, 2 lines.\nNaïve 東京 😀\t"

Result = TypeVar("Result")


def _byte_level(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    parse_special_tokens(tokenizer, False)
    return tokenizer


def parse_special_tokens(tokenizer: Tokenizer, parse: bool) -> None:
    """Choose what the name of a special token means inside a text: the token, or plain text.

    Every tokenizer of this module begins with plain text, so that nobody who writes
    "<|endoftext|>" in a document or a prompt ends it. Files do not store the choice.
    """
    tokenizer.encode_special_tokens = not parse


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level tokenizer.json."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    shifted = {byte: 256 + i for i, byte in enumerate(others)}
    return [chr(shifted.get(byte, byte)) for byte in range(256)]


def byte_tokenizer() -> Tokenizer:
    """One token a byte, with the byte's value as its id, and 256 for the end of a text."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = _byte_level(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def train_bpe(texts: Iterable[str], size: int, *, show_progress: bool = False) -> Tokenizer:
    """Train a byte-level BPE of at most `size` tokens, 257 or more; id 0 ends a text.

    Words longer than 2048 characters are cut, other text trains as it is. Ctrl-C is heard at any
    time; `show_progress` draws the library's bars on a terminal's standard error.
    """
    if not SMALLEST_BPE <= size <= LARGEST_BPE:
        raise SessaError(
            f"tokenizer size is {size}, expected from {SMALLEST_BPE} (the bytes and an end) "
            f"to {LARGEST_BPE}"
        )
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=_byte_characters(),
        show_progress=show_progress,
    )
    stopped = threading.Event()

    def pieces() -> Iterator[str]:
        for text in texts:
            if stopped.is_set():
                return
            yield from cut_long_words(text)

    try:
        _interruptible(lambda: tokenizer.train_from_iterator(pieces(), trainer))
    finally:
        stopped.set()
    return tokenizer


def cut_long_words(text: str) -> Iterator[str]:
    """Yield a text whole, or in pieces that cut each word longer than LONGEST_WORD characters.

    A word is what the byte-level pre-tokenizer makes one: letters, digits, signs or white space.
    """
    start = 0
    for cut in _cuts(text):
        yield text[start:cut]
        start = cut
    yield text[start:]


def _cuts(text: str) -> Iterator[int]:
    # A run longer than LONGEST_WORD fills at least one aligned block of half that length.
    block = LONGEST_WORD // 2
    starts = range(0, len(text) - block + 1, block)
    if not any(RUN.fullmatch(text, start, start + block) for start in starts):
        return
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for run in RUN.finditer(text):
        if len(run[0]) <= LONGEST_WORD:
            continue
        for start in range(run.start(), run.end(), RUN_PIECE):
            for _, (first, last) in splitter.pre_tokenize_str(
                text[start : min(start + RUN_PIECE, run.end())]
            ):
                yield from range(start + first + LONGEST_WORD, start + last, LONGEST_WORD)


def _interruptible(work: Callable[[], Result]) -> Result:
    """Run a call into the library on another thread, so that Ctrl-C is heard while it works."""
    done: list[Result] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:  # raised again below, on the caller's thread
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if failed:
        raise failed[0]
    return done[0]


@contextlib.contextmanager
def _library_errors(where: str) -> Iterator[None]:
    """Turn a failure inside the tokenizers library into a SessaError that begins with `where`.

    A panic of its Rust code arrives as a BaseException, after a report on standard error that
    nobody can use; the report is not shown.
    """
    try:
        with _hidden_standard_error():
            yield
    except (SessaError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        told = str(error).strip().partition("\n")[0] or type(error).__name__
        raise SessaError(f"{where} ({told})") from None


@contextlib.contextmanager
def _hidden_standard_error() -> Iterator[None]:
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    if sys.stderr is not None:
        sys.stderr.flush()
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def read_tokenizer(path: Path | str) -> Tokenizer:
    """Read a tokenizer.json, or the one in a folder.

    Raises SessaError when the file is missing, damaged, larger than 256 MiB, has no token, leaves
    most ids unused, or fails on a short text.
    """
    path = Path(os.path.expanduser(path))
    file = path / "tokenizer.json" if path.is_dir() else path
    content = read_limited(file, LARGEST_FILE)
    with _library_errors(f"{file}: not a readable tokenizer.json"):
        tokenizer = Tokenizer.from_buffer(content)
        ids = tokenizer.get_vocab(with_added_tokens=True).values()
    if not ids:
        raise SessaError(f"{file}: the tokenizer has no token")
    if max(ids) - len(ids) > max(MOST_UNUSED_IDS, len(ids)):
        raise SessaError(
            f"{file}: the tokenizer has {len(ids):,} tokens, but ids up to {max(ids):,}; "
            "an embedding would need a row for each"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    parse_special_tokens(tokenizer, False)
    with _library_errors(f"{file}: the tokenizer fails on a short text"):
        tokenizer.decode(tokenizer.encode(PROBE, add_special_tokens=False).ids)
    return tokenizer


def begin_of(tokenizer: Tokenizer, spec: str) -> list[int]:
    """`begin_token_ids` of the tokenizer that `choose_tokenizer` gives for `spec`."""
    if spec == "bytes" or spec.lstrip("-").isdigit():
        return []
    path = Path(os.path.expanduser(spec))
    return begin_token_ids(tokenizer, path if path.is_dir() else path.parent)


def choose_tokenizer(
    spec: str, texts: Iterable[str], *, show_progress: bool = False
) -> tuple[Tokenizer, int]:
    """The tokenizer that `spec` asks for, and the id of its end token.

    `spec` is "bytes", the size of a BPE to train on `texts`, or the path of a tokenizer.json or
    of a folder that has one.
    """
    if spec == "bytes":
        return byte_tokenizer(), BYTES_END_ID
    if spec.lstrip("-").isdigit():
        return train_bpe(texts, int(spec), show_progress=show_progress), BPE_END_ID
    return read_tokenizer(spec), end_token_id(spec)


def first_characters(texts: Iterable[str], count: int = BPE_CHARACTERS) -> Iterator[str]:
    """Yield the texts up to so many characters, from which a BPE is trained."""
    for text in texts:
        yield text[:count]
        count -= len(text)
        if count <= 0:
            return


def end_token_id(path: Path | str) -> int:
    """Id of the token that ends a text, from tokenizer_config.json beside it or a usual name."""
    tokenizer = read_tokenizer(path)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    settings = folder / "tokenizer_config.json"
    keys = read_json(settings) if settings.is_file() else {}
    named = _token_name(keys, "eos_token", str(settings))
    for token in [named] if named else KNOWN_ENDS:
        if (found := tokenizer.token_to_id(token)) is not None:
            return found
    raise SessaError(
        f"{path}: no token ends a document (looked for {named or ', '.join(KNOWN_ENDS)}); "
        "name it as eos_token in a tokenizer_config.json beside it"
    )


def begin_token_ids(
    tokenizer: Tokenizer, folder: Path | None, bos_token_id: int | None = None
) -> list[int]:
    """Ids that the tokenizer puts before every text, such as Llama's bos token.

    `add_bos_token` of the folder's tokenizer_config.json decides; without this key it is the
    tokenizer's post-processor. The token is `bos_token_id`, or the `bos_token` of that file. Raises
    SessaError when neither is named.
    """
    path = None if folder is None else folder / "tokenizer_config.json"
    settings = read_json(path) if path is not None and path.is_file() else {}
    adds = settings.get("add_bos_token")
    if adds is None:
        encoding = tokenizer.encode("a", add_special_tokens=True)
        plain = tokenizer.encode("a", add_special_tokens=False).ids
        return encoding.ids[: encoding.special_tokens_mask.index(0) if plain else 0]
    if not adds:
        return []
    if bos_token_id is None and (name := _token_name(settings, "bos_token", str(path))):
        bos_token_id = tokenizer.token_to_id(name)
    if bos_token_id is None:
        raise SessaError(f"{path}: add_bos_token is true, but the model has no bos token")
    return [bos_token_id]


def _token_name(settings: dict[str, Any], key: str, where: str) -> str | None:
    """The text of a special token in a tokenizer_config.json, None where it names none."""
    named = settings.get(key)
    if isinstance(named, dict):
        named = named.get("content")
    if not isinstance(named, str | None):
        raise SessaError(f"{where}: {key} is {named!r}, expected a text")
    return named


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The number of embedding rows that the tokenizer needs: its largest id plus one."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def check_fits(tokenizer: Tokenizer, config: SessaConfig, where: str) -> None:
    """Raise SessaError when the tokenizer can give an id that the embedding has no row for."""
    needed = vocabulary_size(tokenizer)
    if needed > config.vocab_size:
        raise SessaError(
            f"{where}: the tokenizer has {needed} tokens, but the model's embedding has "
            f"vocab_size {config.vocab_size} rows; use the tokenizer that the model was trained on"
        )


def word_tokenizer(words: Sequence[str]) -> Tokenizer:
    """A tokenizer with one token for each word, in order; a text is words between white space."""
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


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
    with _library_errors("the tokenizer fails on the text"):
        return _interruptible(lambda: encode(texts, add_special_tokens=False))


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


def write_tokenizer(
    folder: Path,
    tokenizer: Tokenizer,
    end_id: int,
    max_length: int,
    begin: Sequence[int] = (),
) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json into a new folder.

    `begin` are the ids before every text; without them the end token is the bos token too.
    """
    tokenizer.save(str(folder / "tokenizer.json"))
    begin_id = begin[-1] if begin else end_id
    end = tokenizer.id_to_token(end_id)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.id_to_token(begin_id),
        "eos_token": end,
        "pad_token": end,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    if list(begin) != begin_token_ids(tokenizer, None):
        settings["add_bos_token"] = bool(begin)
    ids = {"bos_token_id": begin_id, "eos_token_id": end_id, "pad_token_id": end_id}
    _write(folder / "tokenizer_config.json", settings)
    _write(folder / "generation_config.json", ids)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
