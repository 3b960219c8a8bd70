"""A start that fails leaves what was there before; a run folder appears whole."""

import importlib

import pytest

from sessa_common.errors import SessaError
from sessa_common.training import session
from sessa_common.training.preparation import TrainRequest
from sessa_common.training.saved_state import read_state_metadata

TINY = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "tokenizer": "bytes",
    "steps": 2,
    "batch_size": 2,
    "warmup_steps": 1,
}
TWINS = ("sessa_torch", "sessa_mlx")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    return path


@pytest.fixture
def out(text, tmp_path):
    """The folder of an earlier run."""
    importlib.import_module("sessa_torch").train(tmp_path / "out", data=text, device="cpu", **TINY)
    return tmp_path / "out"


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def no_memory(*_):
    raise MemoryError("cannot allocate 99 GB")


def no_save(*_, **__):
    raise OSError(28, "No space left on device")


# What fails: the arguments of train, what is replaced to make it fail, and the error.
FAILURES = {
    "device": ({"device": "no-such-device"}, None, SessaError),
    "short data": ({"data": "short.txt"}, None, SessaError),
    "no data": ({"data": "gone.txt"}, None, SessaError),
    "tokenizer": ({"tokenizer": "5"}, None, SessaError),
    "out of memory": ({}, ("{twin}.training.TrainBackend", no_memory), MemoryError),
    "full disk": ({}, ("sessa_common.training.run_folder.write_weights", no_save), OSError),
}


@pytest.mark.parametrize("there", [False, True], ids=["new", "force"])
@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize(("change", "patch", "error"), FAILURES.values(), ids=FAILURES)
def test_a_start_that_fails_leaves_what_was_there(
    twin, change, patch, error, there, text, tmp_path, monkeypatch, request
):
    folder = request.getfixturevalue("out") if there else tmp_path / "new" / "run"
    (tmp_path / "short.txt").write_text("too short")
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    if patch:
        monkeypatch.setattr(patch[0].format(twin=twin), patch[1])
    arguments = {"data": text, "device": "cpu", **TINY, **change}
    with pytest.raises(error):
        importlib.import_module(twin).train(folder, force=there, **arguments)
    assert contents(tmp_path) == before
    assert folder.exists() == there


@pytest.mark.parametrize("twin", TWINS)
def test_force_replaces_the_run_when_everything_was_tried(twin, out, text):
    before = contents(out)
    with pytest.raises(SessaError, match="not empty; choose another or add `force`"):
        importlib.import_module(twin).train(out, data=text, device="cpu", **TINY)
    assert contents(out) == before
    result = importlib.import_module(twin).train(
        out, data=text, device="cpu", force=True, **{**TINY, "steps": 1}
    )
    assert result.metrics["step"] == 1


def test_the_folder_is_made_after_the_backend_and_holds_step_0(text, tmp_path, monkeypatch):
    module = importlib.import_module("sessa_torch.training")
    order = []

    def make_backend(*arguments):
        order.append(("backend", (tmp_path / "run").exists()))
        return module.TrainBackend(*arguments)

    def stopped(*_):
        order.append(("training", read_state_metadata(tmp_path / "run")[0]))
        raise KeyboardInterrupt

    monkeypatch.setattr(session.Trainer, "train", stopped)
    request = TrainRequest(out=tmp_path / "run", fields={"data": text, **TINY})
    with pytest.raises(KeyboardInterrupt):
        session.run_session(make_backend, request, "cpu")
    assert order == [("backend", False), ("training", 0)]


def test_the_reporter_hears_of_the_start_every_step_and_every_evaluation(text, tmp_path):
    heard = []

    class Listener:
        def preparing(self, activity):
            heard.append(("preparing", activity))

        def started(self, record):
            heard.append(("started", record["step"], record["steps"]))

        def training(self, record):
            heard.append(("training", record["step"]))

        def validation(self, record):
            heard.append(("validation", record["step"]))

    twin = importlib.import_module("sessa_torch")
    twin.train(tmp_path / "run", data=text, device="cpu", reporter=Listener(), **TINY)
    size = len(text.read_text())
    assert heard.pop(0) == ("preparing", f"tokenizing the training text: {size:,} characters")
    assert heard == [("started", 0, 2), ("training", 1), ("training", 2), ("validation", 2)]
    assert twin.train(resume=tmp_path / "run", steps=3, reporter=Listener()).finished
    assert heard[5:] == [("started", 2, 3), ("training", 3), ("validation", 3)]
