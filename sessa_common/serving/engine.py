"""Continuous batching: texts of many requests are written together, and join and leave freely.

One thread calls `Engine.run`. Each of its turns reads a piece of one prompt and writes one token of
every running text. A prompt is read by a decoder of its own, whose rows then join the batch.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from sessa_common.errors import SessaError, expect
from sessa_common.inference.generation import Decoder, prefill_size
from sessa_common.inference.logit_rules import PreparedRules
from sessa_common.inference.sampling import GumbelNoise, SamplingConfig, choose
from sessa_common.serving.prefixes import PrefixCache

LOG = logging.getLogger("sessa")
# Texts that are written at once, and requests that may wait for their turn.
BATCH_SIZE, MAX_WAITING = 8, 64


class EngineFullError(Exception):
    """Too many requests wait already."""


class EngineClosedError(Exception):
    """The engine stops and takes no more requests."""


class Sink(Protocol):
    """The receiver of a request's texts; the thread of the engine calls it."""

    def token(self, index: int, token: int, logits: np.ndarray) -> bool:
        """Take a token of text `index`, and the model's logits (V,); return True to end the text.

        The token that ends a text is not passed on.
        """

    def end(self, index: int, reason: str) -> None:
        """Take the end of a text: "stop", or "length" after `max_tokens` tokens."""

    def fail(self, error: Exception) -> None:
        """Take the error that ends all texts of the request."""


@dataclass(kw_only=True, eq=False)
class Request:
    """A prompt with the needs of its `n` continuations, of at most `max_tokens` tokens each.

    Text i draws from the random stream (seed, i). `stop` are ids that end a text. `cached` is the
    number of ids of the prompt that were not read again, once the prompt is read.
    """

    prompt: Sequence[int]
    sampling: SamplingConfig
    max_tokens: int
    sink: Sink
    stop: frozenset[int] = frozenset()
    n: int = 1
    rules: PreparedRules | None = None
    cached: int = 0
    cancelled: bool = field(default=False, init=False)


class _Text:
    """A text while it is written; `ids` are the prompt and what was drawn."""

    def __init__(self, request: Request, index: int, vocab_size: int) -> None:
        self.request, self.index = request, index
        self.ids = list(request.prompt)
        self.noise = GumbelNoise(request.sampling.seed, [index], vocab_size)
        self.rules = None if request.rules is None else request.rules.start([request.prompt])

    def draw(self, logits: np.ndarray) -> bool:
        """Draw a token from logits (V,) and return True when the text goes on."""
        request, sink = self.request, self.request.sink
        given = logits[None] if self.rules is None else self.rules.apply(logits[None])
        ids = choose(given, request.sampling, self.noise)
        token = int(ids[0])
        if token in request.stop:
            sink.end(self.index, "stop")
            return False
        if self.rules is not None:
            self.rules.accept(ids)
        self.ids.append(token)
        if sink.token(self.index, token, logits):
            sink.end(self.index, "stop")
            return False
        if len(self.ids) == len(request.prompt) + request.max_tokens:
            sink.end(self.index, "length")
            return False
        return True


@dataclass
class _Reading:
    """A request whose prompt is being read, by a decoder that holds the beginning of it."""

    request: Request
    decoder: Decoder | None = None


class Engine:
    """Writes the texts of requests with one model; finished rows leave the batch at once.

    At most `batch_size` texts are written at once and `max_waiting` requests wait. The caches of
    texts that have ended are kept, up to `prefix_bytes` bytes in all, for prompts that begin alike.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        batch_size: int = BATCH_SIZE,
        max_waiting: int = MAX_WAITING,
        prefix_bytes: int = 0,
    ) -> None:
        expect(batch_size >= 1, "batch_size", batch_size, "at least 1")
        expect(max_waiting >= 1, "max_waiting", max_waiting, "at least 1")
        self.batch_size, self.max_waiting = batch_size, max_waiting
        self.vocab_size = decoder.config.vocab_size
        self._prefixes = PrefixCache(decoder.config, prefix_bytes)
        self._empty = self._batch = decoder.fork()
        self._texts: list[_Text] = []  # the rows of the batch
        self._reading: _Reading | None = None
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def submit(self, requests: Sequence[Request]) -> None:
        """Let requests wait for their turn, all or none of them; any thread may call this.

        Raises EngineFullError, EngineClosedError, and SessaError for more texts than fit a batch.
        """
        for request in requests:
            expect(1 <= request.n <= self.batch_size, "n", request.n, f"1..{self.batch_size}")
        with self._changed:
            if self._closed:
                raise EngineClosedError
            if len(self._waiting) + len(requests) > self.max_waiting:
                raise EngineFullError
            self._waiting.extend(requests)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Stop writing the texts of a request, whose sink gets at most one more token of each."""
        with self._changed:
            request.cancelled = True
            if request in self._waiting:
                self._waiting.remove(request)

    def close(self) -> None:
        """Let `run` return after its turn; requests that have not ended fail."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    @property
    def counts(self) -> dict[str, int]:
        """The number of texts that are being written and of requests that wait."""
        return {"running": len(self._texts), "waiting": len(self._waiting)}

    def run(self) -> None:
        """Serve requests until `close` is called."""
        while not self._closed:
            if not self.turn():
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._waiting)
        reading = [] if self._reading is None else [self._reading.request]
        running = [text.request for text in self._texts]
        for request in dict.fromkeys([*running, *reading, *self._waiting]):
            request.sink.fail(EngineClosedError())

    def turn(self) -> bool:
        """Read a piece of a prompt, write one token of every text; return False when idle."""
        try:
            self._read()
        except Exception as error:
            self._fail_reading(error)
        try:
            self._write()
        except Exception as error:
            self._fail_all(error)
        return bool(self._texts or self._reading or self._waiting)

    def _read(self) -> None:
        """Read a piece of the present prompt; when it is whole, its texts begin."""
        if self._reading is not None and self._reading.request.cancelled:
            self._reading = None
        reading = self._reading = self._reading or self._next()
        if reading is None:
            return
        request = reading.request
        decoder = reading.decoder = reading.decoder or self._begin(request)
        start, prompt = decoder.length, request.prompt
        stop = start + prefill_size(decoder)
        if stop < len(prompt):
            decoder.feed(np.array([prompt[start:stop]], np.int64))
            return
        logits = decoder.step(np.array([prompt[start:]], np.int64))[0]
        self._prefixes.add(prompt, decoder, 0)
        texts = [_Text(request, i, self.vocab_size) for i in range(request.n)]
        self._join(decoder, [text for text in texts if self._draw(text, logits)])
        self._reading = None

    def _next(self) -> _Reading | None:
        """Take the request that waits longest, if the batch has room for its texts."""
        with self._changed:
            room = self.batch_size - len(self._texts)
            if not self._waiting or self._waiting[0].n > room:
                return None
            return _Reading(self._waiting.popleft())

    def _begin(self, request: Request) -> Decoder:
        """A decoder that holds as much of the prompt as the cache of an earlier text has."""
        decoder = self._prefixes.take(request.prompt) or self._empty.fork()
        request.cached = decoder.length
        return decoder

    def _join(self, decoder: Decoder, texts: list[_Text]) -> None:
        """Add texts behind the single row of a decoder to the batch."""
        if not texts:
            return
        rows = decoder if len(texts) == 1 else decoder.fork([0] * len(texts))
        if self._texts:
            self._batch.join(rows)
        else:
            self._batch = rows
        self._texts += texts

    def _write(self) -> None:
        """Write one token of every text, without the texts that were cancelled."""
        self._keep([not text.request.cancelled for text in self._texts])
        if self._texts:
            column = np.array([text.ids[-1] for text in self._texts], np.int64)
            rows = self._batch.step(column[:, None])
            pairs = zip(self._texts, rows, strict=True)
            self._keep([self._draw(text, logits) for text, logits in pairs])

    def _draw(self, text: _Text, logits: np.ndarray) -> bool:
        """Draw a token of a text; an error ends its request alone."""
        if text.request.cancelled:
            return False
        try:
            return text.draw(logits)
        except Exception as error:
            if not isinstance(error, SessaError):
                LOG.exception("a token could not be passed on")
            text.request.cancelled = True
            text.request.sink.fail(error)
            return False

    def _keep(self, goes_on: list[bool]) -> None:
        """Let the rows of texts that do not go on leave the batch."""
        if all(goes_on):
            return
        stay = [i for i, ok in enumerate(goes_on) if ok]
        for row, text in enumerate(self._texts):
            if not goes_on[row]:
                self._prefixes.add(text.ids, self._batch, row)
        self._batch = self._batch.fork(stay)
        self._texts = [self._texts[i] for i in stay]

    def _fail_reading(self, error: Exception) -> None:
        LOG.exception("a prompt could not be read")
        if self._reading is not None:
            request, self._reading = self._reading.request, None
            request.sink.fail(error)

    def _fail_all(self, error: Exception) -> None:
        """End all texts of the batch, whose cache may be half-way in a step."""
        LOG.exception("a step of %d texts failed", len(self._texts))
        failed = dict.fromkeys(text.request for text in self._texts)
        self._texts, self._batch = [], self._empty
        for request in failed:
            request.sink.fail(error)
