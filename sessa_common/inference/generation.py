"""One generation loop for every runtime: padding, prefill, decoding, stopping, streaming."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError, expect
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_common.inference.sampling import Sampler, SamplingConfig

# Tokens to write when the caller gives no number and the context has room for them.
MAX_TOKENS = 200
PREFILL_CHUNK = 512


class Decoder(Protocol):
    """A model with its cache, as each runtime provides it: token ids in, float32 logits out.

    Every call appends T tokens to the P that the cache holds. tokens are (B, T) int64. mask is
    (B, P+T), nonzero for a real token; without it the mask of the past stays and the new tokens are
    real.
    """

    config: SessaConfig

    def reset(self) -> None:
        """Empty the cache."""

    def logits(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Append tokens and return the logits of all of them, (B, T, V)."""

    def step(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Append tokens and return the logits of the last, (B, V)."""


def token_budget(config: SessaConfig, longest: int, max_tokens: int | None) -> int:
    """The number of tokens to write after `longest` ones; SessaError when there is no room."""
    room = config.max_position_embeddings - longest
    if max_tokens is None:
        max_tokens = min(MAX_TOKENS, max(room, 1))
    expect(max_tokens >= 1, "max_tokens", max_tokens, "at least 1")
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
    """Return prompts as one int64 array (B, T), padded on the left, and its mask.

    The mask is None when all prompts have the same length.
    """
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
    expect(prefill_chunk >= 1, "prefill_chunk", prefill_chunk, "at least 1")
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


@dataclass(frozen=True)
class Continuation:
    """A text that a model wrote after a prompt, and the number of its tokens."""

    text: str
    tokens: int


def generate_texts(
    decoder: Decoder,
    tokenizer: ModelTokenizer,
    prompts: Sequence[str],
    sampling: SamplingConfig,
    *,
    max_tokens: int | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Continuation]:
    """Continue prompts until an end token or `max_tokens` (200, or what the context has room for).

    `on_text(row, piece)` is called with each piece of text as soon as it is certain. Raises
    SessaError, before the model runs, as `generate` does.
    """
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    steps = generate(decoder, ids, sampling, max_tokens=max_tokens, stop=tokenizer.stop_ids)
    streams = [TextStream(tokenizer.tokenizer, prompt) for prompt in ids]
    pieces: list[list[str]] = [[] for _ in prompts]
    counts = [0] * len(prompts)

    def add(row: int, piece: str) -> None:
        pieces[row].append(piece)
        if on_text is not None and piece:
            on_text(row, piece)

    for step in steps:
        for row, token in enumerate(step):
            if token is not None:
                counts[row] += 1
                add(row, streams[row].push(token))
    for row, stream in enumerate(streams):
        add(row, stream.finish())
    return [Continuation("".join(p), n) for p, n in zip(pieces, counts, strict=True)]


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
        """Add one token and return the text that is now certain, possibly none."""
        self.ids.append(token)
        text = self._decode(self.start)
        waiting = len(text) - len(text.rstrip("\ufffd"))
        certain = len(text) - min(waiting, self.LONGEST_WAIT)
        piece = text[self.sent : certain]
        self.sent = max(self.sent, certain)
        if not waiting:
            # The last clean piece stays in view: some decoders treat the first token differently.
            self.start, self.clean = self.clean, len(self.ids)
            self.sent = len(self._decode(self.start))
        return piece

    def finish(self) -> str:
        """Return the text that was held back; to be called once, at the end."""
        return self._decode(self.start)[self.sent :]

    def _decode(self, start: int) -> str:
        return self.tokenizer.decode(self.ids[start:], skip_special_tokens=True)
