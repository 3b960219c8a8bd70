"""Ways to write the same text with less work: prompt caches and speculative decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from sessa_common.checkpoint.folder import weight_files
from sessa_common.errors import SessaError, expect, require
from sessa_common.inference.generation import Decoder, prefill, reuse_prefix, token_budget
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_common.inference.prompt_cache import (
    CacheOwner,
    cache_owner,
    load_prompt_cache,
    save_prompt_cache,
)
from sessa_common.inference.speculation import (
    DRAFT_TOKENS,
    Acceptance,
    require_same_size,
    require_same_tokens,
    require_trimmable_model,
    speculate,
)


@dataclass(frozen=True, kw_only=True)
class Shortcuts:
    """Means to save work: a prompt cache to begin from, one to write, and a way of guessing tokens.

    prompt_cache and save_prompt_cache are files, draft_model is the folder of a smaller model of
    the same vocabulary, which guesses draft_tokens tokens a round. prompt_lookup guesses so many
    tokens a round from earlier places in the text; 0 is off. Raises SessaError for a number out of
    its range and for two ways of guessing.
    """

    prompt_cache: str | Path | None = None
    save_prompt_cache: str | Path | None = None
    draft_model: str | Path | None = None
    draft_tokens: int = DRAFT_TOKENS
    prompt_lookup: int = 0

    def __post_init__(self) -> None:
        expect(self.draft_tokens >= 1, "draft_tokens", self.draft_tokens, "1 or more")
        expect(self.prompt_lookup >= 0, "prompt_lookup", self.prompt_lookup, "0 (off) or more")
        if self.draft_model is not None and self.prompt_lookup:
            raise SessaError(
                "`draft_model` and `prompt_lookup` both guess tokens; give one of them"
            )

    @property
    def guesses(self) -> bool:
        """Return True for speculative decoding."""
        return self.draft_model is not None or self.prompt_lookup > 0

    @property
    def caches(self) -> bool:
        """Return True when a prompt cache is read or written."""
        return self.prompt_cache is not None or self.save_prompt_cache is not None


@dataclass(frozen=True, kw_only=True)
class ModelHome:
    """The folder of a model, None for one in memory, and how its runtime opens such folders."""

    folder: Path | None
    open: Callable[[Path], Decoder]
    files: Callable[[Path], Iterable[Path]] = weight_files


@dataclass(frozen=True, kw_only=True)
class Start:
    """The parts of a generation: a decoder that may speculate, and prompts as ids.

    `cached` ids of the only prompt are in the decoder's cache. `acceptance` counts guesses while
    they are made. `notes` are sentences for the user. `owner` is the owner of a cache that a
    conversation is to write at its end, None without one.
    """

    decoder: Decoder
    prompts: list[list[int]]
    cached: int = 0
    acceptance: Acceptance | None = None
    notes: list[str] = field(default_factory=list)
    owner: CacheOwner | None = None

    @property
    def batch_size(self) -> int | None:
        """1 for speculative decoding, which continues one prompt after the other, else None."""
        return None if self.acceptance is None else 1


def start(
    shortcuts: Shortcuts,
    decoder: Decoder,
    tokenizer: ModelTokenizer,
    prompts: Sequence[str | Sequence[int]],
    home: ModelHome,
    max_tokens: int | None = None,
) -> Start:
    """Load what a request for `max_tokens` tokens after texts or ids needs, and check it.

    An empty prompt behind a prompt cache stands for the text of the cache. Raises SessaError before
    the model runs.
    """
    draft = _open_draft(shortcuts, decoder, tokenizer, home)
    if shortcuts.caches:
        ids, cached, notes = _open_prompt(shortcuts, decoder, tokenizer, prompts, home, max_tokens)
        found = Start(decoder=decoder, prompts=[ids], cached=cached, notes=notes)
    else:
        texts = [_ids(tokenizer, prompt) for prompt in prompts]
        found = Start(decoder=decoder, prompts=texts)
    return _speculating(shortcuts, draft, found)


def start_conversation(
    shortcuts: Shortcuts, decoder: Decoder, tokenizer: ModelTokenizer, home: ModelHome
) -> Start:
    """Load what a conversation needs, and check it; the only prompt is the text of the cache.

    Raises SessaError before the model runs.
    """
    draft = _open_draft(shortcuts, decoder, tokenizer, home)
    known: list[int] = []
    owner = None
    if shortcuts.caches:
        target, owner = _target(shortcuts), _owner(decoder, tokenizer, home)
        if shortcuts.prompt_cache is not None:
            known = load_prompt_cache(Path(shortcuts.prompt_cache), decoder, owner)
        owner = owner if target is not None else None
    cached = decoder.length if known else 0
    found = Start(decoder=decoder, prompts=[known], cached=cached, owner=owner)
    return _speculating(shortcuts, draft, found)


def _speculating(shortcuts: Shortcuts, draft: Decoder | None, found: Start) -> Start:
    """The same start with a decoder that guesses tokens, if it is to."""
    if not shortcuts.guesses:
        return found
    decoder = speculate(
        found.decoder,
        draft=draft,
        draft_tokens=shortcuts.draft_tokens,
        prompt_lookup=shortcuts.prompt_lookup,
        tokens=found.prompts[0][: found.cached] if found.cached else (),
    )
    return replace(found, decoder=decoder, acceptance=decoder.acceptance)


def _open_draft(
    shortcuts: Shortcuts, decoder: Decoder, tokenizer: ModelTokenizer, home: ModelHome
) -> Decoder | None:
    """The draft model, if there is one; SessaError where no guess can be undone."""
    if shortcuts.guesses:
        require_trimmable_model(decoder.config, "the model")
    if shortcuts.draft_model is None:
        return None
    folder = Path(shortcuts.draft_model)
    require(folder.is_dir(), f"{folder}: no such folder for `draft_model`")
    draft = home.open(folder)
    require_trimmable_model(draft.config, f"the draft model {folder}")
    require_same_size(decoder.config, draft.config)
    require_same_tokens(
        tokenizer.tokenizer, ModelTokenizer.open(folder, draft.config).tokenizer, str(folder)
    )
    return draft


def _open_prompt(
    shortcuts: Shortcuts,
    decoder: Decoder,
    tokenizer: ModelTokenizer,
    prompts: Sequence[str | Sequence[int]],
    home: ModelHome,
    max_tokens: int | None,
) -> tuple[list[int], int, list[str]]:
    """Read the prompt, as far as a cache does not hold it, and write its cache.

    Returns the ids of the prompt, how many of them the decoder has read, and notes.
    """
    if len(prompts) != 1:
        raise SessaError(f"a prompt cache holds one prompt; {len(prompts)} were given")
    target, owner = _target(shortcuts), _owner(decoder, tokenizer, home)
    known: list[int] = []
    if shortcuts.prompt_cache is not None:
        known = load_prompt_cache(Path(shortcuts.prompt_cache), decoder, owner)
    ids = known if known and prompts[0] == "" else _ids(tokenizer, prompts[0])
    token_budget(decoder.config, len(ids), max_tokens)
    cached, notes = 0, []
    if known:
        cached = reuse_prefix(decoder, known, ids)
        notes.append(f"the prompt cache holds {cached} of {len(ids)} tokens of the prompt")
        if cached == 0 and not decoder.trimmable:
            notes.append(
                "the prompt is read from its beginning, because it is no continuation of the "
                "cached text and the state of a Mamba-2 layer cannot be rolled back"
            )
    if target is not None:
        if cached < len(ids) - 1:
            prefill(decoder, np.array([ids[cached:-1]], np.int64), None)
        cached = len(ids) - 1
        save_prompt_cache(target, decoder, ids, owner)
    return ids, cached, notes


def _owner(decoder: Decoder, tokenizer: ModelTokenizer, home: ModelHome) -> CacheOwner:
    """The owner of the model's caches; SessaError for a model in memory."""
    if home.folder is None:
        raise SessaError(
            "a prompt cache is checked against the files of a model; give its folder, not a model "
            "in memory"
        )
    return cache_owner(home.folder, decoder.config, tokenizer.tokenizer, home.files(home.folder))


def _target(shortcuts: Shortcuts) -> Path | None:
    """The file to write a cache to; SessaError where no file can be."""
    if shortcuts.save_prompt_cache is None:
        return None
    target = Path(shortcuts.save_prompt_cache)
    require(target.parent.is_dir(), f"{target}: there is no folder {target.parent}")
    require(not target.is_dir(), f"{target}: is a folder, expected the name of a file")
    return target


def _ids(tokenizer: ModelTokenizer, prompt: str | Sequence[int]) -> list[int]:
    return tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
