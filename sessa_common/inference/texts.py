"""Continuation of texts: in batches of prompts of like length, streamed, each with its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sessa_common.errors import expect, require
from sessa_common.inference.generation import Decoder, generate, token_budget
from sessa_common.inference.logit_rules import LogitRules, PreparedRules, prepare_rules
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_common.inference.sampling import SamplingConfig
from sessa_common.inference.text_stream import StopTexts, TextStream

BATCH_SIZE = 16

OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Continuation:
    """A text that a model wrote after a prompt, the number of its tokens, and why it ended.

    finish is "stop" when the model ended the text, "length" when `max_tokens` did.
    """

    text: str
    tokens: int
    finish: str


def generate_texts(
    decoder: Decoder,
    tokenizer: ModelTokenizer,
    prompts: Sequence[str | Sequence[int]],
    sampling: SamplingConfig,
    *,
    rules: LogitRules | PreparedRules | None = None,
    max_tokens: int | None = None,
    batch_size: int = BATCH_SIZE,
    cached: int = 0,
    on_text: OnText | None = None,
) -> list[Continuation]:
    """Continue prompts until an end token or `max_tokens` (200, or what the context has room for).

    At most `batch_size` prompts, texts or ids, run at once, those of like length together.
    `cached` ids of the only prompt are in the decoder's cache. `on_text(row, piece)` is called with
    each piece of text as soon as it is certain. Raises SessaError, before the model runs, as
    `generate` does, and for rules that do not fit the tokenizer.
    """
    require(len(prompts) > 0, "prompts is empty; give at least one")
    writer = TextWriter(
        decoder, tokenizer, sampling, rules=rules, max_tokens=max_tokens, batch_size=batch_size
    )
    ids = [tokenizer.encode(given) if isinstance(given, str) else given for given in prompts]
    found = dict(writer.write(ids, cached=cached, on_text=on_text))
    return [found[row] for row in range(len(prompts))]


class TextWriter:
    """Writes continuations of prompts that are token ids already."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: ModelTokenizer,
        sampling: SamplingConfig,
        *,
        rules: LogitRules | PreparedRules | None = None,
        max_tokens: int | None = None,
        batch_size: int = BATCH_SIZE,
        stop_texts: Sequence[str] = (),
    ) -> None:
        expect(batch_size >= 1, "batch_size", batch_size, "at least 1")
        self.decoder, self.tokenizer, self.sampling = decoder, tokenizer, sampling
        self.max_tokens, self.batch_size = max_tokens, batch_size
        self.stop_texts = stop_texts
        self.rules = prepare_rules(rules, tokenizer)

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        first: int = 0,
        budget: int | None = None,
        cached: int = 0,
        on_text: OnText | None = None,
    ) -> Iterator[tuple[int, Continuation]]:
        """Yield the row and the continuation of each prompt, in the order in which they end.

        Row r draws from the random stream (seed, first + r) in any batch. Every text may have
        `budget` tokens; by default what the longest prompt leaves room for. `cached` as in
        `generate`.
        """
        if prompts and budget is None:
            budget = token_budget(self.decoder.config, max(map(len, prompts)), self.max_tokens)
        by_length = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        for start in range(0, len(prompts), self.batch_size):
            rows = sorted(by_length[start : start + self.batch_size])
            texts = _Texts(self, rows, [prompts[row] for row in rows], on_text)
            steps = generate(
                self.decoder,
                texts.prompts,
                self.sampling,
                max_tokens=budget,
                stop=self.tokenizer.stop_ids,
                cached=cached,
                streams=[first + row for row in rows],
                rules=None if self.rules is None else self.rules.start(texts.prompts),
                ended=texts.ended,
            )
            for step in steps:
                yield from texts.push(step)
            yield from texts.finish(budget)


class _Texts:
    """The texts of one batch while they are written."""

    def __init__(
        self,
        writer: TextWriter,
        rows: list[int],
        prompts: list[Sequence[int]],
        on_text: OnText | None,
    ) -> None:
        self.rows, self.prompts, self.on_text = rows, prompts, on_text
        tokenizer = writer.tokenizer.tokenizer
        self.streams = [TextStream(tokenizer, prompt) for prompt in prompts]
        self.stops = [StopTexts(writer.stop_texts) for _ in prompts]
        self.pieces: list[list[str]] = [[] for _ in rows]
        self.counts = [0] * len(rows)
        self.open, self.ended = set(range(len(rows))), set[int]()

    def push(self, step: Sequence[int | None]) -> Iterator[tuple[int, Continuation]]:
        """Add one id a row; yield the rows that end here."""
        for i in sorted(self.open):
            token = step[i]
            if token is None:
                yield self._end(i, "stop")
            else:
                self.counts[i] += 1
                self._add(i, self.stops[i].push(self.streams[i].push(token)))
                if self.stops[i].found:
                    self.ended.add(i)
                    yield self._end(i, "stop")

    def finish(self, budget: int | None) -> Iterator[tuple[int, Continuation]]:
        """Yield the rows that are left when no more ids come."""
        for i in sorted(self.open):
            yield self._end(i, "length" if self.counts[i] == budget else "stop")

    def _end(self, i: int, finish: str) -> tuple[int, Continuation]:
        self.open.remove(i)
        if not self.stops[i].found:
            rest = self.stops[i].push(self.streams[i].finish())
            self._add(i, rest + self.stops[i].finish())
        return self.rows[i], Continuation("".join(self.pieces[i]), self.counts[i], finish)

    def _add(self, i: int, piece: str) -> None:
        self.pieces[i].append(piece)
        if self.on_text is not None and piece:
            self.on_text(self.rows[i], piece)
