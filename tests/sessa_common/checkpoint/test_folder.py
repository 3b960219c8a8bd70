"""The checkpoint folder: written whole or not at all, read back bit for bit, damage named."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from sessa_common.checkpoint.folder import (
    INDEX,
    NUMPY_DTYPES,
    load_config,
    load_weights,
    new_folder,
    save_weights,
    write_json,
)
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError

CONFIG = SessaConfig(
    vocab_size=19, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, eos_token_id=4
)


def weights_in(dtype: str) -> dict[str, np.ndarray]:
    return {n: w.astype(NUMPY_DTYPES[dtype]) for n, w in initial_weights(CONFIG, 1).items()}


def assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape, name
        assert got[name].tobytes() == value.tobytes(), name


@pytest.fixture
def folder(tmp_path):
    save_weights(tmp_path, CONFIG, weights_in("float32"))
    return tmp_path


@pytest.mark.parametrize("shard_size", [10**9, 2000, 1], ids=["one", "some", "each"])
@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_round_trip_is_bit_exact(tmp_path, dtype, shard_size):
    weights = weights_in(dtype)
    save_weights(tmp_path, CONFIG, weights, shard_size=shard_size)
    config, got = load_weights(tmp_path)
    assert config == CONFIG
    assert_same(got, weights)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == {10**9: 1, 1: len(weights)}.get(shard_size, len(files))
    assert (tmp_path / INDEX).exists() == (len(files) > 1)
    # Whoever may read one file of the folder may read all.
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


def test_index_is_the_ecosystems(tmp_path):
    weights = weights_in("bfloat16")
    save_weights(tmp_path, CONFIG, weights, shard_size=1500)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights.values())
    assert index["weight_map"].keys() == weights.keys()
    names = sorted(set(index["weight_map"].values()))
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors" and len(names) > 1


def test_stale_file_beside_an_index_is_not_read(tmp_path):
    weights = weights_in("float32")
    save_weights(tmp_path, CONFIG, weights, shard_size=1500)
    (tmp_path / "model-old.safetensors").write_bytes(b"not this one")
    assert_same(load_weights(tmp_path)[1], weights)


def test_missing_shard_is_named(tmp_path):
    save_weights(tmp_path, CONFIG, weights_in("float32"), shard_size=1500)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(SessaError, match=shard.name):
        load_weights(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "length", "header", "last-byte"])
def test_truncated_file_is_named(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(SessaError, match=r"model\.safetensors: not a readable"):
        load_weights(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.bias": None}, "tensor model.norm.bias is missing (1 in all)"),
        ({"extra": np.zeros(3, np.float32)}, "tensor extra is not part of this model"),
        ({"model.norm.bias": np.zeros(13, np.float32)}, "has shape (13,), expected (12,)"),
        ({"model.norm.bias": np.zeros(12, np.int32)}, "is int32, expected a floating type"),
    ],
    ids=["missing", "extra", "shape", "type"],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    weights = {k: v for k, v in {**weights_in("float32"), **change}.items() if v is not None}
    save_weights(tmp_path, CONFIG, weights)
    with pytest.raises(SessaError) as error:
        load_weights(tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 3}, "unknown key n_layers"),
        ({"num_attention_heads": 5}, "num_attention_heads 5 does not divide hidden_size 12"),
        ({"num_key_value_heads": 2}, "num_key_value_heads 2 does not divide"),
        ({"num_attention_heads": 4, "head_dim": 3}, "head_dim 3 is odd"),
        ({"vocab_size": "19"}, "vocab_size is '19'"),
        ({"gamma_max": 1.0}, "gamma_max is 1.0"),
        ({"gamma_max": "0.9"}, "gamma_max is '0.9', expected a number"),
        ({"use_forward_rope": "false"}, "use_forward_rope is 'false', expected true or false"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"eos_token_id": 19}, "eos_token_id is 19"),
    ],
)
def test_bad_configuration_is_named(folder, change, message):
    path = folder / "config.json"
    settings = {**json.loads(path.read_text()), **change}
    if "num_attention_heads" in change:
        settings = {**settings, "num_key_value_heads": 0, "head_dim": 0, **change}
    write_json(path, settings)
    with pytest.raises(SessaError) as error:
        load_config(folder)
    assert message in str(error.value) and "config.json" in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[1]"], ids=["empty", "cut", "list"])
def test_unreadable_configuration_is_named(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(SessaError, match=r"config\.json"):
        load_weights(folder)


def test_absent_folder_and_absent_weights_are_named(tmp_path):
    with pytest.raises(SessaError, match="no such checkpoint folder"):
        load_weights(tmp_path / "nowhere")
    write_json(tmp_path / "config.json", CONFIG.to_dict())
    with pytest.raises(SessaError, match=r"no model\*\.safetensors"):
        load_weights(tmp_path)


def test_keys_of_other_tools_do_not_disturb(folder):
    path = folder / "config.json"
    other = {"model_file": "sessa_mlx.py", "auto_map": {}, "transformers_version": "5"}
    write_json(path, {**json.loads(path.read_text()), **other})
    assert load_config(folder) == CONFIG


def test_older_name_of_the_dtype_is_read(folder):
    path = folder / "config.json"
    settings = {**json.loads(path.read_text()), "torch_dtype": "bfloat16"}
    del settings["dtype"]
    write_json(path, settings)
    assert load_config(folder).dtype == "bfloat16"


def test_new_folder_appears_only_when_all_went_well(tmp_path):
    target = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError), new_folder(target) as scratch:
        (scratch / "half").write_text("x")
        raise RuntimeError
    assert not target.exists() and list(target.parent.iterdir()) == []
    with new_folder(target) as scratch:
        (scratch / "whole").write_text("x")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["whole"]


def test_folder_that_is_not_empty_needs_force(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("x")
    with pytest.raises(SessaError, match="not empty"), new_folder(target):
        pass
    with pytest.raises(RuntimeError), new_folder(target, force=True):
        raise RuntimeError
    assert (target / "old").exists()
    with new_folder(target, force=True) as scratch:
        (scratch / "new").write_text("x")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(SessaError, match="not a folder"), new_folder(tmp_path / "out", force=True):
        pass


def test_bfloat16_is_stored_as_such(tmp_path):
    save_weights(tmp_path, CONFIG, weights_in("bfloat16"), framework="mlx")
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header.pop("__metadata__") == {"format": "mlx"}
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert load_weights(tmp_path)[1]["model.norm.bias"].dtype == ml_dtypes.bfloat16


def test_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(SessaError, match="cannot be created"),
        new_folder(tmp_path / "file" / "out"),
    ):
        pass
