"""Folders of runs, conversions and exports: what may be replaced, and which file is the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.in_process import fails, sessa

from sessa_common.checkpoint.folder import INDEX, load_weights, read_safetensors, write_safetensors
from sessa_common.checkpoint.manifest import read_manifest
from sessa_common.checkpoint.run_files import STATE
from sessa_common.checkpoint.saves import list_saves
from sessa_common.storage import MANIFEST, lock_folder
from sessa_common.training.metrics import METRICS, read_metrics
from sessa_common.training.saved_state import read_state_metadata
from sessa_common.training.trainer import Trainer

TINY = (
    "--layers",
    1,
    "--width",
    16,
    "--heads",
    2,
    "--context",
    16,
    "--tokenizer",
    "bytes",
    "--batch-size",
    2,
    "--warmup-steps",
    1,
    "--evaluate-every",
    2,
    "--device",
    "cpu",
    "--backend",
    "torch",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with text, d.txt, and a run of 4 steps on it, a."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "d.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    assert (
        sessa(
            "train",
            "--data",
            folder / "d.txt",
            *TINY,
            "--steps",
            4,
            "--checkpoint-every",
            2,
            "--out",
            folder / "a",
        )
        == 0
    )
    return folder


@pytest.fixture
def work(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path / "work")
    return tmp_path / "work"


def weights(folder: Path) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_weights(folder)[1].items()}


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()  # So that the kept save, the same file by another name, stays whole.
    path.write_bytes(content)


# Which file is the model.


def test_resumed_run_in_shards_uses_what_it_learned(work):
    assert sessa("convert", work / "a", work / "s", "--shard-size", "2KB") == 0
    assert (work / "s" / INDEX).exists()
    for run in ("a", "s"):
        assert sessa("train", "--resume", work / run, "--steps", 8, "--backend", "torch") == 0
    assert weights(work / "s") == weights(work / "a")
    assert not (work / "s" / INDEX).exists()


def test_export_inside_a_checkpoint_is_not_what_generate_runs(work, capsys):
    pytest.importorskip("onnxruntime")
    assert sessa("export", work / "a", work / "a" / "onnx") == 0
    asked = ("generate", work / "a", "--prompt", "The", "--max-tokens", 3, "--backend")
    for backend, said in (("auto", "a checkpoint, run by torch"), ("onnx", "run by ONNX Runtime")):
        capsys.readouterr()
        assert sessa(*asked, backend) == 0
        assert said in capsys.readouterr().err
    capsys.readouterr()
    assert sessa("generate", work / "a" / "onnx", "--max-tokens", 3) == 0
    assert "an exported model" in capsys.readouterr().err


# What survives.


def test_saves_are_kept_and_whole(work, capsys):
    a = work / "a"
    assert (
        sessa("train", "--resume", a, "--steps", 8, "--backend", "torch", "--checkpoint-every", 2)
        == 0
    )
    kept = list_saves(a)
    losses = {r["step"]: r["validation_loss"] for r in read_metrics(a) if "validation_loss" in r}
    assert {m.step for m in kept.values()} == {6, 8} | {min(losses, key=losses.__getitem__)}
    assert all(m.validation_loss == losses[m.step] for m in kept.values())
    capsys.readouterr()
    assert sessa("info", a, "--verify", "--json") == 0
    assert json.loads(capsys.readouterr().out)["verified"] == 2 * (len(kept) + 1)
    assert sessa("generate", next(iter(kept)), "--max-tokens", 2, "--backend", "torch") == 0


@pytest.mark.parametrize("name", ["model.safetensors", STATE])
def test_flipped_bit_is_found_by_name(work, capsys, name):
    flip(work / "a" / name)
    before = everything(work / "a")
    commands = (
        ("train", "--resume", work / "a", "--steps", 8),
        ("info", work / "a", "--verify"),
        ("convert", work / "a", work / "b"),
    )
    for command in commands:
        assert f"{name}: is damaged" in (said := fails(capsys, *command))
        if command[0] == "train":
            assert "checkpoints/step-00000004 is good" in said
    assert everything(work / "a") == before and not (work / "b").exists()


def test_folder_of_another_tool_has_nothing_to_verify(work, capsys):
    for path in (work / "a" / MANIFEST, *work.glob(f"a/checkpoints/*/{MANIFEST}")):
        path.unlink()
    assert sessa("info", work / "a", "--verify") == 0
    assert "not verified" in capsys.readouterr().out


@pytest.mark.parametrize("line", [b'{"step": 4, "lo', b"\0" * 40 + b"\n", b"\xff\n", b"[]\n"])
def test_damaged_line_of_the_metrics_does_not_stop_a_run(work, capsys, line):
    path = work / "a" / METRICS
    path.write_bytes(path.read_bytes() + line)
    assert sessa("train", "--resume", work / "a", "--steps", 6, "--backend", "torch") == 0
    assert "dropped 1 damaged line" in capsys.readouterr().out
    assert [r["step"] for r in read_metrics(work / "a") if "loss" in r] == [1, 2, 3, 4, 5, 6]


def test_weights_that_are_not_finite_never_replace_a_good_save(work, capsys, monkeypatch):
    step = Trainer._train_step

    def spoil(self):
        step(self)
        if self.step == 6:
            next(iter(self.backend.parameters.values())).data[0] = np.inf

    monkeypatch.setattr(Trainer, "_train_step", spoil)
    before = weights(work / "a")
    assert sessa("train", "--resume", work / "a", "--steps", 8, "--backend", "torch") == 3
    assert "the save of step 4" in capsys.readouterr().err
    assert weights(work / "a") == before and read_state_metadata(work / "a")[0] == 4


def test_state_that_is_not_finite_is_not_resumed(work, capsys):
    state = read_safetensors(work / "a" / STATE)
    name = sorted(state)[0]
    state[name] = np.full_like(state[name], np.nan)
    step, fingerprint = read_state_metadata(work / "a")
    about = json.dumps({"step": step, "fingerprint": fingerprint})
    write_safetensors(work / "a" / STATE, state, {"training": about})
    (work / "a" / MANIFEST).unlink()
    said = fails(capsys, "train", "--resume", work / "a", "--steps", 8, "--backend", "torch")
    assert f"{name} holds NaN" in said


# Folders that are not ours.


@pytest.mark.parametrize(
    "command",
    [
        "export {w}/a {w} --force",
        "convert {w}/a {w} --force",
        "convert {w}/a/model.safetensors {w}/a --force",
        "train --data {w}/d.txt --out {w} --force",
        "data simplestories --data {w}/d.txt --out {w} --force",
        "export {w}/a {w} --data {w}/d.txt --force",
        "train --data {w}/*.txt --out {w} --force",
        "train --data {w} --out {w} --force",
        "train --init {w}/a --out {w} --force",
        "train --init {w}/a --out {w}/a --force",
        "export {w}/a {w}/a/checkpoints/step-00000002 --force",
    ],
)
def test_folder_that_holds_an_input_is_never_replaced(work, capsys, command):
    (work / MANIFEST).write_text("{}")  # As if this program had written it.
    before = everything(work)
    assert "choose another" in fails(capsys, *command.format(w=work).split())
    assert everything(work) == before


@pytest.mark.parametrize(
    "command", ["train --data {w}/d.txt --out {o}", "export {w}/a {o}", "convert {w}/a {o}"]
)
def test_folder_of_somebody_else_is_never_replaced(work, capsys, tmp_path, command):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    given = command.format(w=work, o=tmp_path / "other").split()
    assert "did not write it" in fails(capsys, *given, "--force")
    assert (tmp_path / "other" / "thesis.txt").exists()


def test_a_run_folder_has_one_writer(work, capsys):
    before = everything(work / "a")
    with lock_folder(work / "a"):
        resume = ("--resume", work / "a", "--steps", 8)
        start = ("--data", work / "d.txt", *TINY, "--out", work / "a", "--force")
        for command in (resume, start):
            assert "another sessa command" in fails(capsys, "train", *command)
    assert everything(work / "a") == before


def test_a_run_holds_its_lock_while_it_trains(work, monkeypatch):
    taken = []

    def look(self):
        taken.append(any(path.name == ".sessa.lock" for path in self.folder.iterdir()))
        with pytest.raises(Exception, match="another sessa command"), lock_folder(self.folder):
            pass

    monkeypatch.setattr(Trainer, "_evaluate", look)
    assert sessa("train", "--data", work / "d.txt", *TINY, "--steps", 4, "--out", work / "b") == 0
    assert sessa("train", "--resume", work / "b", "--steps", 6, "--backend", "torch") == 0
    assert taken == [True] * 3


def test_a_run_inside_its_data_is_resumed(work, monkeypatch):
    monkeypatch.chdir(work)
    assert sessa("train", "--data", ".", *TINY, "--steps", 2, "--out", "run") == 0
    assert sessa("train", "--resume", "run", "--steps", 4, "--backend", "torch") == 0


@pytest.mark.parametrize("command", ["convert", "export"])
@pytest.mark.parametrize("inside", ["generation_config.json", "tokenizer_config.json"])
def test_link_out_of_a_folder_is_not_copied(work, capsys, tmp_path, command, inside):
    (tmp_path / "secret").write_text("{}")
    (work / "a" / inside).unlink()
    (work / "a" / inside).symlink_to(tmp_path / "secret")
    assert "is a link out of its folder" in fails(capsys, command, work / "a", work / "out")
    assert not (work / "out").exists()


def test_folder_in_the_cache_of_the_hub_is_read(work):
    snapshot = work / "models--a" / "snapshots" / "0"
    blobs = work / "models--a" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (work / "a" / name).rename(blobs / name)
        (snapshot / name).symlink_to(blobs / name)
    assert sessa("convert", snapshot, work / "out") == 0
    assert (work / "out" / "tokenizer.json").is_file()


def test_conversion_in_place_keeps_the_run(work):
    before = weights(work / "a")
    assert sessa("convert", work / "a", work / "a", "--force", "--shard-size", "2KB") == 0
    assert weights(work / "a") == before and STATE in read_manifest(work / "a").files
    assert sorted(manifest.step for manifest in list_saves(work / "a").values()) == [2, 4]
    assert sessa("train", "--resume", work / "a", "--steps", 6, "--backend", "torch") == 0
