"""`sessa convert --for`: folders made ready for the programs of others."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.export_models import small_config, write_checkpoint
from support.in_process import fails, sessa

from sessa_common.checkpoint.clients import convert_for
from sessa_common.checkpoint.conversion import convert
from sessa_common.checkpoint.folder import load_weights, read_tensors
from sessa_common.checkpoint.remote_code import CODE_FILES, CODE_KEYS, has_code_files
from sessa_common.errors import SessaError

CONVOLUTION = "model.layers.0.mixer.conv1d.weight"


@pytest.fixture
def old(tmp_path):
    """A folder in MLX's layout, as it was before there were files for other clients."""
    folder, _ = write_checkpoint(tmp_path / "plain", small_config("mamba2"))
    convert(folder, tmp_path / "old", framework="mlx")
    return without_code_files(tmp_path / "old")


def without_code_files(folder):
    config = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in CODE_KEYS}
    (folder / "config.json").write_text(json.dumps(kept))
    for name in CODE_FILES:
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("copied", [False, True], ids=["in place", "copied"])
def test_a_folder_gets_the_file_and_the_layout(old, copied, tmp_path, capsys):
    before = {name: value.tobytes() for name, value in load_weights(old)[1].items()}
    target = tmp_path / "new" if copied else old
    assert sessa("convert", old, *[target] * copied, "--for", "transformers") == 0
    assert "bit-exact" in capsys.readouterr().out
    assert has_code_files(target)
    assert read_tensors(target)[CONVOLUTION].shape[1] == 1
    assert before == {name: value.tobytes() for name, value in load_weights(target)[1].items()}
    assert has_code_files(old) != copied
    assert (target / "tokenizer.json").is_file()


@pytest.mark.parametrize("client", ["transformers", "mlx-lm"])
def test_weights_that_fit_are_not_written_again(client, tmp_path, capsys):
    folder, _ = write_checkpoint(tmp_path / "m", small_config("hybrid"))
    before = (without_code_files(folder) / "model.safetensors").stat()
    assert sessa("convert", folder, "--for", client) == 0
    said = capsys.readouterr().out
    assert "wrote the code files" in said and "no weight was written" in said
    after = (folder / "model.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert has_code_files(folder)


def test_a_folder_that_is_ready_is_left_alone(tmp_path, capsys):
    folder, _ = write_checkpoint(tmp_path / "m", small_config("hybrid"))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    assert sessa("convert", folder, "--for", "transformers") == 0
    assert "is ready for transformers already" in capsys.readouterr().out
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    assert before == after


def test_what_would_change_the_model_needs_a_new_folder(old, tmp_path, capsys):
    said = fails(capsys, "convert", old, "--for", "transformers", "--dtype", "bfloat16")
    assert "--dtype changes the model; name a new folder" in said
    assert "cannot read weights that are quantised for MLX" in fails(
        capsys, "convert", old, tmp_path / "x", "--for", "transformers", "--quantize", 4
    )
    assert "expected one of transformers" in fails(capsys, "convert", old, "--for", "llama.cpp")
    assert "target is missing" in fails(capsys, "convert", old)
    assert not has_code_files(old)


def test_a_quantised_folder_is_ready_for_mlx_lm_only(tmp_path):
    folder, _ = write_checkpoint(tmp_path / "m", small_config("heads", hidden_size=64))
    convert(folder, tmp_path / "packed", bits=4, group_size=32)
    packed = (tmp_path / "packed" / "model.safetensors").read_bytes()
    convert_for("mlx-lm", without_code_files(tmp_path / "packed"))
    assert has_code_files(tmp_path / "packed")
    assert (tmp_path / "packed" / "model.safetensors").read_bytes() == packed
    with pytest.raises(SessaError, match="is quantised for MLX; give a new folder"):
        convert_for("transformers", tmp_path / "packed")
    convert_for("transformers", tmp_path / "packed", tmp_path / "full")
    assert all(value.dtype == np.float32 for value in read_tensors(tmp_path / "full").values())
