"""Texts of a request as they come from the engine: pieces, stop texts, log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from sessa_common.inference.text_stream import StopTexts, TextStream


@dataclass(frozen=True)
class TokenChance:
    """A token as text and its log-probability, natural logarithm."""

    text: str
    logprob: float


@dataclass(frozen=True)
class TokenChances:
    """A token that was drawn, and the likeliest ones in its place."""

    drawn: TokenChance
    likeliest: list[TokenChance]


@dataclass(frozen=True)
class Piece:
    """New text of choice `index`, what is known of its tokens, and why it ends, if it does."""

    index: int
    text: str
    chances: list[TokenChances] = field(default_factory=list)
    finish: str | None = None
    tokens: int = 0  # of the whole choice, known when it ends


class AnswerWriter:
    """A sink of the engine that passes pieces of text, and at last an error if any, to `emit`.

    `first` is the number of the request's first choice, `prompt` are its ids, `stop_texts` end a
    text and are no part of it. `likeliest` asks for the log-probabilities of drawn tokens and of so
    many others; they are those of the model's own logits, before temperature, filters and rules.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        n: int,
        emit: Callable[[Piece | Exception], None],
        *,
        first: int = 0,
        stop_texts: Sequence[str] = (),
        likeliest: int | None = None,
    ) -> None:
        self.tokenizer, self.emit = tokenizer, emit
        self.first, self.likeliest = first, likeliest
        self.streams = [TextStream(tokenizer, prompt) for _ in range(n)]
        self.stops = [StopTexts(stop_texts) for _ in range(n)]
        self.chances: list[list[TokenChances]] = [[] for _ in range(n)]
        self.counts = [0] * n

    def token(self, index: int, token: int, logits: np.ndarray) -> bool:
        """Take a token; return True when a stop text is complete."""
        self.counts[index] += 1
        if self.likeliest is not None:
            self.chances[index].append(self._chances(token, logits, self.likeliest))
        piece = self.stops[index].push(self.streams[index].push(token))
        if piece:
            self._emit(index, piece)
        return self.stops[index].found

    def end(self, index: int, reason: str) -> None:
        """Emit what was held back of a text, and why it ends."""
        stops, rest = self.stops[index], ""
        if not stops.found:
            rest = stops.push(self.streams[index].finish()) + stops.finish()
        self._emit(index, rest, reason)

    def fail(self, error: Exception) -> None:
        """Emit the error that ends the request."""
        self.emit(error)

    def _emit(self, index: int, text: str, finish: str | None = None) -> None:
        chances, self.chances[index] = self.chances[index], []
        self.emit(Piece(self.first + index, text, chances, finish, self.counts[index]))

    def _chances(self, token: int, logits: np.ndarray, count: int) -> TokenChances:
        scores = logits.astype(np.float64) - logits.max()
        logprobs = scores - np.log(np.exp(scores).sum())
        best = np.argsort(-logprobs, kind="stable")[:count]
        return TokenChances(
            self._chance(token, logprobs), [self._chance(i, logprobs) for i in best.tolist()]
        )

    def _chance(self, token: int, logprobs: np.ndarray) -> TokenChance:
        text = self.tokenizer.decode([token], skip_special_tokens=False)
        return TokenChance(text, float(logprobs[token]))
