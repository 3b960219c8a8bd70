"""The kinds of layers and the old spelling of a model in config.json."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from support.export_models import small_config, write_checkpoint
from support.golden_cases import relative_error
from support.in_process import sessa

from sessa_common.checkpoint.conversion import convert
from sessa_common.checkpoint.folder import load_config, load_weights, read_safetensors
from sessa_common.checkpoint.sources import read_source
from sessa_common.config import SessaConfig, parameter_shapes
from sessa_common.errors import SessaError
from sessa_common.layer_kinds import KINDS, OLD_KEYS, infer_kind
from sessa_common.reference.model import model_logits

# One folder of each spelling, written before `layer_kinds`, with PyTorch's logits of some ids.
OLD = Path(__file__).parents[1] / "fixtures" / "old_configs"
PRESENT = {
    "sessa": "sessa",
    "sessa_without_feedback": "gated_attention",
    "attention_mlp": "transformer",
    "attention_gated": "gated_attention",
    "mamba2": "mamba2",
    "hybrid": ("sessa", "transformer", "mamba2"),
}
old_folders = pytest.mark.parametrize("name", PRESENT)


def expected(name: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(OLD / name / "expected.npz") as file:
        return file["ids"], file["logits"]


def test_every_old_folder_is_tested() -> None:
    assert {path.name for path in OLD.iterdir()} == set(PRESENT)


@old_folders
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_old_folders_give_the_same_logits(name: str, backend: str) -> None:
    config, weights = load_weights(OLD / name)
    assert config.layer_kinds == PRESENT[name]
    ids, logits = expected(name)
    decoder = pytest.importorskip(f"sessa_{backend}.decoding").load_decoder(OLD / name)
    assert relative_error(decoder.logits(ids), logits) <= 1e-5
    assert relative_error(model_logits(config, weights, ids), logits) <= 1e-5


@old_folders
def test_convert_writes_the_new_spelling(name: str, tmp_path: Path) -> None:
    report = convert(read_source(OLD / name), tmp_path / "new")
    assert report.exact
    settings = json.loads((tmp_path / "new" / "config.json").read_text())
    kinds = PRESENT[name]
    assert settings["layer_kinds"] == (kinds if isinstance(kinds, str) else list(kinds))
    assert not OLD_KEYS.keys() & settings.keys()
    assert load_config(tmp_path / "new") == load_config(OLD / name)
    before, after = (
        read_safetensors(folder / "model.safetensors") for folder in (OLD / name, tmp_path / "new")
    )
    assert before.keys() == after.keys()
    assert all(before[tensor].tobytes() == after[tensor].tobytes() for tensor in before)


def test_training_from_an_old_folder_writes_the_new_spelling(tmp_path: Path) -> None:
    old, _ = write_checkpoint(tmp_path / "old", small_config("attention_gated"))
    settings = json.loads((old / "config.json").read_text())
    del settings["layer_kinds"]
    (old / "config.json").write_text(json.dumps({**settings, "mixer": "sessa", "feedback": False}))
    text, out = tmp_path / "text.txt", tmp_path / "new"
    text.write_text("The rain fell in torrents. " * 40)
    options = ("--steps", 1, "--sequence-length", 16, "--batch-size", 1, "--backend", "torch")
    assert sessa("train", "--init", old, "--data", text, "--out", out, *options) == 0
    settings = json.loads((out / "config.json").read_text())
    assert settings["layer_kinds"] == "gated_attention"
    assert not OLD_KEYS.keys() & settings.keys()


@old_folders
def test_a_weight_file_beside_an_old_config_is_read(name: str, tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        shutil.copy(OLD / name / file, tmp_path / file)
    found = read_source(tmp_path / "model.safetensors", given={"layer_kinds": PRESENT[name]})
    assert found.config == load_config(OLD / name)
    with pytest.raises(SessaError, match=r"layer_kinds is .* in the weights, given"):
        read_source(tmp_path / "model.safetensors", given={"layer_kinds": "sessa_transformer"})


@pytest.mark.parametrize(
    ("old", "kinds"),
    [
        ({"mixer": ["sessa", "attention"], "feedback": False}, ("gated_attention", "transformer")),
        (
            {"mixer": ["attention", "mamba2"], "attention_block": "gated"},
            ("gated_attention", "mamba2"),
        ),
        (
            {"mixer": ["sessa", "attention"], "attention_block": "gated"},
            ("sessa", "gated_attention"),
        ),
        ({"feedback": False, "attention_block": "mlp"}, "gated_attention"),
    ],
)
def test_old_keys_are_translated_layer_by_layer(old: dict, kinds: object) -> None:
    assert SessaConfig.from_dict({**old, "num_hidden_layers": 2}).layer_kinds == kinds


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mixer": "rwkv"}, "mixer is 'rwkv', expected one of sessa, attention, mamba2"),
        ({"mixer": 3}, "mixer is 3"),
        ({"mixer": [["sessa"]]}, r"mixer is \['sessa'\]"),
        ({"feedback": "no"}, "feedback is 'no', expected true or false"),
        ({"attention_block": "wide"}, "attention_block is 'wide'"),
        ({"mixer": "sessa", "layer_kinds": "sessa"}, "mixer is the old spelling of layer_kinds"),
        ({"layer_kinds": "attention"}, "layer_kinds has 'attention', expected of sessa, "),
        ({"layer_kinds": ["sessa"]}, "layer_kinds has 1 names for 4 layers"),
        ({"layer_kinds": [["sessa"]] * 4}, r"layer_kinds has \['sessa'\]"),
        ({"layer_kinds": None}, "wrong type"),
    ],
)
def test_what_names_no_model_is_refused(given: dict, message: str) -> None:
    with pytest.raises(SessaError, match=f"config.json: .*{message}"):
        SessaConfig.from_dict(given, "config.json")


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_told_by_the_tensors(kind: str, heads: int) -> None:
    config = SessaConfig(num_attention_heads=heads, layer_kinds=kind)
    assert infer_kind(KINDS[kind].shapes(config)) is KINDS[kind]
    assert {infer_kind(_layer(config, i)).name for i in range(4)} == {kind}


def _layer(config: SessaConfig, i: int) -> set[str]:
    prefix = f"model.layers.{i}."
    return {n.removeprefix(prefix) for n in parameter_shapes(config) if n.startswith(prefix)}


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_architectures_names_a_class_that_exists(backend: str) -> None:
    (name,) = SessaConfig().to_dict()["architectures"]
    assert isinstance(getattr(import_module(f"sessa_{backend}.model"), name), type)


@pytest.mark.parametrize("variant", ["heads", "hybrid", "mamba2_hybrid"])
def test_transformers_loads_the_tokenizer_of_a_folder(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers refuses some keys of config.json, even when it loads a tokenizer only."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizers = pytest.importorskip("transformers")
    write_checkpoint(tmp_path, small_config(variant))
    tokenizer = tokenizers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("solve")["input_ids"]) == "solve"
