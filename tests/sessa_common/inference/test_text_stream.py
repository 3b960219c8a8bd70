"""Text streams: every piece adds up, no character is split."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from sessa_common.data.tokenizer import byte_tokenizer, train_bpe, word_tokenizer
from sessa_common.inference.text_stream import StopTexts, TextStream


def stream(tokenizer, ids: list[int]) -> list[str]:
    text = TextStream(tokenizer)
    return [*(text.push(token) for token in ids), text.finish()]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40))
def test_stream_adds_up_for_any_bytes(data: bytes) -> None:
    pieces = stream(byte_tokenizer(), list(data))
    assert "".join(pieces) == data.decode("utf-8", errors="replace")


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20))
def test_stream_never_splits_a_character(text: str) -> None:
    pieces = stream(byte_tokenizer(), list(text.encode("utf-8")))
    assert "".join(pieces) == text
    assert pieces[-1] == "" or "\ufffd" in text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_stream_gives_each_character_as_soon_as_it_is_whole() -> None:
    pieces = stream(byte_tokenizer(), list("aé😀b".encode()))
    assert pieces == ["a", "", "é", "", "", "", "😀", "b", ""]


def test_stream_of_words_continues_the_prompt_after_a_space() -> None:
    tokenizer = word_tokenizer(["<pad>", "one", "two", "three"])
    assert TextStream(tokenizer, [1]).push(2) == " two"
    assert TextStream(tokenizer).push(2) == "two"


@settings(max_examples=50, deadline=None)
@given(before=st.text(max_size=6), text=st.text(min_size=1, max_size=8))
def test_stream_after_a_prompt_adds_up(before: str, text: str) -> None:
    given_ids, ids = (list(part.encode("utf-8")) for part in (before, text))
    pieces = TextStream(byte_tokenizer(), given_ids)
    assert "".join([*map(pieces.push, ids), pieces.finish()]) == text


def test_stream_of_merged_tokens_leaves_the_end_token_out() -> None:
    text = "the cat and the hat; naïve café, the end"
    tokenizer = train_bpe([text] * 20, 300)
    ids = tokenizer.encode(text).ids
    assert len(ids) < len(text)
    assert "".join(stream(tokenizer, [*ids, tokenizer.token_to_id("<|endoftext|>")])) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab\n", max_size=12), cuts=st.lists(st.integers(0, 12), max_size=6))
def test_stop_texts_cut_alike_however_the_text_arrives(text: str, cuts: list[int]) -> None:
    found = [text.find(stop) for stop in ("\na", "bba") if stop in text]
    expected = text[: min(found)] if found else text
    stops, bounds = StopTexts(["\na", "bba"]), sorted({0, *cuts, len(text)})
    pieces = [stops.push(text[a:b]) for a, b in pairwise(bounds)]
    assert "".join([*pieces, stops.finish()]) == expected
    assert stops.found == bool(found)


def test_text_that_cannot_become_a_stop_is_passed_on_at_once() -> None:
    stops = StopTexts(["\nUser:"])
    assert [stops.push(piece) for piece in ("Yes", "\nUs", "e", "d\n")] == ["Yes", "", "", "\nUsed"]
    assert stops.finish() == "\n"
    assert StopTexts([]).push("any") == "any"
