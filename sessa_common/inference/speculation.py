"""Speculative decoding: guessed tokens that the model checks, several positions in one call.

A guess is kept where it is the token that the model draws itself, from its own logits and with the
random numbers that it would use without speculation. So a seed gives the same text with and without
speculation, whoever guesses, and the distribution of the text is the model's (drafter-invariant
speculative decoding, arXiv 2408.07978). The rows that one call checks are rounded otherwise than
rows that are computed one by one: two tokens whose scores differ by less than that may change
places.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from tokenizers import Tokenizer

from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError, expect
from sessa_common.inference.cache_contents import is_trimmable
from sessa_common.inference.generation import Decoder, prefill, shared_prefix
from sessa_common.inference.logit_rules import RowRules
from sessa_common.inference.sampling import GumbelNoise, SamplingConfig, pick

# Guesses of a draft model in one round.
DRAFT_TOKENS = 4
# Prompt look-up searches a text for its last four tokens, else for the last three, else for two.
LONGEST_MATCH, SHORTEST_MATCH = 4, 2

# Draws the token of a guesser's logits (V,) for the next position, the one after it, and so on.
Draw = Callable[[np.ndarray, int], int]


@dataclass
class Acceptance:
    """Counts of speculative decoding: rounds of checking, guesses made, and guesses kept."""

    rounds: int = 0
    guessed: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        """The share of the guesses that were kept, 0 when there were none."""
        return self.accepted / self.guessed if self.guessed else 0.0

    def __str__(self) -> str:
        return (
            f"{self.accepted:,} of {self.guessed:,} guessed tokens were right ({self.rate:.0%}), "
            f"checked in {self.rounds:,} calls of the model"
        )


class Guesser(Protocol):
    """Guesses how a text goes on."""

    def guess(self, text: np.ndarray, count: int, draw: Draw) -> list[int]:
        """Return at most `count` ids that may follow the ids of `text` (P,) int64.

        `draw(logits, i)` draws guess i with the sampling and the random numbers of the model.
        """


class PromptLookup:
    """Guesses that the text goes on as it did after the last earlier place with the same tokens."""

    def guess(self, text: np.ndarray, count: int, draw: Draw) -> list[int]:
        """Return the `count` ids that followed the longest match, none without one."""
        for size in range(min(LONGEST_MATCH, len(text) - 1), SHORTEST_MATCH - 1, -1):
            ends = np.lib.stride_tricks.sliding_window_view(text[:-1], size)
            found = np.flatnonzero((ends == text[-size:]).all(-1))
            if found.size:
                start = int(found[-1]) + size
                # A match near the end runs into the guesses themselves, which then repeat.
                period = text[start:]
                return np.resize(period, count).tolist()
        return []


class DraftModel:
    """Guesses with a smaller model of the same vocabulary."""

    def __init__(self, decoder: Decoder) -> None:
        require_trimmable_model(decoder.config, "the draft model")
        self.decoder = decoder
        self.read = np.zeros(0, np.int64)
        decoder.reset()

    def guess(self, text: np.ndarray, count: int, draw: Draw) -> list[int]:
        """Return `count` ids that the model draws; it reads what is new in the text first.

        A text that fills the context of the draft model leaves no room for guesses.
        """
        count = min(count, self.decoder.config.max_position_embeddings - len(text))
        if count <= 0:
            return []
        shared = shared_prefix(self.read, text[:-1])
        self.decoder.trim(self.decoder.length - shared)
        logits = prefill(self.decoder, text[None, shared:], None)[0]
        ids = [draw(logits, 0)]
        while len(ids) < count:
            logits = self.decoder.step(np.array([ids[-1:]], np.int64))[0]
            ids.append(draw(logits, len(ids)))
        self.read = np.concatenate([text, ids[:-1]])
        return ids


class SpeculativeDecoder:
    """A decoder of one sequence that draws by checking guesses; it is a `Decoder` itself.

    `tokens` are the ids that the cache of `decoder` holds already. `acceptance` counts. Raises
    SessaError when a layer is Mamba-2, whose state cannot be rolled back after a wrong guess.
    """

    takes_rules = True

    def __init__(
        self, decoder: Decoder, guesser: Guesser, count: int, tokens: Sequence[int] = ()
    ) -> None:
        require_trimmable_model(decoder.config, "the model")
        expect(count >= 1, "the number of guesses", count, "1 or more")
        self.decoder, self.guesser, self.count = decoder, guesser, count
        self.config: SessaConfig = decoder.config
        self.text = np.array(tokens, np.int64)
        self.acceptance = Acceptance()
        self.last: np.ndarray | None = None

    @property
    def length(self) -> int:
        """The number of positions in the cache."""
        return self.decoder.length

    @property
    def trimmable(self) -> bool:
        """True, because other models are refused."""
        return self.decoder.trimmable

    def reset(self) -> None:
        """Empty the cache."""
        self.decoder.reset()
        self.text, self.last = self.text[:0], None

    def logits(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Append tokens (1, T) and return the logits of all of them, (1, T, V)."""
        _require_one_row(tokens)
        logits = self.decoder.logits(tokens, mask)
        self.text, self.last = np.concatenate([self.text, tokens[0]]), logits[0, -1]
        return logits

    def step(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Append tokens (1, T) and return the logits of the last, (1, V)."""
        _require_one_row(tokens)
        logits = self.decoder.step(tokens, mask)
        self.text, self.last = np.concatenate([self.text, tokens[0]]), logits[0]
        return logits

    def feed(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append tokens (1, T)."""
        self.step(tokens, mask)

    def trim(self, count: int) -> None:
        """Drop the last `count` positions."""
        self.decoder.trim(count)
        self.text, self.last = self.text[: self.length], None

    def keep(self, rows: Sequence[int]) -> None:
        """Keep the only row."""
        self.decoder.keep(rows)

    def fork(self, rows: Sequence[int] = ()) -> Self:
        """Refuse: the guesser cannot be copied; fork the decoder of the model."""
        raise SessaError("a decoder that speculates cannot be copied")

    def join(self, other: Self) -> None:
        """Refuse: speculative decoding continues one prompt."""
        raise SessaError("speculative decoding continues one prompt, so no rows can join it")

    def cache_arrays(self) -> dict[str, np.ndarray]:
        """Copy the cache of the model; the guesser is no part of it."""
        return self.decoder.cache_arrays()

    def restore_cache(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Refuse: restore the cache of the model, then give its `tokens` to a new decoder."""
        raise SessaError("restore the cache before the decoder is made that speculates on it")

    def draw(
        self,
        sampling: SamplingConfig,
        budget: int,
        noise: GumbelNoise | None = None,
        rules: RowRules | None = None,
    ) -> Generator[np.ndarray, None, None]:
        """Continue what was appended: yield ids (1,) as `Decoder.draw` does, a round at a time.

        `rules` change the logits of the model. Guesses are made without them.
        """
        if self.last is None:
            raise SessaError("nothing was fed to the decoder since its cache changed; feed a token")
        noise = noise or GumbelNoise(sampling.seed, [0], self.config.vocab_size)
        chooser = _Chooser(sampling, noise, rules)
        ids, ahead = [chooser.choose(self.last, 0)], 1
        self.last = None
        try:
            while True:
                for token in ids:
                    chooser.take()
                    budget, ahead = budget - 1, ahead - 1
                    yield np.array([token], np.int64)
                if not budget:
                    return
                ids = self._check(ids[-1], min(self.count, budget - 1), chooser)
                ahead = len(ids)
        finally:
            # Right guesses that nobody took leave the cache.
            self.trim(ahead)

    def _check(self, token: int, count: int, chooser: _Chooser) -> list[int]:
        """Append a drawn token and the guesses after it that are right; return what follows it.

        These are the right guesses and one more token, which is not appended.
        """
        guesses = self.guesser.guess(np.append(self.text, token), count, chooser.guess)
        rows = np.array([[token, *guesses]], np.int64)
        ids: list[int] = []
        for i, logits in enumerate(self.logits(rows)[0]):
            ids.append(chooser.choose(logits, i))
            if guesses[i : i + 1] != ids[-1:]:
                break
        self.trim(len(guesses) - len(ids) + 1)
        self.acceptance.rounds += 1
        self.acceptance.guessed += len(guesses)
        self.acceptance.accepted += len(ids) - 1
        return ids


class _Chooser:
    """Chooses the tokens of one sequence some positions ahead of those that were yielded."""

    def __init__(
        self, sampling: SamplingConfig, noise: GumbelNoise, rules: RowRules | None
    ) -> None:
        self.sampling, self.noise, self.rules = sampling, noise, rules

    def guess(self, logits: np.ndarray, i: int) -> int:
        """Choose from logits (V,) for the position i after the last yielded one."""
        noise = self.noise.peek(i) if self.sampling.temperature > 0 else None
        return int(pick(logits[None], self.sampling, noise)[0])

    def choose(self, logits: np.ndarray, i: int) -> int:
        """Choose as `guess` does after the rules, which then count the id as written."""
        if self.rules is None:
            return self.guess(logits, i)
        token = self.guess(self.rules.apply(logits[None])[0], i)
        self.rules.accept(np.array([token]))
        return token

    def take(self) -> None:
        """Go on to the next position."""
        if self.sampling.temperature > 0:
            self.noise.take()


def speculate(
    decoder: Decoder,
    *,
    draft: Decoder | None = None,
    draft_tokens: int = DRAFT_TOKENS,
    prompt_lookup: int = 0,
    tokens: Sequence[int] = (),
) -> SpeculativeDecoder:
    """Let a draft model guess `draft_tokens` tokens a round, or a look-up `prompt_lookup` tokens.

    `tokens` are the ids that the cache of `decoder` holds. Raises SessaError for both ways of
    guessing or none, for numbers below 1, for a draft model of another vocabulary, and for a model
    with a Mamba-2 layer.
    """
    if (draft is None) == (prompt_lookup == 0):
        raise SessaError("give `draft_model` or `prompt_lookup`, one of them")
    if draft is None:
        expect(prompt_lookup >= 1, "prompt_lookup", prompt_lookup, "1 or more")
        return SpeculativeDecoder(decoder, PromptLookup(), prompt_lookup, tokens)
    expect(draft_tokens >= 1, "draft_tokens", draft_tokens, "1 or more")
    require_same_size(decoder.config, draft.config)
    return SpeculativeDecoder(decoder, DraftModel(draft), draft_tokens, tokens)


def require_same_size(model: SessaConfig, draft: SessaConfig) -> None:
    """Raise SessaError unless the vocabularies of a model and its draft model are of one size."""
    if model.vocab_size != draft.vocab_size:
        raise SessaError(
            f"the model has a vocabulary of {model.vocab_size} and the draft model one of "
            f"{draft.vocab_size}; a draft model must have the same"
        )


def require_same_tokens(tokenizer: Tokenizer, draft: Tokenizer, where: str) -> None:
    """Raise SessaError, which names the draft model, unless each id means one token to both."""
    mine, other = tokenizer.get_vocab(), draft.get_vocab()
    if wrong := sorted(mine.items() ^ other.items(), key=lambda item: item[1]):
        raise SessaError(
            f"{where}: its tokenizer differs from the model's at token id {wrong[0][1]}; a draft "
            "model must have the same vocabulary"
        )


def require_trimmable_model(config: SessaConfig, name: str) -> None:
    """Raise SessaError, which calls the model `name`, when wrong guesses cannot be undone."""
    if not is_trimmable(config):
        layer = next(i for i, kind in enumerate(config.kinds) if not kind.attends)
        raise SessaError(
            f"layer {layer} of {name} is {config.kinds[layer].name}, whose state cannot be rolled "
            "back after a wrong guess; run it without `draft_model` and `prompt_lookup`"
        )


def _require_one_row(tokens: np.ndarray) -> None:
    if len(tokens) != 1:
        raise SessaError(
            f"speculative decoding continues one prompt at a time; {len(tokens)} were given"
        )
