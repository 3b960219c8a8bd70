"""Answers of the OpenAI API as JSON objects."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sessa_common.serving.answers import Piece, TokenChance, TokenChances

Json = dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens: those of all prompts, those of them that were cached, those written."""

    prompt: int
    cached: int
    written: int

    def to_json(self) -> Json:
        """The object `usage`."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.written,
            "total_tokens": self.prompt + self.written,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Reply:
    """The JSON objects of one answer, whole or in chunks."""

    def __init__(self, model: str, chat: bool, with_logprobs: bool) -> None:
        self.chat, self.with_logprobs = chat, with_logprobs
        self.begun: set[int] = set()  # choices whose first chunk was made
        self.offsets: dict[int, int] = {}
        self.head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> Json:
        """The answer made of all pieces of all choices."""
        choices = []
        for index in sorted({piece.index for piece in pieces}):
            own = [piece for piece in pieces if piece.index == index]
            text = "".join(piece.text for piece in own)
            chances = [chance for piece in own for chance in piece.chances]
            finish = next(piece.finish for piece in own if piece.finish)
            said = {"role": "assistant", "content": text}
            body = {"message": said} if self.chat else {"text": text}
            choices.append(self._choice(index, body, chances, finish))
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": usage.to_json()}

    def chunk(self, piece: Piece) -> Json:
        """A piece of one choice; the first one of a chat names the role."""
        delta = {"content": piece.text} if piece.text or piece.chances else {}
        if piece.index not in self.begun:
            self.begun.add(piece.index)
            delta = {"role": "assistant", "content": piece.text}
        body = {"delta": delta} if self.chat else {"text": piece.text}
        choice = self._choice(piece.index, body, piece.chances, piece.finish)
        return {**self._chunk_head(), "choices": [choice]}

    def last_chunk(self, usage: Usage) -> Json:
        """The chunk behind all others that carries the usage."""
        return {**self._chunk_head(), "choices": [], "usage": usage.to_json()}

    def _chunk_head(self) -> Json:
        return {**self.head, "object": "chat.completion.chunk" if self.chat else "text_completion"}

    def _choice(
        self, index: int, body: Json, chances: Sequence[TokenChances], finish: str | None
    ) -> Json:
        logprobs = None
        if self.with_logprobs and (chances or finish is None or not self.chat):
            logprobs = self._chat_logprobs(chances) if self.chat else self._logprobs(index, chances)
        return {"index": index, **body, "logprobs": logprobs, "finish_reason": finish}

    def _chat_logprobs(self, chances: Sequence[TokenChances]) -> Json:
        return {
            "content": [
                {**_token(c.drawn), "top_logprobs": [_token(other) for other in c.likeliest]}
                for c in chances
            ]
        }

    def _logprobs(self, index: int, chances: Sequence[TokenChances]) -> Json:
        """The older form of a completion: lists, of which `text_offset` counts characters."""
        offsets = []
        for chance in chances:
            offsets.append(self.offsets.get(index, 0))
            self.offsets[index] = offsets[-1] + len(chance.drawn.text)
        return {
            "tokens": [c.drawn.text for c in chances],
            "token_logprobs": [c.drawn.logprob for c in chances],
            "top_logprobs": [{o.text: o.logprob for o in c.likeliest} for c in chances],
            "text_offset": offsets,
        }


def _token(chance: TokenChance) -> Json:
    # A token that is a part of a character has no text, and its bytes are not known here.
    known = "\ufffd" not in chance.text
    return {
        "token": chance.text,
        "logprob": chance.logprob,
        "bytes": list(chance.text.encode()) if known else None,
    }


def error_json(message: str, kind: str, param: str | None, code: str | None) -> Json:
    """The object that every error is."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
