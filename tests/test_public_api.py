"""The public API: its names and signatures, how it loads, and whole programs of five lines."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.public_api import PACKAGES, describe_package

import sessa_common
import sessa_export
from sessa_common.errors import SessaError

ROOT = Path(__file__).parents[1]
TWINS = ("sessa_torch", "sessa_mlx")
HEAVY = ("torch", "mlx", "onnx", "onnxruntime", "datasets", "matplotlib", "transformers")
TINY = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "tokenizer": "bytes",
    "steps": 2,
    "batch_size": 2,
    "warmup_steps": 1,
    "device": "cpu",
}


def test_the_api_changes_only_where_it_is_announced():
    """After a wanted change: a line in CHANGELOG.md, and tests/support/public_api.py anew."""
    found = [line for package in PACKAGES for line in describe_package(package)]
    listed = (ROOT / "tests/public_api.txt").read_text(encoding="utf-8").splitlines()
    assert found == listed


def test_the_twins_have_the_same_api():
    one, other = (list(describe_package(package)) for package in TWINS)
    assert one == [line.replace("sessa_mlx", "sessa_torch") for line in other]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_public_name_is_the_name_of_a_module(package):
    module = importlib.import_module(package)
    folder = Path(module.__file__).parent
    modules = {path.stem for path in folder.iterdir()}
    assert not modules & set(module.__all__)
    assert (folder / "py.typed").exists()
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        module.no_such_name  # noqa: B018


LOADED = """
import sys
{0}
print(",".join(sorted(set({1!r}) & set(sys.modules))))
"""


@pytest.mark.parametrize(
    "code",
    [
        *(f"import {package}" for package in PACKAGES),
        *(
            f"from sessa_cli.main import main\ntry: main([{option!r}])\nexcept SystemExit: pass"
            for option in ("--help", "--version")
        ),
        "from sessa_cli.main import main\ntry: main(['train', '-h'])\nexcept SystemExit: pass",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_used(code):
    answer = subprocess.run(
        [sys.executable, "-c", LOADED.format(code, HEAVY)],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == ""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """A trained checkpoint folder."""
    import sessa_torch

    return sessa_torch.train(tmp_path_factory.mktemp("runs") / "run", data=text, **TINY).folder


@pytest.mark.parametrize("package", TWINS)
def test_train_and_go_on(package, text, tmp_path):
    twin = importlib.import_module(package)
    result = twin.train(tmp_path / "run", data=text, **TINY)
    assert result.finished and result.metrics["step"] == 2 and result.metrics["loss"] > 0
    longer = twin.train(resume=result.folder, steps=3, device="cpu")
    assert (longer.metrics["step"], longer.parameters) == (3, result.parameters)
    with pytest.raises(SessaError, match="all 3 steps are done; give a larger `steps`"):
        twin.train(resume=result.folder, device="cpu")


@pytest.mark.parametrize("package", TWINS)
def test_train_on_a_task_from_a_config_in_memory(package, tmp_path):
    twin = importlib.import_module(package)
    config = twin.SessaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    settings = sessa_common.TrainConfig(task="symbolsoup", steps=1, batch_size=2)
    options = ["min_tokens=20", "max_tokens=24", "train_examples=4", "validation_examples=2"]
    result = twin.train(
        tmp_path / "run",
        config=config,
        train_config=settings,
        task_options=[*options, "test_examples=2"],
        device="cpu",
    )
    assert result.task_result["test"]["examples"] == 2
    assert json.loads((result.folder / "config.json").read_text())["hidden_size"] == 16


@pytest.mark.parametrize("package", TWINS)
def test_generate_and_stream(package, run):
    twin = importlib.import_module(package)
    pieces = {0: "", 1: ""}

    def collect(row, piece):
        pieces[row] += piece

    options = {"max_tokens": 5, "temperature": 0}
    texts = twin.generate(run, ["The", "A dog"], on_text=collect, device="cpu", **options)
    assert texts == [pieces[0], pieces[1]]
    model = twin.load_model(run, device="cpu")
    assert twin.generate(model, "The", tokenizer=run, **options) == texts[:1]
    with pytest.raises(SessaError, match="has no tokenizer; give `tokenizer`"):
        twin.generate(model, "The")


@pytest.mark.parametrize("package", TWINS)
def test_evaluate(package, run, text):
    twin = importlib.import_module(package)
    score = twin.evaluate(run, text, stride=8, device="cpu")
    assert score.tokens == score.bytes == len(text.read_bytes()) and score.perplexity > 1
    model = twin.load_model(run, device="cpu")
    assert twin.evaluate(model, [text], stride=8, tokenizer=run).loss == score.loss


def test_convert_export_and_check(run, tmp_path):
    report = sessa_common.convert(run, tmp_path / "mlx", framework="mlx")
    assert report.exact
    sessa_export.export(tmp_path / "mlx", tmp_path / "onnx", clients="ort")
    found = sessa_export.check(tmp_path / "mlx", tmp_path / "onnx")
    assert [runtime.runtime for runtime in found] == ["PyTorch", "MLX", "ONNX Runtime"]
    assert all(runtime.ok and len(runtime.results) == 3 for runtime in found)


BAD = {
    "field": (lambda t, run: t.train("out", stepz=3), "stepz is not a known field; did you mean"),
    "type": (lambda t, run: t.train("out", learning_rate="high"), "expected a number"),
    "value": (lambda t, run: t.train("out", steps=0), "steps is 0, expected a positive integer"),
    "models": (
        lambda t, run: t.train("out", preset="demo", init=run),
        "`preset`, `config` and `init` each name a model",
    ),
    "resume": (lambda t, run: t.train("out", resume=run), "`out` starts a new run"),
    "device": (lambda t, run: t.train("out", device="tpu"), "device"),
    "sampling": (lambda t, run: t.generate(run, "a", top_p=2), "top_p is 2"),
    "prompts": (lambda t, run: t.generate(run, [], device="cpu"), "prompts is empty"),
    "dtype": (lambda t, run: t.evaluate(run, "pydoc", dtype="int4"), "dtype is 'int4'"),
    "stride": (lambda t, run: t.evaluate(run, "pydoc", stride=0, device="cpu"), "stride is 0"),
    "in memory": (
        lambda t, run: t.generate(t.load_model(run, device="cpu"), "a", device="cpu"),
        "the model in memory has its own",
    ),
}


@pytest.mark.parametrize("package", TWINS)
@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named_and_nothing_is_written(
    package, call, message, run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SessaError, match=message):
        call(importlib.import_module(package), run)
    assert list(tmp_path.iterdir()) == []
