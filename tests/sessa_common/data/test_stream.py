"""A data set that is read while it trains: its rows, its end, and runs that are taken up again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sessa_common.config import SessaConfig
from sessa_common.data.stream import StreamBatches, is_stream
from sessa_common.data.tokenizer import BYTES_END_ID, byte_tokenizer
from sessa_common.errors import SessaError
from sessa_common.train_config import TrainConfig
from sessa_torch import train

TEXTS = [f"document {i}: " + "so it goes on, " * (i % 5) for i in range(90)]
CONFIG = SessaConfig(vocab_size=257, max_position_embeddings=32)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """A data set of two files, with a text that is blank and one that is null."""
    folder = tmp_path / "set"
    folder.mkdir()
    for number, part in enumerate((TEXTS[:40], [" ", None, *TEXTS[40:]])):
        lines = [json.dumps({"text": text}) + "\n" for text in part]
        (folder / f"part-{number}.jsonl").write_text("".join(lines))
    return f"hf-stream:{folder}"


def open_stream(data: str) -> StreamBatches:
    settings = TrainConfig(data=(data,), validation_fraction=0, batch_size=2)
    return StreamBatches(byte_tokenizer(), BYTES_END_ID, CONFIG, settings)


def test_the_rows_are_the_documents_in_their_order_again_and_again(data: str) -> None:
    source = open_stream(data)
    count = 2 * sum(len(text) + 1 for text in TEXTS) // 64
    batches = [source.batch(i) for i in range(count)]
    ids = np.concatenate([batch.inputs.ravel() for batch in batches])
    wanted = [i for text in TEXTS for i in (*byte_tokenizer().encode(text).ids, BYTES_END_ID)]
    np.testing.assert_array_equal(ids, (wanted * 2)[: len(ids)])
    assert batches[1].document_starts is not None


@pytest.mark.parametrize("index", [0, 1, 17, 44, 70])
def test_a_stream_goes_on_where_it_was_left(data: str, index: int) -> None:
    whole, left, again, once_more = (open_stream(data) for _ in range(4))
    for i in range(index):
        whole.batch(i), left.batch(i)
    left.batch(index)
    # A place is written to a file of JSON, also when later batches were made ahead.
    again.seek(index, json.loads(json.dumps(left.place(index))))
    for i in range(index, index + 3):
        expected = whole.batch(i)
        np.testing.assert_array_equal(again.batch(i).inputs, expected.inputs)
    once_more.seek(index + 3, again.place(index + 3))
    np.testing.assert_array_equal(once_more.batch(index + 3).inputs, whole.batch(index + 3).inputs)


def test_a_resumed_run_equals_an_unbroken_one(data: str, tmp_path: Path) -> None:
    held_out = tmp_path / "held.txt"
    held_out.write_text("so it goes on, " * 20)
    fields = {
        "data": data,
        "validation_data": str(held_out),
        "tokenizer": "bytes",
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "device": "cpu",
    }
    train(tmp_path / "whole", steps=4, **fields)
    train(tmp_path / "parts", steps=2, **fields)
    train(resume=tmp_path / "parts", steps=4, device="cpu")
    records = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("whole", "parts")
    }
    # All of these steps lie in the warm-up, so that the number of steps changes no rate.
    whole, parts = ([r["loss"] for r in found if "loss" in r] for found in records.values())
    assert whole == parts and len(whole) == 4
    (Path(data.partition(":")[2]) / "part-0.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(SessaError, match="the data are not those"):
        train(resume=tmp_path / "parts", steps=6, device="cpu")


def test_what_a_stream_cannot_do_is_refused(data: str) -> None:
    with pytest.raises(SessaError, match="beside other names"):
        is_stream([data, "pydoc"])
    settings = TrainConfig(data=(data,))
    with pytest.raises(SessaError, match="no end that could be held out"):
        StreamBatches(byte_tokenizer(), BYTES_END_ID, CONFIG, settings)
