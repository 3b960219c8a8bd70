"""Tokenizers: read from tokenizer.json, trained as a byte-level BPE, or plain bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError
from sessa_common.json_files import read_json

END_OF_TEXT = "<|endoftext|>"
# How other tokenizers spell the token that ends a document, when no tokenizer_config.json says so.
KNOWN_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]")
SMALLEST_BPE = 257
BPE_END_ID, BYTES_END_ID = 0, 256
ENCODE_CHUNK = 256


def _byte_level(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


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


def train_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `size` tokens, 257 or more; id 0 ends a text."""
    if size < SMALLEST_BPE:
        raise SessaError(
            f"tokenizer size is {size}, expected {SMALLEST_BPE} (the bytes and an end) or more"
        )
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=_byte_characters(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def read_tokenizer(path: Path | str) -> Tokenizer:
    """Read a tokenizer.json, or the one in a folder; SessaError when missing or damaged."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise SessaError(f"{file}: no such tokenizer file")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for every kind of damage
        raise SessaError(f"{file}: not a readable tokenizer.json ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def choose_tokenizer(spec: str, texts: Iterable[str]) -> tuple[Tokenizer, int]:
    """The tokenizer that `spec` asks for, and the id of its end token.

    spec is "bytes", the size of a BPE to train on `texts`, or the path of a tokenizer.json or of a
    folder that has one.
    """
    if spec == "bytes":
        return byte_tokenizer(), BYTES_END_ID
    if spec.lstrip("-").isdigit():
        return train_bpe(texts, int(spec)), BPE_END_ID
    return read_tokenizer(spec), end_token_id(spec)


def end_token_id(path: Path | str) -> int:
    """Id of the token that ends a text, from tokenizer_config.json beside it or a usual name."""
    tokenizer = read_tokenizer(path)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    settings = folder / "tokenizer_config.json"
    named = read_json(settings).get("eos_token") if settings.is_file() else None
    if isinstance(named, dict):
        named = named.get("content")
    for token in [named] if named else KNOWN_ENDS:
        if (found := tokenizer.token_to_id(token)) is not None:
            return found
    raise SessaError(
        f"{path}: no token ends a document (looked for {named or ', '.join(KNOWN_ENDS)}); "
        "name it as eos_token in a tokenizer_config.json beside it"
    )


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
    """A tokenizer whose tokens are the given words, by place; texts are words between spaces."""
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def encode_texts(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Token ids of each text, int32 (n,), without special tokens added."""
    texts = iter(texts)
    while chunk := list(islice(texts, ENCODE_CHUNK)):
        for encoding in tokenizer.encode_batch_fast(chunk, add_special_tokens=False):
            yield np.asarray(encoding.ids, np.int32)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, end_id: int, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json into a new folder."""
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.id_to_token(end_id)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    ids = {"bos_token_id": end_id, "eos_token_id": end_id, "pad_token_id": end_id}
    _write(folder / "tokenizer_config.json", settings)
    _write(folder / "generation_config.json", ids)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
