"""One generation loop for every runtime: padding, prefill, decoding, stopping, streaming."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from sessa_common.config import SessaConfig
from sessa_common.data.tokenizer import encode_text
from sessa_common.errors import SessaError
from sessa_common.inference.sampling import Sampler, SamplingConfig
from sessa_common.json_files import read_json

# Used when the caller names no number and the context has room for it.
MAX_TOKENS = 200
PREFILL_CHUNK = 512


class Decoder(Protocol):
    """A model with its cache, as each runtime provides it: token ids in, float32 logits out.

    Every call appends T tokens to the P that the cache holds. tokens (B, T) int64; mask (B, P+T),
    nonzero for a real token, may be left out: what was given before stands, new tokens are real.
    """

    config: SessaConfig

    def reset(self) -> None:
        """Empty the cache."""

    def logits(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Append tokens and return the logits of all of them, (B, T, V)."""

    def step(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Append tokens and return the logits of the last, (B, V)."""


def token_budget(config: SessaConfig, longest: int, max_tokens: int | None) -> int:
    """How many tokens may follow `longest` ones; SessaError when the context is too short."""
    room = config.max_position_embeddings - longest
    if max_tokens is None:
        max_tokens = min(MAX_TOKENS, max(room, 1))
    if max_tokens < 1:
        raise SessaError(f"max_tokens is {max_tokens}, expected at least 1")
    if max_tokens > room:
        raise SessaError(
            f"the prompt has {longest} tokens and {max_tokens} more were asked for, but the model "
            f"reads at most {config.max_position_embeddings} (max_position_embeddings); "
            "shorten the prompt or ask for fewer tokens"
        )
    return max_tokens


def left_pad(
    prompts: Sequence[Sequence[int]], pad_id: int = 0
) -> tuple[np.ndarray, np.ndarray | None]:
    """Prompts as one int64 array (B, T), shorter ones filled on the left, and its mask or None."""
    longest = max(map(len, prompts))
    tokens = np.full((len(prompts), longest), pad_id, np.int64)
    mask = np.zeros(tokens.shape, np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return tokens, None if mask.all() else mask


def prefill(
    decoder: Decoder, tokens: np.ndarray, mask: np.ndarray | None, chunk: int = PREFILL_CHUNK
) -> np.ndarray:
    """Feed tokens (B, T) in pieces of `chunk` and return the last logits (B, V)."""
    for start in range(0, tokens.shape[1], chunk):
        stop = start + chunk
        last = decoder.step(tokens[:, start:stop], None if mask is None else mask[:, :stop])
    return last


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    max_tokens: int | None = None,
    stop: Collection[int] = (),
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[list[int | None]]:
    """Continue prompts of any lengths; each turn yields one id a row, None for a row that ended.

    A row ends at an id of `stop`, which is not yielded. Row r draws from the random stream
    (seed, r), whatever else is in the batch. Raises SessaError, before the model runs, for an empty
    prompt, an id out of range, or more tokens than max_position_embeddings.
    """
    if not prompts or not all(map(len, prompts)):
        raise SessaError("a prompt is empty; give at least one token")
    for prompt in prompts:
        if min(prompt) < 0 or max(prompt) >= decoder.config.vocab_size:
            wrong = next(i for i in prompt if not 0 <= i < decoder.config.vocab_size)
            raise SessaError(f"token id {wrong} is out of range 0..{decoder.config.vocab_size - 1}")
    if prefill_chunk < 1:
        raise SessaError(f"prefill_chunk is {prefill_chunk}, expected at least 1")
    budget = token_budget(decoder.config, max(map(len, prompts)), max_tokens)
    return _generate(decoder, prompts, sampling, budget, stop, prefill_chunk)


def _generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    budget: int,
    stop: Collection[int],
    chunk: int,
) -> Iterator[list[int | None]]:
    samplers = [Sampler(sampling, row) for row in range(len(prompts))]
    running = [True] * len(prompts)
    decoder.reset()
    logits = prefill(decoder, *left_pad(prompts), chunk)
    for turn in range(budget):
        picked = [
            sampler(row) if on else 0
            for sampler, row, on in zip(samplers, logits, running, strict=True)
        ]
        running = [on and token not in stop for on, token in zip(running, picked, strict=True)]
        if not any(running):
            return
        yield [token if on else None for on, token in zip(running, picked, strict=True)]
        if turn + 1 < budget:
            logits = decoder.step(np.array(picked, np.int64)[:, None])


class TextStream:
    """Turns token ids into pieces of text that add up to the whole and never split a character.

    `before` are the ids of the text that the pieces continue: with some tokenizers they decide
    whether the first piece begins with a space.
    """

    # A character has at most four bytes, so at most three of its bytes can be waiting.
    LONGEST_WAIT = 3

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = list(before[-self.LONGEST_WAIT - 1 :])
        self.start, self.clean = 0, len(self.ids)
        self.sent = len(self._decode(0))

    def push(self, token: int) -> str:
        """Add one token; returns the text that is now certain, possibly none."""
        self.ids.append(token)
        text = self._decode(self.start)
        waiting = len(text) - len(text.rstrip("\ufffd"))
        sure = len(text) - min(waiting, self.LONGEST_WAIT)
        piece = text[self.sent : sure]
        self.sent = max(self.sent, sure)
        if not waiting:
            # The last clean piece stays in view: some decoders treat the first token differently.
            self.start, self.clean = self.clean, len(self.ids)
            self.sent = len(self._decode(self.start))
        return piece

    def finish(self) -> str:
        """The text that was held back; call it once, at the end."""
        return self._decode(self.start)[self.sent :]

    def _decode(self, start: int) -> str:
        return self.tokenizer.decode(self.ids[start:], skip_special_tokens=True)


def stop_tokens(folder: Path, config: SessaConfig) -> frozenset[int]:
    """The ids that end a text: eos_token_id of generation_config.json, else of config.json."""
    path = folder / "generation_config.json"
    given = read_json(path).get("eos_token_id") if path.is_file() else None
    given = config.eos_token_id if given is None else given
    if given is None:
        return frozenset()
    ids = given if isinstance(given, list) else [given]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise SessaError(f"{path}: eos_token_id is {given!r}, expected an id or a list of ids")
    return frozenset(ids)


def encode_prompt(tokenizer: Tokenizer, text: str, config: SessaConfig) -> list[int]:
    """Token ids of a prompt; the empty prompt becomes the token that begins a text."""
    if text:
        return encode_text(tokenizer, text, "the prompt")
    begin = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    if begin is None:
        raise SessaError("the prompt is empty and the model has no bos_token_id; give some text")
    return [begin]
