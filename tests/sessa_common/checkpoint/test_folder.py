"""The checkpoint folder: written whole or not at all, read back bit for bit, damage named."""

from __future__ import annotations

import json
import sys

import ml_dtypes
import numpy as np
import pytest

from sessa_common.checkpoint import folder as module
from sessa_common.checkpoint.folder import (
    INDEX,
    NUMPY_DTYPES,
    load_config,
    load_weights,
    read_tensors,
    save_weights,
    write_safetensors,
    write_weights,
)
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.checkpoint.manifest import verify
from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError
from sessa_common.storage import MANIFEST, write_json

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


def test_bfloat16_is_stored_as_such(tmp_path):
    save_weights(tmp_path, CONFIG, weights_in("bfloat16"), framework="mlx")
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header.pop("__metadata__") == {"format": "mlx"}
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert load_weights(tmp_path)[1]["model.norm.bias"].dtype == ml_dtypes.bfloat16


def test_stray_file_beside_the_model_is_not_read(tmp_path):
    save_weights(tmp_path, CONFIG, weights_in("float32"))
    other = {name: value + 1 for name, value in weights_in("float32").items()}
    write_safetensors(tmp_path / "model-zzz.safetensors", other)
    assert_same(load_weights(tmp_path)[1], weights_in("float32"))
    (tmp_path / MANIFEST).unlink()  # As another tool leaves a folder.
    assert_same(load_weights(tmp_path)[1], weights_in("float32"))


@pytest.mark.parametrize(("first", "second"), [(1500, 10**9), (10**9, 1500), (3000, 1500)])
def test_older_save_does_not_outlive_a_newer_one(tmp_path, first, second):
    save_weights(tmp_path, CONFIG, weights_in("float32"), shard_size=first)
    weights = {name: value + 1 for name, value in weights_in("float32").items()}
    save_weights(tmp_path, CONFIG, weights, shard_size=second)
    assert_same(load_weights(tmp_path)[1], weights)
    (tmp_path / MANIFEST).unlink()
    assert_same(load_weights(tmp_path)[1], weights)
    there = {path.name for path in tmp_path.glob("model*.safetensors")}
    index = tmp_path / INDEX
    named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else None
    assert there == (named or {"model.safetensors"})


def test_split_and_names_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=3, n_head=2, n_embd=16, vocab_size=50, n_positions=9)
    model = transformers.GPT2Model(config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=5000)
    (tmp_path / "ours").mkdir()
    with torch.no_grad():
        weights = {name: value.numpy() for name, value in model.state_dict().items()}
    write_weights(tmp_path / "ours", weights, shard_size=5000, framework="pt")
    ours, theirs = (json.loads((tmp_path / f / INDEX).read_text()) for f in ("ours", "theirs"))
    assert ours["weight_map"] == theirs["weight_map"] and len(set(ours["weight_map"].values())) > 3
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert_same(read_tensors(tmp_path / "theirs"), weights)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("model.safetensors", INDEX), "are two models"),
        (
            ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"),
            "not the shards",
        ),
        (("model-a.safetensors", "model-b.safetensors"), "not the shards"),
        (
            ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
            "also in another",
        ),
    ],
    ids=["single-and-index", "gap", "names", "twice"],
)
def test_folder_of_another_tool_must_say_which_file_is_the_model(tmp_path, files, message):
    write_json(tmp_path / "config.json", CONFIG.to_dict())
    for name in files:
        file = name
        if name == INDEX:
            file = "model-1.safetensors"
            write_json(tmp_path / name, {"weight_map": {"a": file}})
        write_safetensors(tmp_path / file, weights_in("float32"))
    with pytest.raises(SessaError, match=message):
        load_weights(tmp_path)


def test_whole_set_of_shards_without_an_index_is_read(tmp_path):
    save_weights(tmp_path, CONFIG, weights_in("float32"), shard_size=3000)
    (tmp_path / MANIFEST).unlink()
    (tmp_path / INDEX).unlink()
    assert_same(load_weights(tmp_path)[1], weights_in("float32"))


@pytest.mark.parametrize(
    "weight_map", [[], {}, {"a": "../model.safetensors"}, {"a": "/m"}, {"a": 1}]
)
def test_index_must_name_files_of_its_folder(tmp_path, weight_map):
    write_json(tmp_path / "config.json", CONFIG.to_dict())
    write_json(tmp_path / INDEX, {"weight_map": weight_map})
    with pytest.raises(SessaError, match=INDEX):
        load_weights(tmp_path)


def test_flipped_bit_is_found_by_its_hash(tmp_path):
    save_weights(tmp_path, CONFIG, weights_in("float32"), shard_size=3000)
    assert verify(tmp_path) == len(list(tmp_path.glob("model[-.]*")))
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    load_weights(tmp_path)
    with pytest.raises(SessaError, match=f"{shard.name}: is damaged"):
        verify(tmp_path)
    (tmp_path / MANIFEST).unlink()
    assert verify(tmp_path) is None


@pytest.mark.parametrize(
    "change",
    [
        {"format": 9},
        {"files": {"../a": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"a": {}}},
        {"files": []},
        {"folder": "../.."},
        {"other": 1},
    ],
    ids=["format", "path", "facts", "list", "folder", "key"],
)
def test_bad_manifest_is_named(folder, change):
    values = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**values, **change}))
    with pytest.raises(SessaError, match=MANIFEST):
        load_weights(folder)


def test_files_that_a_save_replaces_while_they_are_read_are_read_again(folder, monkeypatch):
    weights = {name: value + 1 for name, value in weights_in("float32").items()}
    reading = module.read_safetensors

    def slow(path):
        found = reading(path)
        monkeypatch.setattr(module, "read_safetensors", reading)
        save_weights(folder, CONFIG, weights)
        return found

    monkeypatch.setattr(module, "read_safetensors", slow)
    assert_same(load_weights(folder)[1], weights)


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("configuration_sessa.py", "sessa_torch.hf_config", "transformers"),
        ("modeling_sessa.py", "sessa_torch.hf", "transformers"),
        ("mlx_lm_model.py", "sessa_mlx.lm", "mlx-lm"),
    ],
)
def test_a_folder_names_code_that_names_the_extra(tmp_path, monkeypatch, name, module, extra):
    save_weights(tmp_path, CONFIG, weights_in("float32"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert name.removesuffix(".py") in json.dumps([config["auto_map"], config["model_file"]])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'sessa-toolchain\[{extra}\]'"):
        exec((tmp_path / name).read_text(), {})


def test_code_files_of_other_tools_are_no_longer_named(tmp_path):
    other = {"model_file": "other.py", "auto_map": {"AutoModel": "other.Model"}}
    save_weights(tmp_path, CONFIG, weights_in("float32"), extra_config=other)
    assert "other" not in (tmp_path / "config.json").read_text()
