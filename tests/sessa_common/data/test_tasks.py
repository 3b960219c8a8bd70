"""Tasks as training data: options, folders, batches."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.task_cases import (
    RECALL,
    SOUP,
    TASKS,
    assert_same_examples,
    batches,
    tiny,
)

from sessa_common.data.task_registry import load_data, new_task, parse_options
from sessa_common.data.tasks import SPLITS, make_data, write_data
from sessa_common.errors import SessaError
from sessa_common.storage import MANIFEST

# Options.


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("symbolsoup", "max_tokens=800", 800),
        ("symbolsoup", "noise_max=5e-1", 0.5),
        ("symbolsoup", "noise_min=0", 0.0),
        ("symbolsoup", "spaced=False", False),
        ("diffuse-mqar", "test_lags=64:96", (64, 96)),
        ("diffuse-mqar", "test_lags=64,96,128", (64, 96, 128)),
        ("diffuse-mqar", "test_lags=77", (77,)),
    ],
)
def test_options_have_the_types_of_the_task(name, text, value):
    (found,) = parse_options(name, [text]).values()
    assert found == value and type(found) is type(value)
    assert getattr(new_task(name, parse_options(name, [text])), text.split("=")[0]) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("soup", "max_tokens=9", r"task is 'soup', expected symbolsoup, diffuse-mqar or a folder"),
        ("symbolsoup", "lag=9", "symbolsoup: unknown option lag; known: min_tokens, max_tokens"),
        ("symbolsoup", "name=x", "unknown option name"),
        ("symbolsoup", "make=x", "unknown option make"),
        ("symbolsoup", "max_tokens", "task option is 'max_tokens', expected name=value"),
        ("symbolsoup", "=5", "unknown option"),
        ("symbolsoup", "max_tokens=much", "'max_tokens=much', expected a value like 600"),
        ("symbolsoup", "max_tokens=600.5", "expected a value like 600"),
        ("symbolsoup", "spaced=1", "'spaced=1', expected true or false"),
        ("symbolsoup", "noise_max=1.5", "noise_max is 1.5; it must be"),
        ("symbolsoup", "noise_max=nan", "noise_max is nan; it must be"),
        ("diffuse-mqar", "test_lags=", "'test_lags=', expected a value like"),
        ("diffuse-mqar", "test_lags=64-96", "expected a value like"),
        ("diffuse-mqar", "density=nan", "density is nan; it must be"),
    ],
)
def test_bad_options_are_refused(name, text, message):
    with pytest.raises(SessaError, match=message):
        new_task(name, parse_options(name, [text]))


# Folders.


def test_a_folder_holds_the_data_that_the_options_make(tmp_path):
    folder = tmp_path / "soup"
    write_data(make_data(tiny("symbolsoup")), folder)
    assert {path.name for path in folder.iterdir()} == {"task.json", MANIFEST} | {
        f"{split}.safetensors" for split in SPLITS
    }
    stored, drawn = load_data(str(folder)), load_data("symbolsoup", SOUP)
    assert stored.task == drawn.task and stored.fingerprint == drawn.fingerprint
    for split in SPLITS:
        assert_same_examples(getattr(stored, split), getattr(drawn, split))
    other = load_data("symbolsoup", (*SOUP, "data_seed=1"))
    assert other.fingerprint != drawn.fingerprint
    assert not np.array_equal(other.validation.tokens, drawn.validation.tokens)


@pytest.mark.parametrize("name", TASKS)
def test_a_folder_of_before_version_0_2_is_read(name, tmp_path):
    """Its tensors of metadata have the prefix "facts."."""
    data = make_data(tiny(name), 6 if name == "diffuse-mqar" else None)
    write_data(data, tmp_path / "old")
    for split in SPLITS:
        path = tmp_path / "old" / f"{split}.safetensors"
        arrays = {key.replace("metadata.", "facts."): v for key, v in load_file(path).items()}
        assert any(key.startswith("facts.") for key in arrays)
        save_file(arrays, path)
    found = load_data(str(tmp_path / "old"))
    assert found.fingerprint == data.fingerprint
    for split in SPLITS:
        assert_same_examples(getattr(found, split), getattr(data, split))


def test_the_splits_are_different_examples():
    data = load_data("symbolsoup", SOUP)
    rows = [row.tobytes() for split in SPLITS for row in getattr(data, split).tokens]
    assert len(set(rows)) == len(rows) == 10 + 7 + 5


def test_an_endless_task_is_written_with_a_number_of_examples(tmp_path):
    task = tiny("diffuse-mqar")
    assert load_data("diffuse-mqar", RECALL).train is None
    with pytest.raises(SessaError, match="diffuse-mqar is endless: give the number"):
        write_data(make_data(task), tmp_path / "data")
    assert not (tmp_path / "data").exists()
    write_data(make_data(task, 6), tmp_path / "data")
    source = batches(task, data=load_data(str(tmp_path / "data")))
    assert source.summary == "diffuse-mqar, 6 training examples"
    # Three batches of four cover six rows twice.
    rows = [row.tobytes() for i in range(3) for row in source.batch(i).inputs]
    assert sorted(rows[:6]) == sorted(rows[6:])


def test_options_beside_a_folder_are_refused(tmp_path):
    write_data(make_data(tiny("symbolsoup")), tmp_path / "soup")
    with pytest.raises(
        SessaError,
        match=r"task\.json already holds the options of the task; leave `task_options` out",
    ):
        load_data(str(tmp_path / "soup"), ("min_tokens=20",))


def _change_task(folder, **changed):
    stored = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps(stored | changed))


def _change_train(folder, change):
    path = folder / "train.safetensors"
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path)


def _damage(folder, how):
    if how == "cut":
        raw = (folder / "test.safetensors").read_bytes()
        (folder / "test.safetensors").write_bytes(raw[: len(raw) // 2])
    elif how == "gone":
        (folder / "validation.safetensors").unlink()
    elif how == "no json":
        (folder / "task.json").write_text("{")
    elif how == "foreign":
        (folder / "task.json").write_text('{"model_type": "sessa"}')
    elif how == "other vocabulary":
        _change_task(folder, vocabulary=["<pad>", "<bos>"])
    elif how == "options no object":
        _change_task(folder, options=[1])
    elif how == "option of another type":
        _change_task(folder, options={"min_tokens": "many"})
    elif how == "no weights":
        _change_train(folder, lambda arrays: arrays.pop("weights"))
    elif how == "token too large":
        _change_train(folder, lambda arrays: arrays["tokens"].__setitem__((0, 2), 99))
    elif how == "cut weights":
        _change_train(folder, lambda a: a.update(weights=a["weights"][:, 1:].copy()))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", r"test\.safetensors: not a readable safetensors file"),
        ("gone", r"validation\.safetensors"),
        ("no json", r"task\.json: not readable JSON"),
        ("foreign", "task"),
        ("other vocabulary", r"task\.json: the vocabulary is not that of symbolsoup"),
        ("options no object", r"task\.json"),
        ("option of another type", "min_tokens"),
        ("no weights", r"train\.safetensors: no tensor weights"),
        ("token too large", r"train\.safetensors"),
        ("cut weights", r"train\.safetensors"),
    ],
)
def test_a_damaged_folder_is_refused(how, message, tmp_path):
    folder = tmp_path / "soup"
    write_data(make_data(tiny("symbolsoup")), folder)
    _damage(folder, how)
    with pytest.raises(SessaError, match=message):
        load_data(str(folder))


# Batches.


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_depends_on_its_number_alone(name):
    forward, backward = batches(tiny(name)), batches(tiny(name))
    first = [forward.batch(i) for i in range(6)]
    second = [backward.batch(i) for i in reversed(range(6))][::-1]
    for left, right in zip(first, second, strict=True):
        for field in ("inputs", "targets", "weights"):
            np.testing.assert_array_equal(getattr(left, field), getattr(right, field))
    shapes = {batch.inputs.shape for batch in first}
    assert len(shapes) == 1 and shapes.pop()[0] == 4
    assert not np.array_equal(first[0].inputs, first[1].inputs)
    other = batches(tiny(name), seed=1).batch(0)
    assert not np.array_equal(other.inputs, first[0].inputs)


def test_an_epoch_uses_every_row_once():
    task = tiny("symbolsoup")
    data = make_data(task)
    source = batches(task, data=data)
    expected = sorted(row[:-1].tobytes() for row in data.train.tokens)
    drawn = [row.tobytes() for i in range(5) for row in source.batch(i).inputs]
    # Five batches of four are two epochs of ten rows, in another order.
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == expected
    assert drawn[:10] != drawn[10:]


@pytest.mark.parametrize("name", TASKS)
def test_the_loss_is_at_labels_and_values_only(name):
    task = tiny(name)
    source = batches(task)
    for batch in (*(source.batch(i) for i in range(3)), *source.validation()):
        assert batch.inputs.dtype == batch.targets.dtype == np.int32
        assert set(np.unique(batch.weights)) == {0, 1}
        np.testing.assert_array_equal(batch.weights.sum(1), 1)
        np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        row, column = np.nonzero(batch.weights)
        before = {task.vocabulary[token] for token in batch.inputs[row, column]}
        asked = [task.vocabulary[token] for token in batch.targets[row, column]]
        assert before == {"<sep>" if name == "symbolsoup" else "<assign>"}
        assert all(word[0] == ("l" if name == "symbolsoup" else "v") for word in asked)


@pytest.mark.parametrize("name", TASKS)
def test_validation_accuracy_of_known_predictors(name):
    task = tiny(name)
    source = batches(task)
    targets = [batch.targets for batch in source.validation()]
    held_out = np.concatenate([batch.targets[batch.weights > 0] for batch in source.validation()])
    constant = int(held_out[0])

    assert source.score(targets) == {"validation_accuracy": 1.0}
    share = source.score([np.full_like(ids, constant) for ids in targets])["validation_accuracy"]
    assert share == pytest.approx(np.mean(held_out == constant)) and 0 < share < 1
    assert source.score([np.zeros_like(ids) for ids in targets]) == {"validation_accuracy": 0.0}


@pytest.mark.parametrize("name", TASKS)
def test_the_test_split_of_a_perfect_predictor(name):
    task = tiny(name)
    data = make_data(task)
    answers = {row[:-1].tobytes(): row[1:] for row in data.test.tokens}
    source = batches(task, data=data)
    result = source.test(lambda ids: np.stack([answers[row.tobytes()] for row in ids]))
    # Mqar draws its test examples for each of the two lags.
    assert result["accuracy"] == 1.0
    assert result["examples"] == {"symbolsoup": 5, "diffuse-mqar": 32}[name]
    assert source.test(np.zeros_like)["accuracy"] == 0.0


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"max_position_embeddings": 22}, "examples of 24 tokens.*max_position_embeddings 22"),
        ({"vocab_size": 41}, "symbolsoup has 42 tokens.*vocab_size 41"),
    ],
)
def test_a_model_that_is_too_small_is_refused(size, message):
    task = tiny("symbolsoup")
    batches(task, max_position_embeddings=23)
    with pytest.raises(SessaError, match=message):
        batches(task, **size)
