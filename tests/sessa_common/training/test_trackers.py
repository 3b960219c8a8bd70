"""Trackers get every measure of a run, and a resumed run goes on in the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import sessa_torch
from sessa_common.errors import SessaError

TINY: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "tokenizer": "bytes",
    "batch_size": 2,
    "evaluate_every": 2,
}


def train(folder: Path, **fields: Any) -> None:
    text = folder.parent / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    with mock.patch("sessa_common.training.trainer.draw_losses"):
        sessa_torch.train(folder, data=text, device="cpu", **TINY, **fields)


def scalars(folder: Path) -> dict[str, list[int]]:
    """The steps of every scalar that TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder / "tensorboard"))
    shown.Reload()
    return {tag: [event.step for event in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def test_tensorboard_shows_every_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = tmp_path / "run"
    train(folder, steps=3, track="tensorboard")
    with mock.patch("sessa_common.training.trainer.draw_losses"):
        sessa_torch.train(resume=folder, steps=5, device="cpu")
    found = scalars(folder)
    assert found["loss"] == found["tokens_per_second"] == [1, 2, 3, 4, 5]
    assert found["validation_loss"] == [2, 3, 4, 5]


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    logged: list[dict[str, Any]] = []
    begun: list[dict[str, Any]] = []

    class Session:
        def define_metric(self, name: str, step_metric: str) -> None:
            assert (name, step_metric) == ("*", "step")

        def log(self, record: dict[str, Any]) -> None:
            logged.append(record)

        def finish(self, exit_code: int) -> None:
            assert exit_code == 0

    monkeypatch.setattr(wandb, "init", lambda **given: begun.append(given) or Session())
    folder = tmp_path / "run"
    train(folder, steps=2, track="wandb")
    sessa_torch.train(resume=folder, steps=3, device="cpu")
    assert [given["id"] for given in begun] == [begun[0]["id"]] * 2
    assert begun[0]["name"] == "run" and begun[0]["config"]["steps"] == 2
    assert [record["step"] for record in logged if "loss" in record] == [1, 2, 3]


@pytest.mark.slow
def test_wandb_offline_writes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "run"
    train(folder, steps=2, track="wandb")
    sessa_torch.train(resume=folder, steps=3, device="cpu")
    runs = sorted(path.name for path in (folder / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and len({name.rpartition("-")[2] for name in runs}) == 1


def test_a_tracker_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SessaError, match="track is 'mlflow', expected tensorboard, wandb"):
        train(tmp_path / "run", steps=1, track="mlflow")
    with (
        mock.patch("importlib.util.find_spec", return_value=None),
        pytest.raises(SessaError, match=r"needs the package wandb; pip install .*\[track\]"),
    ):
        train(tmp_path / "run", steps=1, track="wandb")
    assert not (tmp_path / "run").exists()
