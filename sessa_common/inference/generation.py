"""One generation loop for every runtime: padding, prefill, decoding, stopping, streaming."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import numpy as np

from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError, expect
from sessa_common.inference.logit_rules import RowRules
from sessa_common.inference.sampling import GumbelNoise, SamplingConfig, choose

# Tokens to write when the caller gives no number and the context has room for them.
MAX_TOKENS = 200
PREFILL_CHUNK = 512
NOTHING_FED = "nothing was fed to the decoder since its cache changed; feed a token"


class Decoder(Protocol):
    """A model with its cache, as each runtime provides it: token ids in, float32 logits out.

    `feed`, `step` and `logits` append T tokens to the P that the cache holds. tokens are (B, T)
    int64. mask is (B, P+T), nonzero for a real token; without it the mask of the past stays and the
    new tokens are real.
    """

    config: SessaConfig

    @property
    def length(self) -> int:
        """The number of positions in the cache, padding included."""

    @property
    def trimmable(self) -> bool:
        """True if `trim` can drop some positions; False when a layer is Mamba-2."""

    def reset(self) -> None:
        """Empty the cache."""

    def logits(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Append tokens and return the logits of all of them, (B, T, V)."""

    def step(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Append tokens and return the logits of the last, (B, V)."""

    def feed(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append tokens; the logits of the last stay on the device for `draw`."""

    def draw(
        self, sampling: SamplingConfig, budget: int, noise: GumbelNoise | None = None
    ) -> Generator[np.ndarray, None, None]:
        """Continue what `feed` or `step` appended: yield ids (B,) int64, at most `budget` times.

        The ids are those that `sampling.choose` takes from the logits; row r draws from the stream
        (seed, r), or from `noise`, of which as many draws are taken as ids are yielded. A runtime
        may run ahead on the device. When the iterator ends or is closed, the cache holds all that
        was fed and every yielded id except the last; the caller must close an iterator that it
        leaves before the end. SessaError when the logits are not finite, or when nothing was fed.
        """

    def trim(self, count: int) -> None:
        """Drop the last `count` positions, which is exact; feed a token before the next draw.

        Raises SessaError for more positions than there are, and for a part of them when a layer is
        Mamba-2, whose state cannot be rolled back. Nothing is changed then.
        """

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch, in this order; feed a token before the next draw."""

    def fork(self, rows: Sequence[int] = ()) -> Self:
        """Return another decoder of the same model that holds a copy of these rows, or no rows.

        A row may be named several times. Leading positions that are padding in all of them are
        left out. Feed a token to the new decoder before its next draw.
        """

    def join(self, other: Self) -> None:
        """Append the rows of another decoder of the same model; feed a token before the next draw.

        Neither may be empty. The shorter rows get padding on the left.
        """

    def cache_arrays(self) -> dict[str, np.ndarray]:
        """Copy the cache into arrays of the names and shapes of `cache_contents.cache_shapes`.

        bfloat16 arrays have the dtype of ml_dtypes. An empty cache gives an empty dict.
        """

    def restore_cache(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace the cache by arrays that `cache_arrays` gave, of any runtime.

        The continuation is bit for bit that of the cache that was copied. Feed a token before the
        next draw. Raises SessaError for a cache of another model or dtype; nothing is changed then.
        """


@runtime_checkable
class RuleDecoder(Protocol):
    """A decoder whose `draw` applies rules on logits itself."""

    takes_rules: bool

    def draw(
        self,
        sampling: SamplingConfig,
        budget: int,
        noise: GumbelNoise | None = None,
        rules: RowRules | None = None,
    ) -> Generator[np.ndarray, None, None]:
        """Continue as `Decoder.draw` does, with logits that the rules have changed."""


def draw_on_host(
    decoder: Decoder,
    logits: np.ndarray | None,  # (B, V)
    sampling: SamplingConfig,
    budget: int,
    noise: GumbelNoise | None = None,
    rules: RowRules | None = None,
) -> Generator[np.ndarray, None, None]:
    """`Decoder.draw` for a runtime whose logits come to the host, and for rules on logits.

    `logits` are those of the last token, None when nothing was fed.
    """
    if logits is None:
        raise SessaError(NOTHING_FED)
    noise = noise or GumbelNoise(sampling.seed, range(len(logits)), logits.shape[-1])
    for turn in range(budget):
        ids = choose(rules.apply(logits) if rules else logits, sampling, noise)
        if rules:
            rules.accept(ids)
        yield ids
        if turn + 1 < budget:
            logits = decoder.step(ids[:, None])


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


def prefill_size(decoder: Decoder, B: int = 1) -> int:
    """The number of tokens of each of B rows that `prefill` appends at once."""
    return max(getattr(decoder, "prefill_tokens", 0) // B, PREFILL_CHUNK)


def prefill(
    decoder: Decoder, tokens: np.ndarray, mask: np.ndarray | None, chunk: int | None = None
) -> np.ndarray:
    """Append tokens (B, T) in pieces of `chunk` and return the last logits (B, V).

    Without a size the pieces have PREFILL_CHUNK tokens of each row, or as many as fit into the
    `prefill_tokens` of all rows together that a decoder may have as an attribute. The mask (B, P+T)
    includes the P positions that are cached already.
    """
    past, (B, T) = decoder.length, tokens.shape
    chunk = chunk or prefill_size(decoder, B)
    last = (T - 1) // chunk * chunk
    for start in range(0, last, chunk):
        stop = start + chunk
        decoder.feed(tokens[:, start:stop], None if mask is None else mask[:, : past + stop])
    return decoder.step(tokens[:, last:], mask)


def shared_prefix(first: Sequence[int] | np.ndarray, second: Sequence[int] | np.ndarray) -> int:
    """The number of ids at the start of two texts that are the same."""
    length = min(len(first), len(second))
    differs = np.asarray(first[:length]) != np.asarray(second[:length])
    return int(differs.argmax()) if differs.any() else length


def reuse_prefix(decoder: Decoder, cached: Sequence[int], prompt: Sequence[int]) -> int:
    """Trim a cache of the ids `cached` to what it shares with a prompt; return how many ids stay.

    `cached` may go on behind what the cache holds. At least one id of the prompt is left to feed. A
    cache that cannot be trimmed is emptied unless the prompt goes on where it ends.
    """
    shared = min(decoder.length, shared_prefix(cached, prompt[:-1]))
    if shared < decoder.length and not decoder.trimmable:
        shared = 0
    decoder.trim(decoder.length - shared)
    return shared


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    max_tokens: int | None = None,
    stop: Collection[int] = (),
    prefill_chunk: int | None = None,
    cached: int = 0,
    streams: Sequence[int] | None = None,
    rules: RowRules | None = None,
    ended: Collection[int] = (),
) -> Generator[list[int | None], None, None]:
    """Continue prompts of any lengths; each turn yields one id a row, None for a row that ended.

    A row ends at an id of `stop`, which is not yielded, or when the caller adds it to `ended`.
    Row r draws from the random stream (seed, r), or (seed, streams[r]), whatever else is in the
    batch. `cached` is the number of ids at the start of the only prompt that the cache holds
    already. `rules`, begun with these prompts, change the logits, and tokens are then chosen on the
    host. When the iterator ends or is closed, the cache holds the prompts and every drawn id except
    the last. Raises SessaError, before the model runs, for an empty prompt, an id out of range, or
    more tokens than max_position_embeddings.
    """
    if not prompts or not all(map(len, prompts)):
        raise SessaError("a prompt is empty; give at least one token")
    for prompt in prompts:
        if min(prompt) < 0 or max(prompt) >= decoder.config.vocab_size:
            wrong = next(i for i in prompt if not 0 <= i < decoder.config.vocab_size)
            raise SessaError(f"token id {wrong} is out of range 0..{decoder.config.vocab_size - 1}")
    expect(
        prefill_chunk is None or prefill_chunk >= 1, "prefill_chunk", prefill_chunk, "at least 1"
    )
    fits = cached == 0 or (len(prompts) == 1 and cached < len(prompts[0]))
    expect(fits, "cached", cached, "0, or fewer than the tokens of a single prompt")
    budget = token_budget(decoder.config, max(map(len, prompts)), max_tokens)
    noise = GumbelNoise(
        sampling.seed,
        range(len(prompts)) if streams is None else streams,
        decoder.config.vocab_size,
    )
    batch = _Batch(decoder, sampling, noise, rules)
    return _generate(batch, prompts, budget, stop, prefill_chunk, cached, ended)


@dataclass
class _Batch:
    """The needs of the rows of a decoder to go on: noise, and the rules on their logits if any."""

    decoder: Decoder
    sampling: SamplingConfig
    noise: GumbelNoise
    rules: RowRules | None
    last: np.ndarray | None = None  # logits (B, V), where rules need them on the host

    def start(self, prompts: Sequence[Sequence[int]], chunk: int | None, cached: int) -> None:
        """Read the prompts, from the position `cached` of a cache that holds what is before."""
        if cached == 0:
            self.decoder.reset()
        tokens, mask = left_pad(prompts)
        self.last = prefill(self.decoder, tokens[:, cached:], mask, chunk)

    def draw(self, budget: int) -> Generator[np.ndarray, None, None]:
        """Draw ids (B,), at most `budget` times."""
        if self.rules is None:
            return self.decoder.draw(self.sampling, budget, self.noise)
        if isinstance(self.decoder, RuleDecoder):
            return self.decoder.draw(self.sampling, budget, self.noise, self.rules)
        return draw_on_host(self.decoder, self.last, self.sampling, budget, self.noise, self.rules)

    def keep(self, rows: list[int], ids: np.ndarray) -> None:
        """Keep only these rows, after the ids (B,) that were drawn last."""
        self.decoder.keep(rows)
        self.noise.keep(rows)
        if self.rules is None:
            self.decoder.feed(ids[rows, None])
        else:
            self.rules.keep(rows)
            self.last = self.decoder.step(ids[rows, None])


def _generate(
    batch: _Batch,
    prompts: Sequence[Sequence[int]],
    budget: int,
    stop: Collection[int],
    chunk: int | None,
    cached: int,
    ended: Collection[int],
) -> Generator[list[int | None], None, None]:
    batch.start(prompts, chunk, cached)
    rows = list(range(len(prompts)))  # which prompt each row of the batch continues
    running = set(rows)
    while running and budget:
        with closing(batch.draw(budget)) as drawn:
            for ids in drawn:
                budget -= 1
                found = _running_ids(rows, ids, running, stop, len(prompts))
                if running:
                    yield found
                    running.difference_update(ended)
                # Leaving costs a copy of the cache, so rows leave when half of them have ended.
                if 2 * len(running) <= len(rows):
                    break
        if running and budget:
            stay = [i for i, row in enumerate(rows) if row in running]
            batch.keep(stay, ids)
            rows = [rows[i] for i in stay]


def _running_ids(
    rows: list[int], ids: np.ndarray, running: set[int], stop: Collection[int], B: int
) -> list[int | None]:
    """The drawn id of each of B prompts, None for an ended one; a stop id ends its prompt."""
    found: list[int | None] = [None] * B
    for row, token in zip(rows, ids.tolist(), strict=True):
        if row in running and token in stop:
            running.remove(row)
        elif row in running:
            found[row] = token
    return found
