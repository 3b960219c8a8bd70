"""One generation loop for every runtime: padding, prefill, decoding, stopping, streaming."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError, expect
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_common.inference.sampling import GumbelNoise, SamplingConfig, choose
from sessa_common.inference.text_stream import TextStream

# Tokens to write when the caller gives no number and the context has room for them.
MAX_TOKENS = 200
PREFILL_CHUNK = 512


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
        """Whether `trim` can drop some positions; False when a layer is Mamba-2."""

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

    def cache_arrays(self) -> dict[str, np.ndarray]:
        """Copy the cache into arrays of the names and shapes of `cache_contents.cache_shapes`.

        bfloat16 arrays have the dtype of ml_dtypes. An empty cache gives an empty dict.
        """

    def restore_cache(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace the cache by arrays that `cache_arrays` gave, of any runtime.

        The continuation is bit for bit that of the cache that was copied. Feed a token before the
        next draw. Raises SessaError for a cache of another model or dtype; nothing is changed then.
        """


def draw_on_host(
    decoder: Decoder,
    logits: np.ndarray | None,  # (B, V)
    sampling: SamplingConfig,
    budget: int,
    noise: GumbelNoise | None = None,
) -> Generator[np.ndarray, None, None]:
    """`Decoder.draw` for a runtime whose logits come to the host; `logits` are of the last token.

    They are None when nothing was fed.
    """
    if logits is None:
        raise SessaError("nothing was fed to the decoder since its cache changed; feed a token")
    noise = noise or GumbelNoise(sampling.seed, range(len(logits)), logits.shape[-1])
    for turn in range(budget):
        ids = choose(logits, sampling, noise)
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


def prefill(
    decoder: Decoder, tokens: np.ndarray, mask: np.ndarray | None, chunk: int = PREFILL_CHUNK
) -> np.ndarray:
    """Append tokens (B, T) in pieces of `chunk` and return the last logits (B, V).

    The mask (B, P+T) includes the P positions that are cached already.
    """
    past, T = decoder.length, tokens.shape[1]
    last = (T - 1) // chunk * chunk
    for start in range(0, last, chunk):
        stop = start + chunk
        decoder.feed(tokens[:, start:stop], None if mask is None else mask[:, : past + stop])
    return decoder.step(tokens[:, last:], mask)


def reuse_prefix(decoder: Decoder, cached: Sequence[int], prompt: Sequence[int]) -> int:
    """Trim a cache of the ids `cached` to what it shares with a prompt; return how many ids stay.

    At least one id of the prompt is left to feed. A cache that cannot be trimmed is emptied unless
    the prompt goes on where it ends.
    """
    pairs = zip(cached, prompt[:-1], strict=False)
    shared = next(
        (i for i, (a, b) in enumerate(pairs) if a != b), min(len(cached), len(prompt) - 1)
    )
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
    prefill_chunk: int = PREFILL_CHUNK,
    cached: int = 0,
) -> Generator[list[int | None], None, None]:
    """Continue prompts of any lengths; each turn yields one id a row, None for a row that ended.

    A row ends at an id of `stop`, which is not yielded. Row r draws from the random stream
    (seed, r), whatever else is in the batch. `cached` is the number of ids at the start of the only
    prompt that the cache holds already. When the iterator ends or is closed, the cache holds the
    prompts and every drawn id except the last. Raises SessaError, before the model runs, for an
    empty prompt, an id out of range, or more tokens than max_position_embeddings.
    """
    if not prompts or not all(map(len, prompts)):
        raise SessaError("a prompt is empty; give at least one token")
    for prompt in prompts:
        if min(prompt) < 0 or max(prompt) >= decoder.config.vocab_size:
            wrong = next(i for i in prompt if not 0 <= i < decoder.config.vocab_size)
            raise SessaError(f"token id {wrong} is out of range 0..{decoder.config.vocab_size - 1}")
    expect(prefill_chunk >= 1, "prefill_chunk", prefill_chunk, "at least 1")
    fits = cached == 0 or (len(prompts) == 1 and cached < len(prompts[0]))
    expect(fits, "cached", cached, "0, or fewer than the tokens of a single prompt")
    budget = token_budget(decoder.config, max(map(len, prompts)), max_tokens)
    return _generate(decoder, prompts, sampling, budget, stop, prefill_chunk, cached)


def _generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    budget: int,
    stop: Collection[int],
    chunk: int,
    cached: int,
) -> Generator[list[int | None], None, None]:
    if cached == 0:
        decoder.reset()
    tokens, mask = left_pad(prompts)
    prefill(decoder, tokens[:, cached:], mask, chunk)
    rows = list(range(len(prompts)))  # which prompt each row of the decoder continues
    noise = GumbelNoise(sampling.seed, rows, decoder.config.vocab_size)
    running = set(rows)
    while running and budget:
        with closing(decoder.draw(sampling, budget, noise)) as drawn:
            for ids in drawn:
                budget -= 1
                found = _running_ids(rows, ids, running, stop, len(prompts))
                if running:
                    yield found
                # Leaving costs a copy of the cache, so rows leave when half of them have ended.
                if 2 * len(running) <= len(rows):
                    break
        if running and budget:
            stay = [i for i, row in enumerate(rows) if row in running]
            rows = [rows[i] for i in stay]
            decoder.keep(stay)
            noise.keep(stay)
            decoder.feed(ids[stay, None])


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
