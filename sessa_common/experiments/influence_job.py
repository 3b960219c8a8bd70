"""A job of `sessa influence`: a checkpoint with the texts, positions and layers to measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sessa_common.checkpoint.folder import load_config
from sessa_common.config import SessaConfig
from sessa_common.data.corpus import check_ids
from sessa_common.data.encoding import encode_texts
from sessa_common.data.tokenizer import check_fits, read_tokenizer
from sessa_common.errors import SessaError

MIN_TOKENS = 16
# A source position needs at least this many tokens after it.
MIN_FOLLOWING = MIN_TOKENS // 2
RANDOM_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class InfluenceJob:
    """A checkpoint and what to measure on it: token ids of texts, source positions, layers."""

    folder: Path
    name: str
    config: SessaConfig
    texts: list[np.ndarray]
    sources: list[int]
    layers: list[int]


def new_job(
    folder: Path,
    *,
    name: str | None = None,
    texts: Sequence[str] = (),
    tokens: int | None = None,
    length: int | None = None,
    sources: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> InfluenceJob:
    """Choose what to measure on a checkpoint; SessaError for what the checkpoint cannot do.

    Without texts the text is `tokens` random tokens, by default RANDOM_TOKENS or the context if
    that is shorter. `length` cuts every text. The default sources are four positions in the first
    quarter of the shortest text; the default layers are all.
    """
    if tokens is not None and texts:
        raise SessaError("`tokens` draws random tokens; give it or texts, not both")
    config = load_config(folder)
    if texts:
        ids = _encode(folder, config, texts)
    else:
        count = tokens or length or min(RANDOM_TOKENS, config.max_position_embeddings)
        ids = [np.random.default_rng(seed).integers(0, config.vocab_size, count, np.int32)]
    for i, each in enumerate(ids):
        where = f"{folder}: text {i + 1}"
        if length is not None and length > len(each):
            raise SessaError(
                f"{where} has {len(each)} tokens, less than `length` {length}; give a longer text"
            )
        ids[i] = each[:length]
        _check_length(len(ids[i]), config, where)
    return InfluenceJob(
        folder=folder,
        name=folder.resolve().name if name is None else name,
        config=config,
        texts=ids,
        sources=_choose_sources(sources, min(len(each) for each in ids)),
        layers=_choose_layers(layers, config, folder),
    )


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Return the names of folders, with the parent's name before it where two are equal."""
    names = [folder.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 else f"{folder.resolve().parent.name}/{name}"
        for folder, name in zip(folders, names, strict=True)
    ]


def _encode(folder: Path, config: SessaConfig, texts: Sequence[str]) -> list[np.ndarray]:
    if not (folder / "tokenizer.json").is_file():
        raise SessaError(
            f"{folder} has no tokenizer.json to read a text with; give a number of random `tokens`"
        )
    tokenizer = read_tokenizer(folder)
    check_fits(tokenizer, config, str(folder))
    encoded = list(encode_texts(tokenizer, texts))
    for ids in encoded:
        check_ids(ids, config, str(folder))
    return encoded


def _check_length(count: int, config: SessaConfig, where: str) -> None:
    context = config.max_position_embeddings
    if count < MIN_TOKENS:
        raise SessaError(f"{where} has {count} tokens, expected at least {MIN_TOKENS}")
    if count > context:
        raise SessaError(
            f"{where} has {count} tokens, more than the model's context of {context}; give a "
            f"`length` of {context}"
        )


def _choose_sources(given: Sequence[int] | None, shortest: int) -> list[int]:
    if given is None:
        return sorted({0, shortest // 16, shortest // 8, shortest // 4})
    sources, last = sorted(set(given)), shortest - MIN_FOLLOWING
    if not sources or sources[0] < 0 or sources[-1] > last:
        listed = ",".join(map(str, sources))
        raise SessaError(
            f"`tau` is {listed}, expected positions from 0 to {last}: the shortest text has "
            f"{shortest} tokens, and {MIN_FOLLOWING} must follow"
        )
    return sources


def _choose_layers(given: Sequence[int] | None, config: SessaConfig, folder: Path) -> list[int]:
    count = config.num_hidden_layers
    if given is None:
        return list(range(count))
    for layer in given:
        if not 0 <= layer < count:
            raise SessaError(f"`layer` is {layer}, expected 0 to {count - 1} for {folder}")
    return list(given)
