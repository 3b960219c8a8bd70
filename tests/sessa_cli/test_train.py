"""`sessa train` and `sessa eval` from the command line: results, resuming, and bad input."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.in_process import fails, sessa

from sessa_common.checkpoint.folder import load_weights
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.config import SessaConfig
from sessa_common.data.tokenizer import read_tokenizer
from sessa_common.errors import SessaError
from sessa_common.frameworks import choose_backend, framework
from sessa_common.inference.evaluation import score_documents, token_losses, windows
from sessa_common.storage import MANIFEST
from sessa_common.train_config import TrainConfig
from sessa_common.training.metrics import read_metrics

BACKENDS = ("torch", "mlx")
TINY = (
    "--layers",
    "1",
    "--width",
    "16",
    "--heads",
    "2",
    "--context",
    "32",
    "--tokenizer",
    "bytes",
    "--steps",
    "4",
    "--batch-size",
    "2",
    "--warmup-steps",
    "1",
    "--device",
    "cpu",
)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    return str(path)


@pytest.fixture
def run_folder(text, tmp_path):
    assert sessa("train", "--data", text, *TINY, "--out", tmp_path / "run") == 0
    return tmp_path / "run"


@pytest.mark.parametrize("backend", BACKENDS)
def test_train_leaves_a_checkpoint_that_loads_and_a_paragraph(backend, text, tmp_path, capsys):
    out = tmp_path / "a" / "run"
    assert sessa("train", "--data", text, *TINY, "--out", out, "--backend", backend, "--json") == 0
    stdout, stderr = capsys.readouterr()
    result = json.loads(stdout)
    assert result["finished"] and result["step"] == 4 and result["backend"] == backend
    assert result["text"].startswith("The") and len(result["text"]) > 3
    assert "tokens/s" in stderr and "validation loss" in stderr
    names = {path.name for path in out.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "configuration_sessa.py",
        "mlx_lm_model.py",
        "model.safetensors",
        "modeling_sessa.py",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "training.json",
        "training_state.safetensors",
        "metrics.jsonl",
        "loss.png",
        "checkpoints",
        MANIFEST,
    }
    config, weights = load_weights(out)
    assert (config.vocab_size, config.eos_token_id, config.hidden_size) == (257, 256, 16)
    assert result["parameters"] == sum(value.size for value in weights.values())
    assert read_tokenizer(out).encode("é").ids == [0xC3, 0xA9]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "text.txt"]


def test_options_override_the_files(text, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SessaConfig(vocab_size=300, hidden_size=24).to_dict()))
    training = tmp_path / "training.json"
    training.write_text(json.dumps({"steps": 2, "seed": 9, "batch_size": 2, "window": 20}))
    assert (
        sessa(
            "train",
            "--data",
            text,
            "--config",
            config,
            "--layers",
            1,
            "--kv-heads",
            2,
            "--no-rope",
            "--gamma-max",
            0.5,
            "--train-config",
            training,
            "--seed",
            4,
            "--tokenizer",
            280,
            "--out",
            tmp_path / "run",
        )
        == 0
    )
    made, _ = load_weights(tmp_path / "run")
    # A config file fixes the embedding, even where the tokenizer is smaller.
    assert (made.vocab_size, made.hidden_size, made.num_hidden_layers) == (300, 24, 1)
    assert (made.num_key_value_heads, made.use_forward_rope, made.gamma_max) == (2, False, 0.5)
    saved = TrainConfig.from_dict(json.loads((tmp_path / "run" / "training.json").read_text()))
    assert (saved.steps, saved.seed, saved.sequence_length) == (2, 4, 20)


def test_preset_takes_the_size_of_the_tokenizer(text, tmp_path):
    assert (
        sessa("train", "--data", text, *TINY, "--preset", "sessa-9m", "--out", tmp_path / "r") == 0
    )
    config, _ = load_weights(tmp_path / "r")
    assert (config.vocab_size, config.num_hidden_layers) == (257, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_resume_is_the_unbroken_run(backend, text, tmp_path, capsys):
    common = ("--data", text, *TINY, "--backend", backend, "--accumulation", 2)
    assert sessa("train", *common, "--steps", 6, "--out", tmp_path / "whole") == 0
    # A smaller learning-rate schedule would differ, so the run is stopped, not shortened.
    interrupted = subprocess.run(
        [
            sys.executable,
            "-c",
            STOP_AFTER_3,
            *map(str, common),
            "--steps",
            "6",
            "--out",
            str(tmp_path / "parts"),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert interrupted.returncode == 130, interrupted.stderr
    assert f"sessa train --resume {tmp_path / 'parts'}" in interrupted.stdout
    assert read_metrics(tmp_path / "parts")[-1]["step"] == 3
    assert sessa("train", "--resume", tmp_path / "parts", "--backend", backend) == 0
    for name in ("model.safetensors", "training_state.safetensors"):
        left, right = (tmp_path / run / name for run in ("whole", "parts"))
        assert left.read_bytes() == right.read_bytes(), name


STOP_AFTER_3 = """
import os, signal, sys
from sessa_common.training.trainer import Trainer
step = Trainer._train_step
def stopping(self):
    step(self)
    if self.step == 3:
        signal.raise_signal(signal.SIGINT)
Trainer._train_step = stopping
from sessa_cli.main import main
main(["train", *sys.argv[1:]])
"""


def test_resume_with_more_steps_goes_on(run_folder, capsys):
    assert "all 4 steps are done" in fails(capsys, "train", "--resume", run_folder)
    earlier = fails(capsys, "train", "--resume", run_folder, "--steps", 2)
    assert "the run has taken 4 steps already" in earlier and "give --steps above 4" in earlier
    assert sessa("train", "--resume", run_folder, "--steps", 6) == 0
    assert [r["step"] for r in read_metrics(run_folder) if "loss" in r] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", 2), "another architecture: num_hidden_layers is 1, 2 was given"),
        (
            ("--no-feedback",),
            "another architecture: layer_kinds is sessa, gated_attention was given",
        ),
        (("--lr", 0.5), "learning_rate is 0.003 in this run, 0.5 was given"),
        (("--optimizer", "muon"), "optimizer is adamw in this run, muon was given"),
        (("--preset", "sessa-9m"), "--preset starts a new run"),
        (("--data", "pydoc"), "the data are not those"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_resume_as_another_run_is_refused(options, message, run_folder, capsys):
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    said = fails(capsys, "train", "--resume", run_folder, "--steps", 9, *options)
    assert message in said
    assert before == {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}


def test_resume_needs_a_training_state(run_folder, capsys):
    (run_folder / "training_state.safetensors").unlink()
    assert "no training_state.safetensors in it" in fails(capsys, "train", "--resume", run_folder)


def test_a_folder_that_cannot_be_made_is_one_line(text, tmp_path, capsys):
    said = fails(capsys, "train", "--data", text, *TINY, "--out", f"{text}/run")
    assert "text.txt" in said


def test_init_starts_from_the_weights_and_tokenizer_of_a_checkpoint(run_folder, text, tmp_path):
    assert (
        sessa(
            "train",
            "--init",
            run_folder,
            "--data",
            text,
            "--steps",
            1,
            "--lr",
            "1e-12",
            "--window",
            16,
            "--batch-size",
            2,
            "--out",
            tmp_path / "tuned",
        )
        == 0
    )
    before, after = (load_weights(folder)[1] for folder in (run_folder, tmp_path / "tuned"))
    for name, value in before.items():
        np.testing.assert_allclose(value, after[name], atol=1e-9)
    fresh = initial_weights(load_weights(run_folder)[0], 0)
    assert not np.allclose(fresh["model.norm.bias"], before["model.norm.bias"])
    tokenizers = [
        (folder / "tokenizer.json").read_text() for folder in (run_folder, tmp_path / "tuned")
    ]
    assert tokenizers[0] == tokenizers[1]


def _prepare(case, folder):
    """Make the input of a bad case; the options that name it."""
    path = folder / "bad.txt"
    if case == "missing data":
        return ("--data", folder / "none.txt")
    if case == "number as tokenizer":
        path = folder / "training.json"
        path.write_text('{"tokenizer": 300}')
        return ("--train-config", path)
    if case == "missing hub data":
        return ("--data", folder.name + "-is-no-folder")
    if case == "unreadable data":
        path.write_bytes(b"\xff\xfe")
    elif case == "empty data":
        path.write_text("")
    elif case == "short data":
        path.write_text("too short")
    elif case == "missing field":
        path = folder / "bad.jsonl"
        path.write_text('{"body": "x"}\n')
    elif case == "missing column":
        from pyarrow import parquet, table

        path = folder / "bad.parquet"
        parquet.write_table(table({"body": ["x"]}), path)
    elif case == "tokenizer too large":
        config = folder / "config.json"
        config.write_text(json.dumps({"vocab_size": 200, "hidden_size": 16}))
        path.write_text("text " * 99)
        return ("--data", path, "--config", config)
    elif case == "unknown key":
        config = folder / "config.json"
        config.write_text(json.dumps({"hidden_sise": 16}))
        return ("--config", config)
    else:
        path.write_text("text " * 99)
        return ("--data", path, *case.split())
    return ("--data", path)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing data", r"none\.txt: no such file"),
        ("missing hub data", "no such file or folder; a Hugging Face data set is named hf:"),
        ("unreadable data", r"bad\.txt: not UTF-8 text"),
        ("empty data", "training text is empty"),
        ("short data", "has 10 tokens, expected at least 33 for one row"),
        ("missing field", r"bad\.jsonl, line 1: no field 'text'; it has body"),
        ("missing column", r"bad\.parquet: no column 'text'; it has body"),
        ("tokenizer too large", "the tokenizer has 257 tokens, .* vocab_size 200"),
        ("number as tokenizer", "tokenizer is 300, expected a text such as"),
        ("unknown key", r"config\.json: unknown key hidden_sise"),
        ("--heads 3", "num_attention_heads 3 does not divide hidden_size 16"),
        ("--kv-heads 3", "num_key_value_heads 3 does not divide"),
        ("--heads 16", "head_dim 1 is odd"),
        ("--tokenizer 5", "tokenizer size is 5, expected from 257"),
        ("--tokenizer gone.json", r"gone\.json: no such file"),
        ("--preset sessa-9b", "preset is 'sessa-9b', expected one of demo, .*sessa-1m,"),
        ("--init gone", "gone: no such checkpoint folder"),
        ("--preset sessa-1m --init gone", "--preset, --config and --init"),
        ("--window 33", "sequence_length is 33, but the model has max_position_embeddings 32"),
        ("--steps 0", "steps is 0, expected a positive integer"),
        ("--backend jax", "backend is 'jax', expected one of auto, mlx, torch"),
        ("--device tpu", "device 'tpu' cannot be used by PyTorch"),
        ("--precision int8", "precision is 'int8'"),
        ("--train-config gone.json", r"gone\.json: no such file"),
        ("--resume gone", "gone: no such checkpoint folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(case, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    options = _prepare(case, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    base = () if "--resume" in case else (*TINY, "--out", tmp_path / "run")
    assert re.search(message, fails(capsys, "train", *base, *options))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_interrupted_before_its_first_step_leaves_nothing(text, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sessa_torch.training.TrainBackend", interrupted)
    assert sessa("train", "--data", text, *TINY, "--out", tmp_path / "run") == 130
    assert not (tmp_path / "run").exists()


def test_a_run_interrupted_before_it_goes_on_stays(run_folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sessa_torch.training.TrainBackend", interrupted)
    assert sessa("train", "--resume", run_folder, "--steps", 6) == 130
    assert (run_folder / "training_state.safetensors").exists()


def test_memory_that_does_not_suffice_is_one_line(tmp_path, capsys):
    line = fails(capsys, "data", "diffuse-mqar", "--examples", 10**13, "--out", tmp_path / "data")
    assert "not enough memory" in line and not (tmp_path / "data").exists()


def test_a_folder_that_is_not_empty_needs_force(run_folder, text, tmp_path, capsys):
    again = ("train", "--data", text, *TINY, "--out", run_folder, "--steps", 2)
    before = (run_folder / "metrics.jsonl").read_bytes()
    assert "the folder is not empty; choose another or add --force" in fails(capsys, *again)
    assert (run_folder / "metrics.jsonl").read_bytes() == before
    assert sessa(*again, "--force") == 0
    assert len([r for r in read_metrics(run_folder) if "loss" in r]) == 2


def by_hand(logits, ids, start_id, context):
    """Loss of each token from as much context as the model takes, one forward pass a token."""
    row = np.concatenate([[start_id], ids])
    losses = []
    for i in range(1, len(row)):
        seen = row[max(0, i - context) : i]
        losses.append(token_losses(logits(seen[None])[0, -1:], row[i : i + 1])[0])
    return np.array(losses)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eval_with_stride_1_gives_every_token_the_whole_context(backend, run_folder, capsys):
    text = run_folder.parent / "x.txt"
    text.write_text("Größe: the dog sat over the quick fox, again and again.", encoding="utf-8")
    capsys.readouterr()
    assert (
        sessa("eval", run_folder, "--data", text, "--stride", 1, "--json", "--backend", backend)
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    model = framework(backend, "checkpoint").load_model(run_folder)
    logits = framework(backend, "evaluation").logits_function(model)
    raw = text.read_bytes()
    losses = by_hand(logits, np.frombuffer(raw, np.uint8).astype(np.int32), 256, 32)
    assert result["tokens"] == result["bytes"] == len(raw)
    assert result["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(losses.mean() / math.log(2), rel=1e-5)


def test_eval_agrees_between_the_frameworks(run_folder, text, capsys):
    results = []
    for backend in BACKENDS:
        capsys.readouterr()
        assert sessa("eval", run_folder, "--data", text, "--json", "--backend", backend) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-5)
    assert results[0]["documents"] == 1


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 40])
@pytest.mark.parametrize("stride", [1, 3, 7, 8])
def test_every_token_is_scored_once_in_full_windows(length, stride):
    scored = []
    for start, stop, first in windows(length, 8, stride):
        assert 0 <= start <= first < stop <= length
        assert stop - start == min(8, length)
        assert first == 0 or first - start >= 8 - stride
        scored += range(first, stop)
    assert scored == list(range(length))


def test_documents_do_not_see_each_other_and_padding_changes_nothing():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(11, 11))

    def logits(ids):
        # Each position answers from the sum of what it has seen: causal, and easy to check.
        return np.cumsum(table[ids], 1)

    documents = [(rng.integers(0, 11, n), n) for n in (3, 1, 9, 5)]
    together = score_documents(logits, documents, start_id=10, context=9, batch_size=4)
    alone = [score_documents(logits, [document], start_id=10, context=9) for document in documents]
    assert together.nats == pytest.approx(sum(score.nats for score in alone))
    assert (together.tokens, together.documents) == (18, 4)
    expected = sum(by_hand(logits, ids, 10, 9).sum() for ids, _ in documents)
    assert together.nats == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stride", 33), "stride is 33, expected from 1 to the context of 32"),
        (("--stride", -1), "stride is -1"),
        (("--window", 64), "sequence_length is 64, expected from 1 to the model's context of 32"),
        (("--dtype", "int4"), "dtype is 'int4', expected one of float32"),
        (("--data", "gone.txt"), "gone.txt: no such file"),
        (("--data", "blank.txt"), "evaluation text is empty"),
    ],
    ids=lambda value: "".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_eval_refuses_bad_input(options, message, run_folder, text, capsys, monkeypatch):
    monkeypatch.chdir(run_folder.parent)
    Path("blank.txt").write_text("\n")
    data = () if "--data" in options else ("--data", text)
    assert message in fails(capsys, "eval", run_folder, *data, *options)


def test_eval_refuses_a_tokenizer_that_is_too_large(run_folder, text, capsys):
    tokenizer = read_tokenizer(run_folder)
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save(str(run_folder / "tokenizer.json"))
    said = fails(capsys, "eval", run_folder, "--data", text)
    assert "the tokenizer has 258 tokens, but the model's embedding has vocab_size 257" in said


def test_backend_auto_prefers_mlx_on_apple_silicon(monkeypatch):
    assert choose_backend(None) == choose_backend("auto") == "torch"
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert choose_backend("auto") == "mlx"
    monkeypatch.setattr("sessa_common.frameworks.is_installed", lambda name: False)
    with pytest.raises(SessaError, match="neither mlx nor torch"):
        choose_backend("auto")
    with pytest.raises(
        SessaError, match=r"backend mlx is not installed; pip install 'sessa-toolchain\[mlx\]'"
    ):
        choose_backend("mlx")


@pytest.mark.parametrize("command", ["train", "eval"])
def test_help_has_an_example(command, capsys):
    assert sessa(command, "--help") == 0
    assert f"Example: sessa {command}" in " ".join(capsys.readouterr().out.split())
