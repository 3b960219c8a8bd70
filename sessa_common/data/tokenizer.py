"""Tokenizers: read from tokenizer.json, trained as a byte-level BPE, or plain bytes."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sessa_common.config import SessaConfig
from sessa_common.data.library_calls import interruptible, library_errors
from sessa_common.errors import SessaError
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
# The time to train a BPE grows with the square of a word's length, so longer words are cut.
LONGEST_WORD = 2048
RUN = re.compile(r"\S+|\s+")
RUN_PIECE = 2**20
PROBE = "One text, 2 lines.\nNaïve 東京 😀\t"


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
        interruptible(lambda: tokenizer.train_from_iterator(pieces(), trainer))
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


def read_tokenizer(path: Path | str) -> Tokenizer:
    """Read a tokenizer.json, or the one in a folder.

    Raises SessaError when the file is missing, damaged, larger than 256 MiB, has no token, leaves
    most ids unused, or fails on a short text.
    """
    path = Path(os.path.expanduser(path))
    file = path / "tokenizer.json" if path.is_dir() else path
    content = read_limited(file, LARGEST_FILE)
    with library_errors(f"{file}: not a readable tokenizer.json"):
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
    with library_errors(f"{file}: the tokenizer fails on a short text"):
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
