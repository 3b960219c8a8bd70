"""Token shards: written once, whole, in any number of processes; gone on with; read in place."""

import json
from pathlib import Path

import numpy as np
import pytest

from sessa_common.config import SessaConfig
from sessa_common.data import tokenization
from sessa_common.data.batches import next_token_batch
from sessa_common.data.corpus import read_text_batches
from sessa_common.data.encoding import encode_texts
from sessa_common.data.sources import TextSource, read_documents, split_weights
from sessa_common.data.token_shards import TokenShards, is_token_folder, token_dtype
from sessa_common.data.tokenization import TokenizeRequest, tokenize
from sessa_common.data.tokenizer import byte_tokenizer, read_tokenizer
from sessa_common.errors import SessaError
from sessa_common.train_config import TrainConfig

END = 256
CONFIG = SessaConfig(vocab_size=257, max_position_embeddings=16)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(tokenization, "CHUNK_TEXTS", 7)


@pytest.fixture
def text(tmp_path):
    rows = [json.dumps({"text": f"text {i} " * (i % 9 + 1)}) for i in range(120)]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join([*rows, '{"text": " "}', '{"text": null}']) + "\n")
    return path


def request(text, out, **rest):
    return TokenizeRequest(
        sources=(str(text),), out=out, **{"tokenizer": "bytes", "shard_tokens": 900, **rest}
    )


def expected(text):
    ids = encode_texts(byte_tokenizer(), read_documents([str(text)]))
    return np.concatenate([part for document in ids for part in (document, [END])])


def test_the_shards_hold_every_document_and_its_end(text, tmp_path):
    shards = tokenize(request(text, tmp_path / "out"))
    assert shards.dtype == np.uint16 and len(shards.shards) > 3
    assert np.array_equal(shards[0 : len(shards)], expected(text))
    assert shards.documents == 120 == np.count_nonzero(expected(text) == END)
    # A span may lie in several files.
    assert np.array_equal(shards[850:2000], expected(text)[850:2000])
    assert len(shards[5:5]) == 0 and shards.largest_id == END
    assert any("1 row whose text is null" in note for note in shards.notes)
    shards.verify()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "text.jsonl"]
    assert not any(p.name.startswith((".", "partial")) for p in (tmp_path / "out").iterdir())


def test_processes_write_what_one_writes(text, tmp_path):
    one, two = (tokenize(request(text, tmp_path / f"{n}", jobs=n)) for n in (1, 2))
    assert one.fingerprint == two.fingerprint
    files = [sorted(p.name for p in Path(x.folder).iterdir()) for x in (one, two)]
    assert files[0] == files[1]


def test_an_interrupted_run_goes_on(text, tmp_path, monkeypatch):
    whole, out = tokenize(request(text, tmp_path / "whole")), tmp_path / "out"
    encode, calls = tokenization._Encoder.__call__, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(tokenization._Encoder, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize(request(text, out))
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    done = json.loads((tmp_path / "out.partial" / "partial.json").read_text())["shards"]
    assert done
    with pytest.raises(SessaError, match="begun with other sources or settings"):
        tokenize(request(text, out, shard_tokens=901))
    calls[:] = [1] * 20
    assert tokenize(request(text, out)).fingerprint == whole.fingerprint
    # The text of the shards on disk was not encoded again.
    chunks = -(-120 // 7)
    assert len(calls) - 20 == chunks - done[-1]["texts"] // 7
    assert not (tmp_path / "out.partial").exists()


def test_text_that_changed_meanwhile_is_refused(text, tmp_path, monkeypatch):
    encode, calls = tokenization._Encoder.__call__, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(tokenization._Encoder, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize(request(text, tmp_path / "out"))
    text.write_text(text.read_text().replace("text 3 ", "text x ", 1))
    with pytest.raises(SessaError, match="the text has changed since"):
        tokenize(request(text, tmp_path / "out"))


def test_bad_input_writes_nothing(text, tmp_path):
    before = sorted(tmp_path.iterdir())
    for change, message in (
        ({"sources": (str(tmp_path / "gone.txt"),)}, "no such file"),
        ({"tokenizer": str(tmp_path / "gone.json")}, "no such file"),
        ({"source": TextSource(text_field="story")}, "no field 'story'"),
        ({"out": text}, "is read from it"),
        ({"out": text.parent}, "is read from it"),
        ({"jobs": 0}, "jobs is 0"),
    ):
        values = {"sources": (str(text),), "out": tmp_path / "out", "tokenizer": "bytes"}
        with pytest.raises(SessaError, match=message):
            tokenize(TokenizeRequest(**{**values, **change}))
    assert sorted(tmp_path.iterdir()) == before
    tokenize(request(text, tmp_path / "out"))
    with pytest.raises(SessaError, match="not empty"):
        tokenize(request(text, tmp_path / "out"))


def test_damage_is_found(text, tmp_path):
    shards = tokenize(request(text, tmp_path / "out"))
    file = tmp_path / "out" / shards.shards[1].file
    content = bytearray(file.read_bytes())
    content[40] ^= 1
    file.write_bytes(content)
    with pytest.raises(SessaError, match="its content differs"):
        TokenShards(tmp_path / "out").verify()
    file.write_bytes(content[:-2])
    with pytest.raises(SessaError, match="the file is damaged"):
        TokenShards(tmp_path / "out")
    file.unlink()
    with pytest.raises(SessaError, match="no such file"):
        TokenShards(tmp_path / "out")
    listing = tmp_path / "out" / "tokens.json"
    listing.write_text(listing.read_text().replace("tokens-00000.bin", "../secret"))
    with pytest.raises(SessaError, match="not written by sessa data tokenize"):
        TokenShards(tmp_path / "out")


def test_large_vocabularies_take_four_bytes():
    assert token_dtype(2**16) == "uint16" and token_dtype(2**16 + 1) == "uint32"


def settings(*data, **rest):
    return TrainConfig(data=data, **{"batch_size": 4, **rest})


def batches(*data, **rest):
    return read_text_batches(byte_tokenizer(), END, CONFIG, settings(*data, **rest))


def test_training_reads_rows_from_the_shards(text, tmp_path):
    tokens, out = expected(text), tmp_path / "out"
    tokenize(request(text, out))
    source = batches(str(out), validation_fraction=0.2)
    cut = len(source.training[0])
    starts = [source.orders[0].start(i) for i in range(8, 12)]
    rows = np.stack([tokens[start : start + 17] for start in starts])
    batch, wanted = source.batch(2), next_token_batch(rows)
    assert np.array_equal(batch.inputs, wanted.inputs) and batch.inputs.dtype == np.int32
    assert np.array_equal(batch.targets, wanted.targets)
    assert np.array_equal(source.validation()[0].inputs[0], tokens[cut : cut + 16])
    # A rank reads its rows of the same global batch.
    part = source.batch(2, slice(1, 3))
    assert np.array_equal(part.inputs, batch.inputs[1:3])
    assert batches(str(out)).fingerprint == batches(str(out)).fingerprint != source.fingerprint


def test_a_mixture_takes_each_part_by_its_weight(text, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other.txt"
    tokenize(request(text, out))
    other.write_text("Z" * 400)
    source = batches(f"{out}:3", f"{other}:1")
    rows = np.concatenate([source.batch(i).inputs for i in range(250)])
    assert np.mean((rows == ord("Z")).any(1)) == pytest.approx(0.25, abs=0.04)
    held = np.concatenate([batch.inputs for batch in source.validation()])
    assert (held == ord("Z")).any() and (held != ord("Z")).any()
    other_weights = batches(f"{out}:2", f"{other}:1")
    assert source.fingerprint != other_weights.fingerprint
    # Without weights the numbers of tokens are the weights.
    assert list(np.diff(batches(str(out), str(other)).mixture.counts) > 0) == [True]


def test_weights_of_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("odd:1").write_text("x")
    assert split_weights(["a:0.7", "hf:b/c:.3"]) == (["a", "hf:b/c"], [0.7, 0.3])
    assert split_weights(["a", "odd:1", "hf:b/c"]) == (["a", "odd:1", "hf:b/c"], None)
    with pytest.raises(SessaError, match="none for b; write b:WEIGHT"):
        split_weights(["a:1", "b"])
    with pytest.raises(SessaError, match="weight of 0, expected a number above 0"):
        split_weights(["a:1", "b:0"])


def test_tokens_of_another_tokenizer_are_refused(text, tmp_path):
    out = tmp_path / "out"
    tokenize(request(text, out, tokenizer="300"))
    assert is_token_folder(out) and read_tokenizer(out)
    with pytest.raises(SessaError, match="of another tokenizer"):
        batches(str(out))
    with pytest.raises(SessaError, match="holds tokens, which only training reads"):
        list(read_documents([str(out)]))
