"""`sessa compare` with a stand-in trainer of known results: plan, resuming, failures, numbers."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.in_process import sessa

import sessa_cli.compare as command
from sessa_cli.compare import compare
from sessa_cli.main import app
from sessa_common.config import SessaConfig, parameter_count
from sessa_common.errors import SessaError
from sessa_common.experiments.comparison import (
    PLAN,
    Comparison,
    check_plan,
    read_plan,
    write_plan,
)
from sessa_common.experiments.comparison_report import spread
from sessa_common.experiments.comparison_results import (
    aggregate,
    flops_per_token,
    read_result,
    trained_lags,
)
from sessa_common.experiments.comparison_runner import Runner, Running, TrainCommand
from sessa_common.presets import PRESETS
from sessa_common.storage import LOCK

if "compare" not in {each.callback.__name__ for each in app.registered_commands if each.callback}:
    app.command()(compare)

TRAINER = Path(__file__).parents[2] / "support" / "stand_in_trainer.py"
STORED = Path(__file__).parents[3] / "benchmarks" / "results"
MODELS = "sessa,transformer,mamba2,gated_attention"
OLD_NAMES = "sessa,attention,mamba2,nofeedback"
SIZES = ("--steps", "4", "--batch-size", "2", "--seeds", "3")
MQAR = ("--task", "diffuse-mqar", "--models", MODELS, *SIZES, "--jobs", "3", "--backend", "torch")
FEW = (*MQAR, "--models", "sessa,mamba2", "--seeds", "1")


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    presets = tmp_path / "presets.json"
    presets.write_text(json.dumps({name: config.to_dict() for name, config in PRESETS.items()}))
    monkeypatch.setenv("PRESETS", str(presets))
    monkeypatch.setattr(command, "TRAIN", (sys.executable, str(TRAINER)))
    return TRAINER


def calls(out):
    """Every start of the trainer: (run, whether it was resumed)."""
    return [(call["name"], call["resumed"]) for call in starts(out)]


def starts(out):
    return [json.loads(line) for line in (out / "calls").read_text().splitlines()]


def test_a_comparison_from_sweep_to_table(trainer, tmp_path, capsys):
    out = tmp_path / "out"
    assert sessa("compare", *MQAR, "--out", out, "--json") == 0
    stdout, stderr = capsys.readouterr()
    rows = {row["kind"]: row for row in json.loads(stdout)["models"]}
    assert json.loads(stdout) == json.loads((out / "results.json").read_text())
    assert len(calls(out)) == 4 * (2 + 1 + 3) and "24 of 24 runs done, 0 failed" in stderr
    rates = {kind: row["learning_rate"] for kind, row in rows.items()}
    assert rates == {
        "sessa": 3e-3,
        "transformer": 1e-3,
        "mamba2": 1e-3,
        "gated_attention": 3e-3,
    }
    # 0.8, 0.82, 0.84: the mean is 0.82 and the sample standard deviation 0.02.
    assert rows["sessa"]["mean"]["test"]["accuracy"] == pytest.approx(
        {"mean": 0.82, "std": 0.02, "n": 3}
    )
    assert rows["transformer"]["mean"]["test"]["by_lag"]["512"]["mean"] == pytest.approx(0.31)
    passed = {kind: row["control"]["passed"] for kind, row in rows.items()}
    assert passed == {
        "sessa": True,
        "transformer": True,
        "mamba2": False,
        "gated_attention": True,
    }
    assert rows["gated_attention"]["parameters"] < rows["sessa"]["parameters"]
    table = (out / "results.md").read_text()
    assert "0.820 ± 0.020" in table and "same prefix" in table
    assert "**FAILED** 0.620 in 4 steps" in table
    assert "density=0; passed from an accuracy of 0.9" in table and "*prefix only*" in table
    for name in ("curves.png", "lags.png"):
        assert_drawn(out / name)
    assert trained_lags(list(rows.values())) == (96, 384)
    assert shaded(out / "lags.png") > 10_000


def shaded(path):
    """Count the pixels with the grey of the trained range."""
    from matplotlib.image import imread

    return int((np.rint(imread(path)[..., :3] * 255) == round(0.92 * 255)).all(2).sum())


def assert_drawn(path):
    """The picture has marks in the colours of at least three models."""
    from matplotlib.image import imread

    pixels = np.rint(imread(path)[..., :3] * 255).astype(int).reshape(-1, 3)
    for colour in ((0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0x00, 0x9E, 0x73)):
        assert (pixels == colour).all(1).sum() > 100, (path, colour)


def test_the_plan_has_every_command_and_configuration(trainer, tmp_path):
    out = tmp_path / "out"
    assert sessa("compare", *MQAR, "--out", out, "--task-option", "pairs=8") == 0
    plan = json.loads((out / PLAN).read_text())
    assert set(plan["models"]) == {"1m-sessa", "1m-transformer", "1m-mamba2", "1m-gated_attention"}
    assert plan["models"]["1m-gated_attention"]["config"]["layer_kinds"] == "gated_attention"
    words = plan["commands"]["runs/1m-gated_attention-seed2"]
    given = dict(itertools.pairwise(words))
    assert (
        given["--learning-rate"] == "0.003"
        and given["--seed"] == "2"
        and given["--layer-kinds"] == "gated_attention"
    )
    assert given["--steps"] == "4" and given["--task-option"] == "pairs=8"
    control = plan["commands"]["control/1m-mamba2"]
    assert control[control.index("density=0") - 1] == "--task-option" and "pairs=8" in control
    assert set(plan["commands"]) == {str(p.relative_to(out)) for p in out.glob("*/*") if p.is_dir()}


def test_finished_runs_are_kept_and_seeds_may_grow(trainer, tmp_path, capsys):
    out = tmp_path / "out"
    few = [word if word != "3" else "1" for word in MQAR]
    assert sessa("compare", *few, "--out", out) == 0
    before = len(calls(out))
    assert sessa("compare", *few, "--out", out) == 0
    assert len(calls(out)) == before
    assert sessa("compare", *MQAR, "--out", out) == 0
    assert len(calls(out)) == before + 4 * 2
    capsys.readouterr()
    changed = ("--batch-size", "3")
    assert sessa("compare", *MQAR, *changed, "--out", out) == 2
    assert "is 2 in its plan.json" in (error := capsys.readouterr().err) and "3 was given" in error
    assert sessa("compare", *few, "--out", out) == 2


def test_a_failed_control_may_be_trained_longer(trainer, tmp_path, capsys):
    out = tmp_path / "out"
    assert sessa("compare", *FEW, "--control-steps", 6, "--out", out) == 0
    before = starts(out)
    assert [call["steps"] for call in before if call["name"] == "1m-mamba2"] == ["6"]
    for fewer in ("5", "0"):
        assert sessa("compare", *FEW, "--control-steps", fewer, "--out", out) == 2
        assert f"is 6 in its plan.json, {fewer} was" in capsys.readouterr().err
    for _ in range(2):
        assert sessa("compare", *FEW, "--control-steps", 9, "--out", out) == 0
        # The other model passed in 6 steps.
        (again,) = starts(out)[len(before) :]
        assert (again["name"], again["steps"], again["resumed"]) == ("1m-mamba2", "9", False)
    commands = json.loads((out / PLAN).read_text())["commands"]
    taken = {name: dict(itertools.pairwise(words))["--steps"] for name, words in commands.items()}
    assert (taken["control/1m-mamba2"], taken["control/1m-sessa"]) == ("9", "6")
    table = (out / "results.md").read_text()
    assert "**FAILED** 0.620 in 9 steps" in table and "passed 1.000 in 6 steps" in table


def test_other_steps_make_another_comparison(trainer, tmp_path, capsys):
    out = tmp_path / "out"
    assert sessa("compare", *FEW, "--sweep-steps", 2, "--out", out) == 0
    assert [call["steps"] for call in starts(out) if "-lr" in call["name"]] == ["2"] * 4
    for option in ("steps", "sweep-steps"):
        assert sessa("compare", *FEW, "--sweep-steps", 2, f"--{option}", 8, "--out", out) == 2
        error = capsys.readouterr().err
        assert "8 was given; give the same options" in error and "may grow" in error


def test_runs_are_spread_over_the_devices(trainer, tmp_path):
    out = tmp_path / "out"
    # Two devices that PyTorch has everywhere.
    assert sessa("compare", *FEW, "--device", "cpu, meta", "--compile", "--out", out) == 0
    used = [call["device"] for call in starts(out)]
    assert set(used) == {"cpu", "meta"} and all(call["compile"] for call in starts(out))
    plan = json.loads((out / PLAN).read_text())
    assert all("--device" not in words for words in plan["commands"].values())
    train = TrainCommand(program=(), options=command.train_options, diverged_code=3)
    runner = Runner(out, read_plan(out), train, devices=("a", "b", "c"))
    for i, expected in enumerate("abcab"):
        assert runner._free_device() == expected
        runner.running[str(i)] = Running(None, expected, None)
    del runner.running["1"]
    assert runner._free_device() == "b"


def test_report_only_needs_nothing_but_the_folder(trainer, tmp_path):
    out = tmp_path / "out"
    assert sessa("compare", *MQAR, "--out", out) == 0
    before = json.loads((out / "results.json").read_text())
    for name in ("results.json", "results.md", "curves.png", "lags.png"):
        (out / name).unlink()
    assert sessa("compare", "--report-only", "--out", out) == 0
    assert json.loads((out / "results.json").read_text()) == before
    assert (out / "curves.png").exists() and (out / "lags.png").exists()


def test_data_that_changed_behind_its_name_is_told(trainer, tmp_path, capsys):
    out = tmp_path / "out"
    assert sessa("compare", *FEW, "--out", out) == 0
    assert "Not comparable" not in (out / "results.md").read_text()
    (tmp_path / "data").write_text("second")
    assert sessa("compare", *FEW, "--seeds", 2, "--out", out) == 0
    changed = ["runs/1m-sessa-seed1", "runs/1m-mamba2-seed1"]
    assert json.loads((out / "results.json").read_text())["other_data"] == changed
    assert f"**Not comparable:** {', '.join(changed)} used other data" in capsys.readouterr().out


def test_a_control_is_measured_by_what_its_exact_decoder_reaches(trainer, tmp_path):
    soup = [word.replace("diffuse-mqar", "symbolsoup") for word in FEW]
    assert sessa("compare", *soup, "--out", tmp_path / "out") == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
    # 0.8 is below 0.9, but above 0.9 of 0.85.
    assert [row["control"]["passed"] for row in rows] == [True, False]
    assert "passed 0.800 of 0.850 in 4 steps" in (tmp_path / "out" / "results.md").read_text()


def test_a_failed_run_is_shown_and_the_others_go_on(trainer, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "broken").write_text("transformer-seed1")
    assert sessa("compare", *MQAR, "--out", out) == 1
    shown = capsys.readouterr().out
    assert "runs/1m-transformer-seed1 FAILED" in shown and "error: the loss is nan" in shown
    rows = {row["kind"]: row for row in json.loads((out / "results.json").read_text())["models"]}
    # Seeds 0 and 2 are left: 0.6 and 0.64.
    accuracy = rows["transformer"]["mean"]["test"]["accuracy"]
    assert accuracy == pytest.approx({"mean": 0.62, "std": 0.028284271, "n": 2})
    # Two rows a step: five tokens a row, however long the context is.
    assert rows["transformer"]["length"] == 5
    assert "Not finished, so not in the numbers: runs/1m-transformer-seed1" in shown
    (tmp_path / "broken").unlink()
    assert sessa("compare", *MQAR, "--out", out) == 0
    assert calls(out)[-1] == ("1m-transformer-seed1", True)


def test_a_rate_that_diverges_loses_the_sweep(trainer, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "broken").write_text("sessa-lr0.003")
    assert sessa("compare", *MQAR, "--out", out) == 0
    rows = {row["kind"]: row for row in json.loads((out / "results.json").read_text())["models"]}
    assert rows["sessa"]["sweep"]["0.003"] is None and rows["sessa"]["learning_rate"] == 1e-3
    assert len(rows["sessa"]["seeds"]) == 3
    # The same command has nothing left to do.
    calls = (out / "calls").read_text()
    assert sessa("compare", *MQAR, "--out", out) == 0 and (out / "calls").read_text() == calls


def test_a_model_that_diverges_at_every_rate_has_failed(trainer, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "broken").write_text("sessa-lr")
    assert sessa("compare", *FEW, "--out", out) == 1
    assert (
        "1m-sessa FAILED: its training diverged at every learning rate" in capsys.readouterr().out
    )
    rows = {row["kind"]: row for row in json.loads((out / "results.json").read_text())["models"]}
    assert not rows["sessa"]["seeds"] and len(rows["mamba2"]["seeds"]) == 1


def start_slow(trainer, out):
    """A command with three runs that wait: its arguments, itself, names and pids of the runs."""
    (out.parent / "slow").write_text("")
    program = (
        "import signal, sys, sessa_cli.compare as c; from sessa_cli.main import app, main\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # Ignored where nohup started the tests.
        f"c.TRAIN = (sys.executable, {str(trainer)!r})\n"
        "known = {x.callback.__name__ for x in app.registered_commands if x.callback}\n"
        "'compare' in known or app.command()(c.compare)\n"
        "main(sys.argv[1:])"
    )
    arguments = [sys.executable, "-c", program, "compare", *MQAR, "--out", str(out)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(out.glob("sweep/*/waiting"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    started = {path.parent.name: int(path.read_text()) for path in out.glob("sweep/*/waiting")}
    assert len(started) == 3
    return arguments, process, started


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_children_and_the_same_command_goes_on(trainer, tmp_path, number):
    out = tmp_path / "out"
    arguments, process, started = start_slow(trainer, out)
    process.send_signal(number)
    shown = process.communicate(timeout=30)[0]
    assert process.returncode == 130 and "the same command continues" in shown
    (tmp_path / "slow").unlink()
    assert subprocess.run(arguments, env=os.environ, capture_output=True).returncode == 0
    again = calls(out)[3:]
    assert {name for name, resumed in again if resumed} == set(started)
    assert len(again) == 24


def test_a_folder_has_one_comparison_at_a_time(trainer, tmp_path):
    out = tmp_path / "out"
    arguments, process, started = start_slow(trainer, out)
    message = "another sessa compare works there, or a training run that one left behind"
    second = subprocess.run(arguments, capture_output=True, text=True)
    assert second.returncode == 2 and message in second.stdout + second.stderr
    process.kill()
    process.communicate(timeout=30)
    # Its runs go on, so the folder is still in use.
    second = subprocess.run(arguments, capture_output=True, text=True)
    assert second.returncode == 2 and message in second.stdout + second.stderr
    (tmp_path / "slow").unlink()
    for pid in started.values():
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while (result := subprocess.run(arguments, capture_output=True)).returncode == 2:
        assert time.monotonic() < deadline
    assert result.returncode == 0


def test_only_an_empty_folder_begins_a_comparison(trainer, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert sessa("compare", *FEW, "--out", out) == 2
    assert "not empty and no comparison" in capsys.readouterr().err
    (out / "thesis.txt").unlink()
    # What a command leaves that failed before its plan was written.
    (out / LOCK).write_text("")
    (out / ".sessa-0123456789abcdef.tmp").mkdir()
    assert sessa("compare", *FEW, "--out", out) == 0


def test_text_is_measured_by_perplexity(trainer, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = (
        "--data",
        "pydoc",
        "--models",
        "sessa,transformer",
        "--steps",
        "4",
        "--seeds",
        "2",
        "--learning-rates",
        "1e-3",
        "--backend",
        "torch",
        "--out",
        out,
        "--text-field",
        "story",
        "--validation-data",
        "pydoc",
        "--validation-data",
        __file__,
    )
    assert sessa("compare", *arguments, "--json") == 0
    given = json.loads((out / "plan.json").read_text())["commands"]["runs/1m-sessa-seed0"]
    held_out = ["--text-field", "story", "--validation-data", "pydoc", "--validation-data"]
    assert " ".join([*held_out, __file__]) in " ".join(given)
    rows = {row["kind"]: row for row in json.loads(capsys.readouterr().out)["models"]}
    # Losses at the rate 1e-3: 0.5 + 0.2 for Sessa, 0.5 for the Transformer.
    assert rows["sessa"]["mean"]["perplexity"]["mean"] == pytest.approx(2.0137527)
    assert rows["transformer"]["mean"]["perplexity"]["mean"] == pytest.approx(1.6487213)
    assert rows["sessa"]["control"] is None and not (out / "control").exists()
    assert not (out / "lags.png").exists() and (out / "curves.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "sudoku"), "is 'sudoku', expected symbolsoup, diffuse-mqar or a folder"),
        ((), "give either"),
        (("--task", "symbolsoup", "--data", "pydoc"), "give either"),
        (
            ("--task", "symbolsoup", "--models", "sessa,rwkv"),
            "has 'rwkv', expected of sessa, transformer",
        ),
        (("--task", "symbolsoup", "--scale", "2m"), "has '2m', expected of"),
        (("--task", "symbolsoup", "--steps", "0"), "is 0, expected 1"),
        (("--task", "symbolsoup", "--seeds", "-1"), "is -1, expected 1"),
        (("--task", "symbolsoup", "--jobs", "0"), "is 0, expected 1"),
        (("--task", "symbolsoup", "--learning-rates", "fast"), "--learning-rates is 'fast'"),
        (("--task", "symbolsoup", "--learning-rates", "0"), "expected numbers above 0"),
        (("--task", "symbolsoup", "--task-option", "noise"), "expected name=value"),
        (("--task", "symbolsoup", "--task-option", "colour=3"), "unknown option colour"),
        (("--task", "diffuse-mqar", "--control-task-option", "density=much"), "expected a value"),
        (("--task", "diffuse-mqar", "--text-field", "story"), "is about text"),
        (("--data", "none.txt"), "none.txt: no such file"),
        (("--data", "pydoc", "--validation-data", "none.txt"), "none.txt: no such file"),
        (("--task", "symbolsoup", "--models", "sessa,sessa"), "each once"),
        (("--task", "symbolsoup", "--config", "sessa"), "expected name=path.json"),
        (("--task", "symbolsoup", "--device", "cpu,,meta"), "--device is 'cpu,,meta', expected"),
        (("--task", "symbolsoup", "--device", "cpu, cpu"), "commas, each once"),
        (("--task", "symbolsoup", "--device", "cpu,cuda:99"), "device 'cuda:99' cannot be used"),
    ],
)
def test_bad_input_is_refused_before_work(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert sessa("compare", *arguments, "--out", out) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_models_that_do_not_match_are_refused(tmp_path):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SessaConfig(num_hidden_layers=2).to_dict()))
    given = Comparison(task="diffuse-mqar", models=("sessa", "mine"), configs=(f"mine={path}",))
    with pytest.raises(SessaError, match=r"not matched: 1m-sessa .*1m-mine"):
        given.compared_models()


def test_aggregates_by_hand():
    values = [{"a": 1.0, "b": {"c": 2}}, {"a": 2.0, "b": {"c": 4}}, {"a": 6.0, "b": {"c": 9}}]
    assert aggregate(values) == {
        "a": {"mean": 3.0, "std": pytest.approx(7**0.5), "n": 3},
        "b": {"c": {"mean": 5.0, "std": pytest.approx(13**0.5), "n": 3}},
    }
    assert aggregate([0.5]) == {"mean": 0.5, "std": None, "n": 1}
    assert spread(aggregate([0.5]), 2) == "0.50" and spread(None, 2) == "–"
    assert spread(aggregate([1.0, 3.0]), 1) == "2.0 ± 1.4"


def test_flops_are_counted_by_the_products():
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    T, D = 5, 8
    visible, past = sum(range(1, T + 1)), sum(range(T))
    for kind, pairs in (
        ("transformer", visible),
        ("gated_attention", visible),
        ("sessa", visible + past),
        ("sessa_transformer", visible + past),
    ):
        config = SessaConfig(**sizes, layer_kinds=kind)
        # Scores and values: two products of width D for each pair of positions, three passes.
        expected = 6 * parameter_count(config) + 3 * 2 * 2 * D * pairs / T
        assert flops_per_token(config, T) == pytest.approx(expected)
    untied = SessaConfig(**sizes, layer_kinds="transformer", tie_word_embeddings=False)
    tied = SessaConfig(**sizes, layer_kinds="transformer")
    assert flops_per_token(untied, T) == flops_per_token(tied, T)


def test_an_unfinished_run_has_no_result(tmp_path):
    (tmp_path / "training.json").write_text(json.dumps({"task": None}))
    (tmp_path / "config.json").write_text(json.dumps(SessaConfig().to_dict()))
    line = json.dumps({"step": 3, "validation_loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    assert read_result(tmp_path, 4) is None
    assert read_result(tmp_path, 3)["perplexity"] == pytest.approx(2.7182818)
    assert read_result(Path(tmp_path / "none"), 3) is None


def test_a_configuration_that_changed_is_another_comparison(tmp_path):
    file = tmp_path / "own.json"
    config = SessaConfig(hidden_size=32, num_attention_heads=2, vocab_size=300)
    file.write_text(json.dumps(config.to_dict()))
    comparison = Comparison(
        task="symbolsoup", models=("own",), configs=(f"own={file}",), scales=("400k",)
    )
    out = tmp_path / "out"
    out.mkdir()
    write_plan(out, comparison, {})
    check_plan(out, comparison)
    file.write_text(json.dumps(dataclasses.replace(config, num_hidden_layers=9).to_dict()))
    with pytest.raises(SessaError, match="configuration of 400k-own"):
        check_plan(out, comparison)


def test_old_names_of_models_and_of_their_option_are_accepted(trainer, tmp_path):
    out = tmp_path / "out"
    old = (*MQAR[:2], "--mixers", OLD_NAMES, *MQAR[4:], "--seeds", "1")
    assert sessa("compare", *old, "--out", out) == 0
    given = json.loads((out / PLAN).read_text())["options"]["models"]
    assert given == ["sessa", "transformer", "mamba2", "gated_attention"]


def test_a_plan_of_before_version_0_2_is_only_reported(trainer, tmp_path, capsys):
    """An old plan has `mixers`, and `options` as they were typed; its folders have old names."""
    out = tmp_path / "out"
    assert sessa("compare", *MQAR, "--out", out) == 0
    before = json.loads((out / "results.json").read_text())["models"]
    plan = json.loads((out / PLAN).read_text())
    options = plan["options"]
    del options["models"], options["settings"]
    options |= {"mixers": OLD_NAMES.split(","), "options": ["--precision", "float32"]}
    (out / PLAN).write_text(json.dumps(plan))
    for path in sorted(out.glob("*/*"), reverse=True):
        old = path.name.replace("transformer", "attention").replace("gated_attention", "nofeedback")
        path.rename(path.with_name(old))
    assert sessa("compare", "--report-only", "--out", out) == 0
    after = json.loads((out / "results.json").read_text())["models"]
    assert [row["kind"] for row in after] == OLD_NAMES.split(",")
    assert [row["mean"] for row in after] == [row["mean"] for row in before]
    assert_drawn(out / "curves.png")
    capsys.readouterr()
    assert sessa("compare", *MQAR, "--models", OLD_NAMES, "--out", out) == 2
    assert "an earlier version made this comparison" in capsys.readouterr().err


@pytest.mark.parametrize("folder", sorted(STORED.glob("compare_*")), ids=lambda path: path.name)
def test_stored_plans_are_read(folder):
    assert read_plan(folder).seeds == json.loads((folder / PLAN).read_text())["options"]["seeds"]
