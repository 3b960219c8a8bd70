"""Prompt caches: the cache of a prompt that was read, in a safetensors file.

A file holds the ids of a text, the arrays of `cache_contents` for all of them or for all but the
last, and in its metadata the hashes of the model and of the tokenizer that they belong to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from sessa_common.checkpoint.folder import open_safetensors, weight_files, write_safetensors
from sessa_common.checkpoint.manifest import file_facts, read_manifest
from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError
from sessa_common.inference.cache_contents import MASK
from sessa_common.inference.generation import Decoder

FORMAT = "1"
TOKENS = "tokens"
SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class CacheOwner:
    """The owner of a prompt cache: SHA-256 of the model and of its tokenizer, hexadecimal."""

    model: str
    tokenizer: str


def cache_owner(
    folder: Path, config: SessaConfig, tokenizer: Tokenizer, files: Iterable[Path] | None = None
) -> CacheOwner:
    """Hash the model of a folder, its configuration and its files, and a tokenizer.

    `files` are the weight files of a checkpoint unless given. Hashes that the folder's manifest
    states are taken from it, other files are read whole. Raises SessaError for a folder that is no
    checkpoint.
    """
    manifest = read_manifest(folder)
    known = {} if manifest is None else manifest.files
    digests = sorted(
        (known.get(path.name) or file_facts(path))["sha256"]
        for path in (weight_files(folder) if files is None else files)
    )
    model = json.dumps([config.to_dict(), digests], sort_keys=True)
    return CacheOwner(model=_sha256(model), tokenizer=_sha256(tokenizer.to_str()))


def save_prompt_cache(
    path: Path, decoder: Decoder, tokens: Sequence[int], owner: CacheOwner
) -> None:
    """Write the cache of a decoder, which has read `tokens` or all of them but the last.

    Raises SessaError for a batch of several sequences; the file appears whole or not at all.
    """
    if decoder.length not in (len(tokens) - 1, len(tokens)) or not decoder.length:
        raise SessaError(
            f"the cache has {decoder.length} positions and the text {len(tokens)} tokens; save the "
            "text that was read, with at most one token more"
        )
    arrays = decoder.cache_arrays()
    _require_one_text(arrays[MASK], "the cache")
    metadata = {"sessa_prompt_cache": FORMAT, **asdict(owner)}
    write_safetensors(path, {TOKENS: np.array(tokens, np.int64), **arrays}, metadata)


def load_prompt_cache(path: Path, decoder: Decoder, owner: CacheOwner) -> list[int]:
    """Replace the cache of a decoder by that of a file; return the ids of the file's text.

    Raises SessaError, and leaves the decoder as it is, when the file is no prompt cache or a
    damaged one, and when it is of another model, tokenizer or dtype or longer than the context.
    """
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        found = metadata.get("sessa_prompt_cache")
        if found is None:
            raise SessaError(f"{path}: is no prompt cache; `save_prompt_cache` writes one")
        if found != FORMAT:
            raise SessaError(f"{path}: a prompt cache of format {found}, expected {FORMAT}")
        for name, value in asdict(owner).items():
            if metadata.get(name) != value:
                raise SessaError(
                    f"{path}: is the prompt cache of another {name}; read the prompt again with "
                    "this one and save its cache"
                )
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tokens = _check_tokens(path, arrays.pop(TOKENS, None), decoder.config)
    _require_one_text(arrays.get(MASK), str(path))
    if arrays[MASK].size not in (len(tokens) - 1, len(tokens)):
        raise SessaError(f"{path}: has {arrays[MASK].size} positions for {len(tokens)} tokens")
    try:
        decoder.restore_cache(arrays)
    except SessaError as error:
        raise SessaError(f"{path}: {error}") from None
    return tokens


def _check_tokens(path: Path, tokens: np.ndarray | None, config: SessaConfig) -> list[int]:
    if tokens is None or tokens.ndim != 1 or tokens.dtype != np.int64 or not tokens.size:
        raise SessaError(f"{path}: has no array `{TOKENS}` of ids")
    if not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
        raise SessaError(f"{path}: a token id is out of range 0..{config.vocab_size - 1}")
    if tokens.size > (context := config.max_position_embeddings):
        raise SessaError(
            f"{path}: the prompt cache has {tokens.size} tokens, but the model reads at most "
            f"{context} (max_position_embeddings)"
        )
    return tokens.tolist()


def _require_one_text(mask: np.ndarray | None, where: str) -> None:
    if mask is None or mask.ndim != 2 or len(mask) != 1 or not mask.all():
        raise SessaError(f"{where}: a prompt cache holds one text without padding")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
