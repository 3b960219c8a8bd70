"""Tasks as training data: options, folders, batches, `sessa train --task` and `sessa data`."""

import dataclasses
import json
import re
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sessa_cli.train
from sessa_cli.main import main
from sessa_common.checkpoint import load_weights
from sessa_common.config import SessaConfig, TrainConfig
from sessa_common.data.tasks import (
    SPLITS,
    TaskBatches,
    load_data,
    make_data,
    new_task,
    parse_options,
    write_data,
)
from sessa_common.errors import SessaError
from sessa_common.metrics import read_metrics
from sessa_common.tokenizer import read_tokenizer
from sessa_common.trainer import Trainer

BACKENDS = ("torch", "mlx")
SOUP = ("min_tokens=20", "max_tokens=24", "train_examples=10", "validation_examples=7",
        "test_examples=5", "spaced=false")  # fmt: skip
# One pair, asked for once: the answer is the only other value in the example.
RECALL = ("pairs=1", "queries=1", "group=1", "pool=1", "prefix=1", "key_tokens=3", "value_tokens=4",
          "filler_tokens=2", "min_lag=7", "max_lag=9", "test_lags=8:11", "density=0",
          "validation_examples=32", "test_examples=16")  # fmt: skip
TASKS = {"symbolsoup": SOUP, "diffuse-mqar": RECALL}
TINY = ("--layers", 1, "--width", 32, "--heads", 2, "--steps", 3, "--batch-size", 4,
        "--warmup-steps", 1, "--device", "cpu")  # fmt: skip


def sessa(*arguments):
    """Run the command in this process; its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code or 0


def fails(capsys, *arguments):
    """Run a command that must refuse its input; the one line that it says."""
    capsys.readouterr()
    assert sessa(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def of_task(name):
    """The command's options for a tiny version of the task."""
    return ("--task", name, *(word for text in TASKS[name] for word in ("--task-option", text)))


def tiny(name, **changed):
    """The tiny task, with options changed."""
    return new_task(name, parse_options(name, TASKS[name]) | changed)


def batches(task, batch_size=4, seed=0, data=None, **config):
    """A batch source over the task, for a model that is just large enough."""
    sizes = {"vocab_size": len(task.vocabulary), "max_position_embeddings": task.context} | config
    settings = TrainConfig.for_task(task.name)
    settings = dataclasses.replace(settings, batch_size=batch_size, seed=seed)
    return TaskBatches(data or make_data(task), SessaConfig(**sizes), settings)


def assert_same_examples(left, right):
    assert left.facts.keys() == right.facts.keys()
    for name in ("tokens", "weights"):
        found, expected = getattr(left, name), getattr(right, name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    for name, value in left.facts.items():
        np.testing.assert_array_equal(value, right.facts[name])


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
    assert {path.name for path in folder.iterdir()} == {"task.json"} | {
        f"{split}.safetensors" for split in SPLITS
    }
    stored, drawn = load_data(str(folder)), load_data("symbolsoup", SOUP)
    assert stored.task == drawn.task and stored.fingerprint == drawn.fingerprint
    for split in SPLITS:
        assert_same_examples(getattr(stored, split), getattr(drawn, split))
    other = load_data("symbolsoup", (*SOUP, "data_seed=1"))
    assert other.fingerprint != drawn.fingerprint
    assert not np.array_equal(other.validation.tokens, drawn.validation.tokens)


def test_the_splits_are_different_examples():
    data = load_data("symbolsoup", SOUP)
    rows = [row.tobytes() for split in SPLITS for row in getattr(data, split).tokens]
    assert len(set(rows)) == len(rows) == 10 + 7 + 5


def test_an_endless_task_is_written_with_a_number_of_examples(tmp_path):
    task = tiny("diffuse-mqar")
    assert load_data("diffuse-mqar", RECALL).train is None
    with pytest.raises(SessaError, match="diffuse-mqar is endless: say how many"):
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
    with pytest.raises(SessaError, match=r"has its options in task\.json; leave --task-option out"):
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
    inputs = {}
    for batch in source.validation():
        for row, target in zip(batch.inputs, batch.targets, strict=True):
            inputs[row.tobytes()] = target
    held_out = np.concatenate([batch.targets[batch.weights > 0] for batch in source.validation()])
    constant = int(held_out[0])

    def perfect(ids):
        return np.stack([inputs[row.tobytes()] for row in ids])

    assert source.score(perfect) == {"validation_accuracy": 1.0}
    share = source.score(lambda ids: np.full_like(ids, constant))["validation_accuracy"]
    assert share == pytest.approx(np.mean(held_out == constant)) and 0 < share < 1
    assert source.score(np.zeros_like) == {"validation_accuracy": 0.0}


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


# The command.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mixer", ["sessa", "attention", "mamba2", "sessa,mamba2"])
def test_train_on_a_task(mixer, backend, tmp_path, capsys):
    name = "diffuse-mqar" if mixer in ("attention", "sessa,mamba2") else "symbolsoup"
    out, layers = tmp_path / "run", mixer.count(",") + 1
    options = ("--layers", layers, "--mixer", mixer, "--backend", backend, "--evaluate-every", 2)
    assert sessa("train", *of_task(name), *TINY, *options, "--out", out, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    result = json.loads((out / "result.json").read_text())
    task = tiny(name)
    config, weights = load_weights(out)
    assert config.mixers == tuple(mixer.split(","))
    assert config.vocab_size == len(task.vocabulary)
    assert config.max_position_embeddings == task.context
    options = json.loads(json.dumps(dataclasses.asdict(task)))
    assert (result["task"], result["task_options"]) == (name, options)
    assert result["parameters"] == sum(value.size for value in weights.values())
    assert result["steps"] == 3 and result["tokens_per_second"] > 0
    evaluated = [r for r in read_metrics(out) if "validation_accuracy" in r]
    assert [r["step"] for r in evaluated] == [2, 3]
    for key in ("validation_accuracy", "validation_loss"):
        assert result[key] == evaluated[-1][key] == summary[key]
    assert summary["test"] == result["test"] and summary["finished"]
    own = {"symbolsoup": {"ceiling"}, "diffuse-mqar": {"by_lag", "errors_by_lag",
                                                       "heuristics_by_lag"}}  # fmt: skip
    assert own[name] | {"accuracy", "examples"} <= result["test"].keys()
    tokenizer = read_tokenizer(out)
    assert tuple(tokenizer.id_to_token(i) for i in range(config.vocab_size)) == task.vocabulary


def test_the_frameworks_train_on_the_same_rows(tmp_path):
    losses = []
    for backend in BACKENDS:
        out = tmp_path / backend
        assert sessa("train", *of_task("diffuse-mqar"), *TINY, "--backend", backend,
                     "--precision", "float32", "--out", out) == 0  # fmt: skip
        losses.append([r["loss"] for r in read_metrics(out) if "loss" in r])
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_easy_task_is_learned(backend, tmp_path):
    out = tmp_path / "run"
    assert sessa("train", *of_task("diffuse-mqar"), *TINY, "--steps", 80, "--batch-size", 32,
                 "--lr", 0.01, "--backend", backend, "--out", out) == 0  # fmt: skip
    result = json.loads((out / "result.json").read_text())
    # One of four values: guessing gives a quarter.
    assert result["validation_accuracy"] > 0.7 and result["test"]["accuracy"] > 0.7


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_run_is_the_unbroken_one(backend, name, tmp_path, monkeypatch, capsys):
    common = ("train", *of_task(name), *TINY, "--steps", 5, "--backend", backend)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert sessa(*common, "--out", whole) == 0
    step = Trainer._train_step

    def stopping(self):
        step(self)
        if self.step == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stopping)
        assert sessa(*common, "--out", parts) == 130
    assert read_metrics(parts)[-1]["step"] == 3 and not (parts / "result.json").exists()
    changed = ("train", "--resume", parts, "--task-option", "data_seed=1")
    assert "task_options is" in fails(capsys, *changed)
    assert sessa("train", "--resume", parts, "--backend", backend) == 0
    for file in ("model.safetensors", "training_state.safetensors"):
        assert (whole / file).read_bytes() == (parts / file).read_bytes(), file
    results = [json.loads((run / "result.json").read_text()) for run in (whole, parts)]
    assert [result.pop("tokens_per_second") > 0 for result in results] == [True, True]
    assert results[0] == results[1]


@pytest.fixture
def run_folder(tmp_path):
    assert sessa("train", *of_task("symbolsoup"), *TINY, "--out", tmp_path / "run") == 0
    return tmp_path / "run"


def test_a_run_killed_before_its_result_is_finished(run_folder, monkeypatch, capsys):
    assert "all 3 steps are done" in fails(capsys, "train", "--resume", run_folder)
    before = json.loads((run_folder / "result.json").read_text())
    (run_folder / "result.json").unlink()
    assert sessa("train", "--resume", run_folder) == 0
    assert json.loads((run_folder / "result.json").read_text()) == before

    def killed(run, learner):
        raise SystemExit(137)

    # A result of fewer steps is not the result of the longer run.
    with monkeypatch.context() as patch:
        patch.setattr(sessa_cli.train, "write_result", killed)
        assert sessa("train", "--resume", run_folder, "--steps", 4) == 137
    assert sessa("train", "--resume", run_folder) == 0
    assert json.loads((run_folder / "result.json").read_text())["steps"] == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_other_commands_take_the_run_folder(backend, run_folder, tmp_path, capsys):
    capsys.readouterr()
    assert sessa("generate", run_folder, "--prompt", "<bos> a b ", "--max-tokens", 4,
                 "--backend", backend) == 0  # fmt: skip
    words = capsys.readouterr().out.split()
    assert set(words) <= set(tiny("symbolsoup").vocabulary)
    (tmp_path / "text.txt").write_text("<bos> a b c <sep> left0/right1")
    assert sessa("eval", run_folder, "--data", tmp_path / "text.txt", "--backend", backend,
                 "--json") == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out)["tokens"] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "pydoc.txt"), "--data is about text"),
        (("--tokenizer", "bytes"), "--tokenizer is about text"),
        (("--window", 9), "--window is about text"),
        (("--text-field", "story"), "--text-field is about text"),
        (("--context", 22), "examples of 24 tokens.*choose a larger --context"),
        (("--task", "sudoku"), "task is 'sudoku'"),
        (("--task-option", "lag=3"), "unknown option lag; known: min_tokens"),
        (("--task-option", "max_tokens"), "expected name=value"),
        (("--mixer", "sessa,rwkv", "--layers", 2), "rwkv"),
        (("--mixer", "sessa,mamba2"), "mixer"),
    ],
    ids=lambda value: "".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_task_options_leave_nothing(options, message, tmp_path, capsys):
    out = tmp_path / "run"
    said = fails(capsys, "train", *of_task("symbolsoup"), *TINY, "--out", out, *options)
    assert re.search(message, said)
    assert list(tmp_path.iterdir()) == []


def test_task_options_need_a_task(tmp_path, capsys):
    options = ("--task-option", "min_tokens=20", "--out", tmp_path / "run")
    assert "give --task too" in fails(capsys, "train", *TINY, *options)


def test_init_takes_a_checkpoint_of_the_same_vocabulary(run_folder, tmp_path, capsys):
    other = (*of_task("diffuse-mqar"), "--steps", 1, "--out", tmp_path / "other")
    said = fails(capsys, "train", "--init", run_folder, *other)
    assert "its tokenizer is not the vocabulary of diffuse-mqar" in said
    assert not (tmp_path / "other").exists()
    same = (*of_task("symbolsoup"), "--task-option", "data_seed=5", "--steps", 1, "--lr", "1e-12")
    assert sessa("train", "--init", run_folder, *same, "--out", tmp_path / "same") == 0
    before, after = (load_weights(folder)[1] for folder in (run_folder, tmp_path / "same"))
    for name, value in before.items():
        np.testing.assert_allclose(value, after[name], atol=1e-9)


# `sessa data`.


@pytest.mark.parametrize("name", TASKS)
def test_data_writes_a_folder_that_trains(name, tmp_path, capsys):
    folder, out = tmp_path / "data", tmp_path / "run"
    task_options = of_task(name)[2:]
    examples = ("--examples", 6) if name == "diffuse-mqar" else ()
    assert sessa("data", name, *task_options, *examples, "--out", folder) == 0
    assert f"wrote {folder}: {6 if examples else 10} training" in capsys.readouterr().out
    assert load_data(str(folder)).task == tiny(name)
    assert sessa("train", "--task", folder, *TINY, "--out", out) == 0
    assert json.loads((out / "result.json").read_text())["task"] == name
    beside = ("--task-option", "data_seed=1", "--out", tmp_path / "other")
    assert "leave --task-option out" in fails(capsys, "train", "--task", folder, *TINY, *beside)
    again = ("data", name, *task_options, *examples, "--out", folder)
    assert "add --force" in fails(capsys, *again)
    assert sessa(*again, "--force") == 0


def stories(count):
    """Rows with the columns of SimpleStories that a reader meets first."""
    return [
        {"story": f"Once, robot {i} found {i * i} apples. \"Größe!\" it said.\nThe end.",
         "topic": "robots", "theme": "Friendship", "word_count": 11}
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_simplestories_from_files_to_a_model(kind, tmp_path):
    rows, source, folder = stories(60), tmp_path / f"source.{kind}", tmp_path / "stories"
    if kind == "parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), source)
    else:
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert sessa("data", "simplestories", "--data", source, "--validation-fraction", 0.2,
                 "--out", folder) == 0  # fmt: skip
    train, held = (
        [json.loads(line)["story"] for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (folder / "train.jsonl", folder / "validation.jsonl")
    )
    assert sorted(train + held) == sorted(row["story"] for row in rows)
    assert 3 < len(held) < 25
    out = tmp_path / "run"
    assert sessa("train", "--data", folder / "train.jsonl", "--validation-data",
                 folder / "validation.jsonl", "--text-field", "story", *TINY, "--context", 32,
                 "--tokenizer", "bytes", "--out", out) == 0  # fmt: skip
    assert read_metrics(out)[-1]["validation_loss"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("diffuse-mqar",), "is endless: say how many training examples with --examples"),
        (("diffuse-mqar", "--examples", 0), "examples is 0, expected 1 or more"),
        (("diffuse-mqar", "--data", "x.jsonl"), "--data is for simplestories"),
        (("symbolsoup", "--examples", 5), "use --task-option train_examples=5"),
        (("symbolsoup", "--task-option", "lag=5"), "unknown option lag"),
        (("sudoku",), "task is 'sudoku'"),
        (("simplestories",), "simplestories needs --data"),
        (("simplestories", "--examples", 5), "do not go with simplestories"),
        (("simplestories", "--data", "gone.jsonl"), "gone.jsonl: no such file"),
        (("simplestories", "--data", "other.jsonl"), "no field 'story'; it has text"),
        (("simplestories", "--data", "other.parquet"), "no column 'story'; it has text"),
        (("simplestories", "--data", "one.jsonl"), "there are too few"),
        (("simplestories", "--data", "one.jsonl", "--validation-fraction", 1.5),
         "--validation-fraction is 1.5"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_data_refuses_bad_input(arguments, message, tmp_path, capsys, monkeypatch):
    from pyarrow import Table, parquet

    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "one.jsonl").write_text(json.dumps(stories(1)[0]) + "\n")
    parquet.write_table(Table.from_pylist([{"text": "x"}]), "other.parquet")
    before = sorted(tmp_path.iterdir())
    assert message in fails(capsys, "data", *arguments, "--out", "made")
    assert sorted(tmp_path.iterdir()) == before
