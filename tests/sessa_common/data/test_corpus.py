"""Packed tokens, the rows that a run draws from them, and what is said about text left out."""

from itertools import pairwise

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from sessa_common.config import SessaConfig
from sessa_common.data.batches import batch_arrays, next_token_batch
from sessa_common.data.corpus import TextBatches, pack, read_text_batches, told
from sessa_common.data.row_order import RowOrder
from sessa_common.data.tokenizer import byte_tokenizer
from sessa_common.errors import SessaError
from sessa_common.train_config import TrainConfig


def test_pack_ends_every_document_and_shuffles_by_the_seed():
    documents = [np.full(i + 1, i, np.int32) for i in range(20)]
    packed = pack(documents, 99, 3)
    assert len(packed) == sum(map(len, documents)) + 20
    groups = np.split(packed, np.flatnonzero(packed == 99) + 1)[:-1]
    assert sorted(int(group[0]) for group in groups) == list(range(20))
    assert all(len(group) == group[0] + 2 for group in groups)
    assert not np.array_equal(packed, pack(documents, 99, 4))
    assert np.array_equal(packed, pack(documents, 99, 3))


@pytest.mark.parametrize("length", [8, 9, 15, 16, 100])
def test_rows_of_an_epoch_do_not_overlap_and_stay_inside(length):
    order = RowOrder(length, 7, seed=1)
    for epoch in range(3):
        starts = sorted(order.start(epoch * order.count + i) for i in range(order.count))
        assert starts[0] >= 0 and starts[-1] + 8 <= length
        assert all(b - a == 7 for a, b in pairwise(starts))
    # The position alone decides: asking out of order changes nothing.
    assert [order.start(i) for i in (5, 0, 5)][::2] == [RowOrder(length, 7, 1).start(5)] * 2


def make_batches(tokens=None, vocab_size=50, **settings):
    tokens = np.arange(400, dtype=np.int32) % vocab_size if tokens is None else tokens
    config = SessaConfig(vocab_size=vocab_size, max_position_embeddings=16)
    return TextBatches(tokens, config, TrainConfig(**{"batch_size": 3, **settings}))


def test_targets_are_the_inputs_shifted_by_one():
    source = make_batches()
    batch = source.batch(2)
    assert batch.inputs.shape == batch.targets.shape == batch.weights.shape == (3, 16)
    assert np.array_equal((batch.inputs + 1) % 50, batch.targets)
    assert batch.inputs.dtype == np.int32 and batch.weights.dtype == np.float32
    assert batch.weights.all()


def test_training_and_validation_share_no_token():
    tokens = np.arange(400, dtype=np.int32)
    source = make_batches(tokens, vocab_size=400, validation_fraction=0.25)
    seen = {int(i) for n in range(40) for i in source.batch(n).targets.ravel()}
    held = {int(i) for batch in source.validation() for i in batch.targets.ravel()}
    assert max(seen) < 300 <= min(held)
    assert len(held) == 96


def test_validation_counts_each_row_once_and_obeys_the_limit():
    source = make_batches(validation_fraction=0.5, evaluate_batches=2)
    assert [len(batch.inputs) for batch in source.validation()] == [3, 3]
    source = make_batches(validation_fraction=0.2, evaluate_batches=9)
    assert [len(batch.inputs) for batch in source.validation()] == [3, 1]
    assert make_batches(validation_fraction=0.0).validation() == []


def test_fingerprint_follows_the_tokens():
    tokens = np.arange(400, dtype=np.int32) % 50
    changed = tokens.copy()
    changed[399] -= 1
    assert make_batches(tokens).fingerprint == make_batches(tokens.copy()).fingerprint
    assert make_batches(tokens).fingerprint != make_batches(changed).fingerprint


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        (np.zeros(0, np.int32), {}, "training text is empty"),
        (np.zeros(16, np.int32), {}, "has 16 tokens, expected at least 17"),
        (np.zeros(17, np.int32), {}, "has 17 tokens, too few for a training row and a validation"),
        (np.zeros(33, np.int32), {}, "has 33 tokens, too few for a training row and a validation"),
        (np.full(99, 50, np.int32), {}, r"token id 50 is out of range, expected 0 to 49"),
        (np.zeros(99, np.int32), {"batch_size": 10**12}, "a batch of 1,000,000,000,000 rows needs"),
        (np.full(99, -1, np.int32), {}, "token id -1 is out of range"),
        (
            np.zeros(99, np.int32),
            {"sequence_length": 17},
            "sequence_length is 17, .* max_position_embeddings 16",
        ),
    ],
    ids=[
        "empty",
        "short",
        "one row",
        "no validation row",
        "id too large",
        "large batch",
        "id negative",
        "long rows",
    ],
)
def test_tokens_that_cannot_train(tokens, settings, message):
    with pytest.raises(SessaError, match=message):
        make_batches(tokens, **settings)


def test_short_text_trains_without_validation():
    source = make_batches(np.arange(17, dtype=np.int32), validation_fraction=0.0)
    assert np.array_equal(source.batch(7).inputs, np.tile(np.arange(16), (3, 1)))


def test_next_token_batch_keeps_rows_apart():
    batch = next_token_batch(np.array([[1, 2, 3], [7, 8, 9]]))
    assert batch.inputs.tolist() == [[1, 2], [7, 8]]
    assert batch.targets.tolist() == [[2, 3], [8, 9]]


def test_documents_of_a_row_are_separate():
    rows = np.array([[5, 9, 1, 2, 9, 3], [1, 2, 3, 4, 5, 6], [9, 9, 1, 9, 9, 9]])
    batch = next_token_batch(rows, end_id=9)
    assert batch.document_starts.tolist() == [
        [0, 0, 2, 2, 2],
        [0, 0, 0, 0, 0],
        [0, 1, 2, 2, 4],
    ]
    # The token behind an end is no target.
    assert batch.weights.tolist() == [[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]]
    assert len(batch_arrays(batch)) == 4
    alone = batch.rows(slice(1, 2))
    assert len(batch_arrays(alone)) == 3 and len(batch_arrays(alone, always=True)) == 4
    assert next_token_batch(rows).document_starts is None


def test_notes_say_what_was_left_out_of_training(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        '{"text": "abab"}\n{"text": null}\n{"text": "  "}\n{"text": "xyz"}\n{"text": "abxb"}\n'
    )
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "e": 2}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = SessaConfig(vocab_size=3, max_position_embeddings=3)
    settings = TrainConfig(data=(str(tmp_path),), validation_fraction=0.0)
    source = read_text_batches(tokenizer, 2, config, settings)
    assert sorted(source.training[0].tokens.tolist()) == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert list(source.notes) == [
        "the training text: skipped 1 row whose text is null, the first in "
        f"{tmp_path}/rows.jsonl, line 2",
        "the training text: skipped 1 document of white space only",
        "the training text: the tokenizer has no token for 4 bytes of the text, which are left "
        "out and not counted",
        "the training text: documents in which the tokenizer has a token for nothing: 1, left out",
    ]


def test_text_of_null_rows_alone_is_called_empty_with_the_reason(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": null}\n' * 3)
    config, settings = SessaConfig(vocab_size=257), TrainConfig(data=(str(tmp_path),))
    with pytest.raises(SessaError, match="text is empty; skipped 3 rows whose text is null"):
        read_text_batches(byte_tokenizer(), 256, config, settings)


def test_what_goes_on_is_told_about_once_a_million_characters():
    activities = []
    assert len(list(told(["x" * 400_000] * 10, "reading", activities.append))) == 10
    assert activities == [
        f"reading: {count:,} characters" for count in (400_000, 1_600_000, 2_800_000, 4_000_000)
    ]
