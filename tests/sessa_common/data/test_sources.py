"""Documents from every kind of source, the token stream, and the order of its windows."""

import json
import os
from itertools import pairwise

import numpy as np
import pytest

from sessa_common.config import SessaConfig, TrainConfig
from sessa_common.data.batches import WindowOrder, next_token_batch
from sessa_common.data.corpus import TextBatches, pack
from sessa_common.data.sources import Reading, read_documents
from sessa_common.errors import SessaError

STORIES = ["Once upon a time.", "The fox slept.", "Ein Bär lief."]


def write_source(folder, kind):
    """A file or folder with STORIES in it, and its name for --data."""
    if kind in ("folder", "wildcard"):
        (folder / "sub").mkdir()
        (folder / ".hidden").mkdir()
        (folder / ".hidden" / "no.txt").write_text("never read")
        (folder / "sub" / "ignored.bin").write_bytes(b"\xff")
        for name, text in zip(("a.txt", "sub/b.md", "sub/c.py"), STORIES, strict=True):
            (folder / name).write_text(text, encoding="utf-8")
        return str(folder) if kind == "folder" else str(folder / "**" / "*.[tmp]*")
    path = folder / f"stories.{kind}"
    if kind == "txt":
        path.write_text("\n".join(STORIES), encoding="utf-8")
    elif kind == "jsonl":
        lines = [json.dumps({"story": text, "id": i}) for i, text in enumerate(STORIES)]
        path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table = pyarrow.table({"id": [1, 2, 3], "story": STORIES})
        parquet.write_table(table, path, row_group_size=2)
    return str(path)


@pytest.mark.parametrize("kind", ["folder", "wildcard", "jsonl", "parquet"])
def test_each_kind_gives_its_documents_in_order(kind, tmp_path):
    name = write_source(tmp_path, kind)
    assert list(read_documents([name], Reading(text_field="story"))) == STORIES


def test_a_text_file_is_one_document(tmp_path):
    assert list(read_documents([write_source(tmp_path, "txt")])) == ["\n".join(STORIES)]


def test_names_follow_each_other_blanks_are_dropped_and_the_limit_holds(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "z.txt").write_text("z")
    names = [str(tmp_path / "z.txt"), str(tmp_path / "blank.txt"), "pydoc"]
    found = list(read_documents(names, Reading(max_documents=3)))
    assert found[0] == "z" and len(found) == 3
    assert len(list(read_documents(["pydoc"]))) > 50


@pytest.mark.parametrize("prefix", ["hf:", ""], ids=["hf:folder", "builder"])
def test_a_hugging_face_data_set_is_streamed(prefix, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"story": t}) + "\n" for t in STORIES))
    reading = Reading(text_field="story", split="test")
    name = f"hf:{tmp_path}"
    if not prefix:
        # An id that is no path goes to the library as it is, once the hub knows it.
        import datasets
        import huggingface_hub

        real = datasets.load_dataset
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
        monkeypatch.setattr(
            datasets, "load_dataset", lambda name, *a, **k: real(str(tmp_path / name), *a, **k)
        )
        (tmp_path / "owner" / "stories").mkdir(parents=True)
        (tmp_path / "test.jsonl").rename(tmp_path / "owner" / "stories" / "test.jsonl")
        name = "owner/stories"
    assert list(read_documents([name], reading)) == STORIES
    with pytest.raises(SessaError, match="no field 'text'; it has story"):
        list(read_documents([name], Reading(split="test")))
    with pytest.raises(SessaError, match="validation"):
        list(read_documents([name], Reading(text_field="story", split="validation")))


def _bad_source(folder, case):
    path = folder / "x.jsonl"
    if case == "missing":
        return folder / "none.txt"
    if case == "no match":
        return folder / "*.txt"
    if case == "empty folder":
        return folder
    if case == "unknown type":
        path = folder / "x.docx"
        path.write_bytes(b"PK")
    elif case == "not utf-8":
        path = folder / "x.txt"
        path.write_bytes(b"ok \xff")
    elif case == "jsonl not utf-8":
        path.write_bytes(b'{"text": "\xff"}\n')
    elif case == "not json":
        path.write_text('{"text": "a"}\n{"text": \n')
    elif case == "no object":
        path.write_text("[1]\n")
    elif case == "no field":
        path.write_text('{"text": "a"}\n{"body": "b"}\n')
    elif case == "not text":
        path.write_text('{"text": null}\n')
    elif case == "half a pair":
        path.write_text('{"text": "abc\\ud800"}\n')
    elif case == "not parquet":
        path = folder / "x.parquet"
        path.write_bytes(b"PAR1 no")
    elif case == "no column":
        from pyarrow import parquet, table

        path = folder / "x.parquet"
        parquet.write_table(table({"body": ["a"]}), path)
    return path


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", r"none\.txt: no such file"),
        ("no match", r"\*\.txt: no file matches"),
        ("empty folder", "the folder has no .txt"),
        ("unknown type", "file type is '.docx'"),
        ("not utf-8", r"x\.txt: not UTF-8 text \(byte 3\)"),
        ("jsonl not utf-8", r"x\.jsonl: not UTF-8"),
        ("not json", r"x\.jsonl, line 2: not JSON"),
        ("no object", "line 1: expected a JSON object, found list"),
        ("no field", "line 2: no field 'text'; it has body"),
        ("not text", "line 1: 'text' is NoneType, expected text"),
        ("half a pair", "line 1, 'text': character 4 is half of a surrogate pair"),
        ("not parquet", r"x\.parquet: not a readable parquet"),
        ("no column", r"x\.parquet: no column 'text'; it has body"),
    ],
)
def test_bad_sources_are_named(case, message, tmp_path):
    with pytest.raises(SessaError, match=message):
        list(read_documents([str(_bad_source(tmp_path, case))]))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("secret")
    path.chmod(0)
    with pytest.raises(SessaError, match=r"x\.txt: cannot be read"):
        list(read_documents([str(path)]))


def test_every_name_is_resolved_before_the_first_is_read(tmp_path):
    with pytest.raises(SessaError, match="no such file"):
        read_documents(["pydoc", str(tmp_path / "none.txt")])


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
def test_windows_of_an_epoch_do_not_overlap_and_stay_inside(length):
    order = WindowOrder(length, 7, seed=1)
    for epoch in range(3):
        starts = sorted(order.start(epoch * order.count + i) for i in range(order.count))
        assert starts[0] >= 0 and starts[-1] + 8 <= length
        assert all(b - a == 7 for a, b in pairwise(starts))
    # The position alone decides: asking out of order changes nothing.
    assert [order.start(i) for i in (5, 0, 5)][::2] == [WindowOrder(length, 7, 1).start(5)] * 2


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
        (np.zeros(33, np.int32), {}, "without its validation part has 16 tokens"),
        (np.full(99, 50, np.int32), {}, r"token id 50 is out of range, expected 0 to 49"),
        (np.full(99, -1, np.int32), {}, "token id -1 is out of range"),
        (
            np.zeros(99, np.int32),
            {"sequence_length": 17},
            "sequence_length is 17, .* max_position_embeddings 16",
        ),
    ],
    ids=["empty", "short", "short after the cut", "id too large", "id negative", "window"],
)
def test_streams_that_cannot_train(tokens, settings, message):
    with pytest.raises(SessaError, match=message):
        make_batches(tokens, **settings)


def test_short_text_trains_without_validation():
    source = make_batches(np.arange(17, dtype=np.int32), validation_fraction=0.0)
    assert np.array_equal(source.batch(7).inputs, np.tile(np.arange(16), (3, 1)))


def test_next_token_batch_keeps_rows_apart():
    batch = next_token_batch(np.array([[1, 2, 3], [7, 8, 9]]))
    assert batch.inputs.tolist() == [[1, 2], [7, 8]]
    assert batch.targets.tolist() == [[2, 3], [8, 9]]
