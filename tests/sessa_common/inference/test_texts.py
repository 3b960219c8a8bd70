"""Continuations of texts: batches of any size give the same texts, each with its end."""

from __future__ import annotations

import numpy as np
import pytest
from support.decoders import ReferenceDecoder, ScriptedDecoder
from support.export_models import lively_weights, small_config

from sessa_common.data.tokenizer import byte_tokenizer
from sessa_common.errors import SessaError
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_common.inference.sampling import SamplingConfig
from sessa_common.inference.texts import Continuation, TextWriter, generate_texts

BYTES = ModelTokenizer.open(byte_tokenizer(), small_config())
GREEDY = SamplingConfig(temperature=0)


class CountingDecoder(ReferenceDecoder):
    """The reference, which notes the batches that begin."""

    def reset(self) -> None:
        super().reset()
        self.begun = [*getattr(self, "begun", []), []]

    def step(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        self.begun[-1] = self.begun[-1] or list(tokens.shape)
        return super().step(tokens, mask)


@pytest.fixture(scope="module")
def decoder() -> CountingDecoder:
    config = small_config("untied")
    return CountingDecoder(config, lively_weights(config))


PROMPTS = ["The feedback solve", "a", "of a batch of prompts", "b", "The"]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_batch_size_does_not_change_a_text(decoder, batch_size: int) -> None:
    sampling = SamplingConfig(temperature=0.9, seed=2)
    whole = generate_texts(decoder, BYTES, PROMPTS, sampling, max_tokens=30)
    decoder.begun.clear()
    found = generate_texts(decoder, BYTES, PROMPTS, sampling, max_tokens=30, batch_size=batch_size)
    assert found == whole
    assert len({made.text for made in found}) == 5
    # The longest prompts run first, and prompts of like length together.
    expected = {1: [21, 18, 3, 1, 1], 2: [21, 3, 1], 3: [21, 1]}[batch_size]
    assert [length for _, length in decoder.begun] == expected
    assert max(rows for rows, _ in decoder.begun) <= batch_size


def test_every_text_may_be_as_long_in_any_batch(decoder) -> None:
    prompts = ["x" * 250, "y"]
    for batch_size in (1, 2):
        found = generate_texts(decoder, BYTES, prompts, GREEDY, batch_size=batch_size)
        assert [made.tokens for made in found] == [50, 50]


def test_each_text_says_why_it_ended() -> None:
    decoder = ScriptedDecoder([65, 66, 256], [67, 68, 69, 70])
    found = generate_texts(decoder, BYTES, ["a", "b"], GREEDY, max_tokens=4)
    assert found == [Continuation("AB", 2, "stop"), Continuation("CDEF", 4, "length")]
    assert generate_texts(ScriptedDecoder([65, 256]), BYTES, ["a"], GREEDY, max_tokens=1) == [
        Continuation("A", 1, "length")
    ]


def test_texts_come_when_they_end_and_pieces_when_they_are_certain() -> None:
    decoder = ScriptedDecoder([65, 256], [*"\u00e9x".encode(), 256])
    heard: list[object] = []
    writer = TextWriter(decoder, BYTES, GREEDY)
    for row, made in writer.write(
        [[1], [1]], on_text=lambda row, piece: heard.append((row, piece))
    ):
        heard.append((row, made))
    assert heard == [
        (0, "A"),
        (0, Continuation("A", 1, "stop")),
        (1, "\u00e9"),
        (1, "x"),
        (1, Continuation("\u00e9x", 3, "stop")),
    ]


def test_no_prompts_and_a_bad_batch_size() -> None:
    with pytest.raises(SessaError, match="prompts is empty"):
        generate_texts(ScriptedDecoder([1]), BYTES, [], GREEDY)
    with pytest.raises(SessaError, match="batch_size is 0"):
        generate_texts(ScriptedDecoder([1]), BYTES, ["a"], GREEDY, batch_size=0)


def test_a_stop_text_ends_its_row_alone() -> None:
    decoder = ScriptedDecoder([*b"Yes. No"], [*b"abcdefg"], [*b"No.Yes"])
    writer = TextWriter(decoder, BYTES, GREEDY, max_tokens=6, stop_texts=[". ", ".Y"])
    found = dict(writer.write([[1]] * 3))
    assert found[0] == Continuation("Yes", 5, "stop")
    assert found[1] == Continuation("abcdef", 6, "length")
    assert found[2] == Continuation("No", 4, "stop")
    # Both rows that ended have left the batch.
    assert [len(tokens) for tokens in decoder.fed] == [3, 3, 3, 3, 3, 1]
