"""Answers in the course of being written: pieces, stop texts, log-probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from sessa_common.data.tokenizer import byte_tokenizer
from sessa_common.serving.answers import AnswerWriter, Piece
from sessa_common.serving.replies import Reply, Usage

LOGITS = np.linspace(-2, 2, 257, dtype=np.float32)


def written(text: bytes, reason: str = "length", **options) -> tuple[list[Piece], int]:
    """The pieces of a text, and how many tokens were taken."""
    pieces: list[Piece] = []
    writer = AnswerWriter(byte_tokenizer(), [97], 1, pieces.append, **options)
    taken = 0
    for token in text:
        taken += 1
        if writer.token(0, token, LOGITS):
            break
    writer.end(0, reason)
    return pieces, taken


def test_characters_are_whole_and_pieces_add_up() -> None:
    pieces, _ = written("Zoë!".encode(), first=3)
    assert [piece.text for piece in pieces] == ["Z", "o", "ë", "!", ""]
    assert {piece.index for piece in pieces} == {3}
    assert [piece.finish for piece in pieces] == [None] * 4 + ["length"]
    assert pieces[-1].tokens == 5


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it() -> None:
    pieces, taken = written(b"one two stop three", "stop", stop_texts=("never", " stop"))
    assert "".join(piece.text for piece in pieces) == "one two" and taken == 12
    # What may begin a stop text is held back until it is certain.
    pieces, _ = written(b"one st", stop_texts=(" stop",))
    assert [piece.text for piece in pieces] == ["o", "n", "e", " st"]


def test_log_probabilities() -> None:
    pieces, _ = written("aë".encode(), likeliest=2)
    chances = [chance for piece in pieces for chance in piece.chances]
    assert [len(piece.chances) for piece in pieces] == [1, 2, 0]
    logprobs = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum())
    assert [c.drawn.text for c in chances] == ["a", "\ufffd", "\ufffd"]
    assert chances[0].drawn.logprob == pytest.approx(logprobs[97])
    assert [c.logprob for c in chances[0].likeliest] == pytest.approx(logprobs[[256, 255]])
    chat = Reply("m", True, True).whole(pieces, Usage(1, 0, 3))["choices"][0]["logprobs"]
    assert [token["bytes"] for token in chat["content"]] == [[97], None, None]
    older = Reply("m", False, True).whole(pieces, Usage(1, 0, 3))["choices"][0]["logprobs"]
    assert older["text_offset"] == [0, 1, 2] and len(older["top_logprobs"]) == 3
