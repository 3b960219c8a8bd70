"""`sessa train --task` and `sessa data`, from examples to a trained and measured model."""

import dataclasses
import json
import re
import signal

import numpy as np
import pytest
from support.in_process import fails, sessa
from support.task_cases import (
    BACKENDS,
    TASKS,
    TINY,
    of_task,
    tiny,
)

from sessa_common.checkpoint.folder import load_weights
from sessa_common.data.task_registry import load_data
from sessa_common.data.tokenizer import read_tokenizer
from sessa_common.training import session
from sessa_common.training.metrics import read_metrics
from sessa_common.training.trainer import Trainer

# The command.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "kinds", ["sessa", "transformer", "mamba2", "sessa_transformer", "sessa,mamba2"]
)
def test_train_on_a_task(kinds, backend, tmp_path, capsys):
    name = "diffuse-mqar" if kinds in ("transformer", "sessa,mamba2") else "symbolsoup"
    out, layers = tmp_path / "run", kinds.count(",") + 1
    options = (
        "--layers",
        layers,
        "--layer-kinds",
        kinds,
        "--backend",
        backend,
        "--evaluate-every",
        2,
    )
    assert sessa("train", *of_task(name), *TINY, *options, "--out", out, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    result = json.loads((out / "result.json").read_text())
    task = tiny(name)
    config, weights = load_weights(out)
    assert [kind.name for kind in config.kinds] == kinds.split(",")
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
    own = {
        "symbolsoup": {"ceiling"},
        "diffuse-mqar": {"by_lag", "errors_by_lag", "heuristics_by_lag"},
    }
    assert own[name] | {"accuracy", "examples"} <= result["test"].keys()
    tokenizer = read_tokenizer(out)
    assert tuple(tokenizer.id_to_token(i) for i in range(config.vocab_size)) == task.vocabulary


def test_the_frameworks_train_on_the_same_rows(tmp_path):
    losses = []
    for backend in BACKENDS:
        out = tmp_path / backend
        assert (
            sessa(
                "train",
                *of_task("diffuse-mqar"),
                *TINY,
                "--backend",
                backend,
                "--precision",
                "float32",
                "--out",
                out,
            )
            == 0
        )
        losses.append([r["loss"] for r in read_metrics(out) if "loss" in r])
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_easy_task_is_learned(backend, tmp_path):
    out = tmp_path / "run"
    assert (
        sessa(
            "train",
            *of_task("diffuse-mqar"),
            *TINY,
            "--steps",
            80,
            "--batch-size",
            32,
            "--lr",
            0.01,
            "--backend",
            backend,
            "--out",
            out,
        )
        == 0
    )
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

    def killed(*_):
        raise SystemExit(137)

    # A result of fewer steps is not the result of the longer run.
    with monkeypatch.context() as patch:
        patch.setattr(session, "write_task_result", killed)
        assert sessa("train", "--resume", run_folder, "--steps", 4) == 137
    assert sessa("train", "--resume", run_folder) == 0
    assert json.loads((run_folder / "result.json").read_text())["steps"] == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_other_commands_take_the_run_folder(backend, run_folder, tmp_path, capsys):
    capsys.readouterr()
    assert (
        sessa(
            "generate",
            run_folder,
            "--prompt",
            "<bos> a b ",
            "--max-tokens",
            4,
            "--backend",
            backend,
        )
        == 0
    )
    words = capsys.readouterr().out.split()
    assert set(words) <= set(tiny("symbolsoup").vocabulary)
    (tmp_path / "text.txt").write_text("<bos> a b c <sep> left0/right1")
    assert (
        sessa("eval", run_folder, "--data", tmp_path / "text.txt", "--backend", backend, "--json")
        == 0
    )
    assert json.loads(capsys.readouterr().out)["tokens"] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "pydoc.txt"), "--data is about text"),
        (("--tokenizer", "bytes"), "--tokenizer is about text"),
        (("--window", 9), "--sequence-length is about text"),
        (("--text-field", "story"), "--text-field is about text"),
        (("--context", 22), "examples of 24 tokens.*choose a larger --max-position-embeddings"),
        (("--task", "sudoku"), "task is 'sudoku'"),
        (("--task-option", "lag=3"), "unknown option lag; known: min_tokens"),
        (("--task-option", "max_tokens"), "expected name=value"),
        (("--layer-kinds", "sessa,rwkv", "--layers", 2), "rwkv"),
        (("--layer-kinds", "sessa,mamba2"), "layer_kinds"),
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
        {
            "story": f'Once, robot {i} found {i * i} apples. "Größe!" it said.\nThe end.',
            "topic": "robots",
            "theme": "Friendship",
            "word_count": 11,
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_simplestories_from_files_to_a_model(kind, tmp_path):
    rows, source, folder = stories(60), tmp_path / f"source.{kind}", tmp_path / "stories"
    if kind == "parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), source)
    else:
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert (
        sessa(
            "data", "simplestories", "--data", source, "--validation-fraction", 0.2, "--out", folder
        )
        == 0
    )
    train, held = (
        [json.loads(line)["story"] for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (folder / "train.jsonl", folder / "validation.jsonl")
    )
    assert sorted(train + held) == sorted(row["story"] for row in rows)
    assert 3 < len(held) < 25
    out = tmp_path / "run"
    assert (
        sessa(
            "train",
            "--data",
            folder / "train.jsonl",
            "--validation-data",
            folder / "validation.jsonl",
            "--text-field",
            "story",
            *TINY,
            "--context",
            32,
            "--tokenizer",
            "bytes",
            "--out",
            out,
        )
        == 0
    )
    assert read_metrics(out)[-1]["validation_loss"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("diffuse-mqar",), "is endless: give the number of --examples"),
        (("diffuse-mqar", "--examples", 0), "--examples is 0, expected 1 or more"),
        (("symbolsoup", "--examples", 5), "set its size with the task option train_examples=5"),
        (("symbolsoup", "--task-option", "lag=5"), "unknown option lag"),
        (("simplestories",), "simplestories needs --data"),
        (("simplestories", "--data", "gone.jsonl"), "gone.jsonl: no such file"),
        (("simplestories", "--data", "other.jsonl"), "no field 'story'; it has text"),
        (("simplestories", "--data", "other.parquet"), "no column 'story'; it has text"),
        (("simplestories", "--data", "one.jsonl"), "are too few"),
        (
            ("simplestories", "--data", "one.jsonl", "--validation-fraction", 1.5),
            "--validation-fraction is 1.5",
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_data_refuses_bad_input(arguments, message, tmp_path, capsys, monkeypatch):
    from pyarrow import Table, parquet

    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "one.jsonl").write_text(json.dumps(stories(1)[0]) + "\n")
    parquet.write_table(Table.from_pylist([{"text": "x"}]), "other.parquet")
    before = sorted(tmp_path.iterdir())
    assert message in fails(capsys, "data", *arguments, "--out", "made")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [("sudoku",), ("diffuse-mqar", "--data", "x"), ("simplestories", "--examples", 5)],
    ids=lambda arguments: arguments[0],
)
def test_data_has_commands_with_options_of_their_own(arguments, tmp_path, capsys):
    assert sessa("data", *arguments, "--out", tmp_path / "made") == 2
    assert "No such" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
