"""A conversation with a model: the cache stays between turns, the oldest turns leave first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import numpy as np

from sessa_common.errors import SessaError, expect
from sessa_common.inference.chat_template import ChatTemplate, Message, with_system
from sessa_common.inference.generation import Decoder, generate, prefill_size, reuse_prefix
from sessa_common.inference.logit_rules import LogitRules, prepare_rules
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_common.inference.sampling import SamplingConfig
from sessa_common.inference.text_stream import StopTexts, TextStream

# Tokens of the context that an answer can count on, unless a smaller answer is asked for.
ANSWER_ROOM = 256


class Conversation:
    """The messages so far, and a decoder whose cache holds as many of their tokens as it can.

    `max_tokens` limits an answer; by default it may fill the context. `cached` are the ids that the
    decoder holds already, as those of a prompt cache. `dropped` is the number of the oldest
    messages that no longer fit in the context; a system message stays.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: ModelTokenizer,
        template: ChatTemplate,
        sampling: SamplingConfig,
        *,
        rules: LogitRules | None = None,
        max_tokens: int | None = None,
        system: str | None = None,
        cached: Sequence[int] = (),
    ) -> None:
        ok = max_tokens is None or max_tokens >= 1
        expect(ok, "max_tokens", max_tokens, "at least 1")
        self.decoder, self.tokenizer, self.template = decoder, tokenizer, template
        self.sampling, self.max_tokens = sampling, max_tokens
        self.rules = prepare_rules(rules, tokenizer)
        self.system = with_system([], system)
        self.turns: list[Message] = []
        self.dropped, self.cached = 0, list(cached)
        if not self.cached:
            self._forget()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.turns, self.dropped = [], 0
        self._forget()

    def restore(self, messages: Sequence[Message]) -> None:
        """Go on with earlier messages, whose system message, if any, replaces this one's.

        Raises SessaError when the template refuses them, or when the last is not an answer.
        """
        system = [m for m in messages[:1] if m["role"] == "system"]
        turns = list(messages[len(system) :])
        roles = [m["role"] for m in turns]
        if roles != ["user", "assistant"] * (len(turns) // 2):
            raise SessaError("the messages must be those of a user and an assistant, in turn")
        self.system, self.turns, self.dropped = system or self.system, turns, 0
        self.template.render([*self.messages, {"role": "user", "content": "Hello"}])

    @property
    def messages(self) -> list[Message]:
        """Every message, also those that no longer fit in the context."""
        return [*self.system, *self.turns]

    def reply(self, text: str, is_stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Say something and yield the answer in pieces; `is_stopped` is asked after each token.

        It is also asked between the pieces of a long message. What was written until it is True is
        the answer; a message that has none then is taken back. Raises SessaError, with the
        conversation as it was, when the message does not fit in the context.
        """
        self.turns.append({"role": "user", "content": text})
        pieces: list[str] = []
        ended = False
        try:
            ids = self._fit()
            for piece in self._answer(ids, is_stopped):
                pieces.append(piece)
                yield piece
            ended = True
        finally:
            if not ended:
                # A step may have been left half-way, with some layers ahead of the others.
                self._forget()
            if pieces or (ended and not is_stopped()):
                self.turns.append({"role": "assistant", "content": "".join(pieces).strip()})
            else:
                self.turns.pop()

    def _forget(self) -> None:
        self.decoder.reset()
        self.cached = []

    def _fit(self) -> list[int]:
        """Token ids of the conversation, without the oldest turns that leave no room to answer."""
        limit = self.decoder.config.max_position_embeddings
        room = min(self.max_tokens or ANSWER_ROOM, ANSWER_ROOM, limit // 4)
        dropped, goal = self.dropped, limit
        while True:
            ids = self.template.encode(self.tokenizer, [*self.system, *self.turns[dropped:]])
            is_last = dropped + 2 > len(self.turns)
            if len(ids) + room <= (limit if is_last else goal):
                self.dropped = dropped
                return ids
            if is_last:
                raise SessaError(
                    f"the message has {len(ids)} tokens with what belongs to it, but the model "
                    f"reads at most {limit} and needs {room} to answer; shorten it"
                )
            # The rest must be read again, so several turns leave at once.
            dropped, goal = dropped + 2, limit * 3 // 4

    def _read(self, ids: list[int], is_stopped: Callable[[], bool]) -> int | None:
        """Read a prompt up to its last piece; return how many ids are cached, None if stopped."""
        held, size = reuse_prefix(self.decoder, self.cached, ids), prefill_size(self.decoder)
        self.cached = list(ids)
        while len(ids) - held > size:
            if is_stopped():
                return None
            self.decoder.feed(np.array([ids[held : held + size]], np.int64))
            held += size
        return held

    def _answer(self, ids: list[int], is_stopped: Callable[[], bool]) -> Iterator[str]:
        held = self._read(ids, is_stopped)
        if held is None:
            return
        limit = self.decoder.config.max_position_embeddings - len(ids)
        steps = generate(
            self.decoder,
            [ids],
            self.sampling,
            max_tokens=min(self.max_tokens or limit, limit),
            stop=self.tokenizer.stop_ids,
            cached=held,
            # Each turn draws from a random stream of its own.
            streams=[len(self.turns) // 2],
            rules=None if self.rules is None else self.rules.start([ids]),
        )
        stream = TextStream(self.tokenizer.tokenizer, ids)
        stops = StopTexts(self.template.stop_texts)
        with closing(steps):
            for (token,) in steps:
                assert token is not None, "a single row ends the iteration"
                self.cached.append(token)
                if piece := stops.push(stream.push(token)):
                    yield piece
                if stops.found or is_stopped():
                    break
        # The last drawn id is not in the cache.
        self.cached = self.cached[: self.decoder.length]
        if not stops.found and (piece := stops.push(stream.finish()) + stops.finish()):
            yield piece
