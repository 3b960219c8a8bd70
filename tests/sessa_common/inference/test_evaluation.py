"""Text that a tokenizer has no token for is no part of what an evaluation counts."""

import math

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from sessa_common.config import SessaConfig
from sessa_common.data.sources import TextSource
from sessa_common.errors import SessaError
from sessa_common.inference.evaluation import evaluate_texts
from sessa_common.inference.model_tokenizer import ModelTokenizer


@pytest.fixture
def tokenizer():
    """A tokenizer that knows a and b only, and drops every other character."""
    made = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "e": 2}, merges=[]))
    config = SessaConfig(vocab_size=3, max_position_embeddings=8, eos_token_id=2)
    return ModelTokenizer.open(made, config)


def uniform(ids):
    return np.zeros((*ids.shape, 3), np.float32)


def test_bits_per_byte_are_over_the_bytes_that_were_kept(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("abЖЖab")
    (tmp_path / "b.txt").write_text("ЖЖ")
    (tmp_path / "c.jsonl").write_text('{"text": null}\n{"text": "ab"}\n{"text": " "}\n')
    score = evaluate_texts(uniform, tokenizer, tmp_path, TextSource())
    assert (score.tokens, score.bytes, score.documents) == (6, 6, 2)
    assert score.bits_per_byte == pytest.approx(math.log2(3))
    assert (score.skipped_rows, score.skipped_documents, score.dropped_bytes) == (1, 2, 8)
    assert len(score.notes) == 4


def test_a_text_of_unknown_parts_alone_is_empty_for_that_reason(tokenizer, tmp_path):
    (tmp_path / "b.txt").write_text("ЖЖ")
    with pytest.raises(SessaError, match="text is empty; the tokenizer has no token for 4 bytes"):
        evaluate_texts(uniform, tokenizer, tmp_path, TextSource())
    with pytest.raises(SessaError, match="no token for any part of the prompt"):
        tokenizer.encode("ЖЖ")
