"""Adapters on disk: both files hold one adapter, merging is W + scale B A, bad ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.adapters import CONFIG, write_random_adapter

from sessa_common.checkpoint.adapters import lora_shapes, merge_adapter, read_adapter
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.errors import SessaError
from sessa_common.train_config import TrainConfig
from sessa_common.training.trained_parameters import trained_shapes

WEIGHTS = initial_weights(CONFIG, 1)


def change(folder: Path, **keys: Any) -> None:
    """Change keys of an adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}), encoding="utf-8")


@pytest.mark.parametrize("train", ["lora", "feedback", "feedback+lora"])
def test_both_files_hold_the_same_adapter(train: str, tmp_path: Path) -> None:
    folder = write_random_adapter(tmp_path / "a", train)
    ours = read_adapter(folder)
    assert ours.arrays.keys() == trained_shapes(CONFIG, TrainConfig(train=train)).keys()
    (folder / "adapter_model.safetensors").unlink()
    theirs = read_adapter(folder)
    assert theirs.scale == ours.scale == pytest.approx(5 / 3 if "lora" in train else 0)
    for name, value in ours.arrays.items():
        np.testing.assert_array_equal(theirs.arrays[name], value)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_merging_adds_the_product_and_replaces_whole_parameters(dtype: Any, tmp_path: Path) -> None:
    adapter = read_adapter(write_random_adapter(tmp_path / "a"))
    weights = {name: value.astype(dtype) for name, value in WEIGHTS.items()}
    merged = merge_adapter(CONFIG, weights, adapter)
    layer, gain = "model.layers.1.mixer.in_proj", "model.layers.0.mixer.gamma_bias"
    a, b = (adapter.arrays[f"{layer}.lora_{x}.weight"] for x in "AB")
    wanted = weights[f"{layer}.weight"] + adapter.scale * np.einsum("or,ri->oi", b, a)
    np.testing.assert_allclose(merged[f"{layer}.weight"], wanted, rtol=1e-5, atol=1e-6)
    assert merged[gain] == adapter.arrays[gain] and merged[gain].dtype == dtype
    changed = {name for name in merged if merged[name] is not weights[name]}
    assert changed == {
        name if ".lora_" not in name else f"{name.rpartition('.lora_')[0]}.weight"
        for name in adapter.arrays
    }
    assert all(value.dtype == dtype for value in merged.values())


def test_targets_choose_layers_by_the_ends_of_their_names() -> None:
    names = {name.split(".", 3)[3] for name in lora_shapes(CONFIG, 2, ["q_proj", "W_in"])}
    assert names == {f"{layer}.lora_{x}.weight" for layer in ("mixer.q_proj", "W_in") for x in "AB"}
    with pytest.raises(SessaError, match=r"'proj', which is no linear layer .* it has W_in, W_out"):
        lora_shapes(CONFIG, 2, ["proj"])


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"use_dora": True}, "use_dora is True, which is not plain LoRA"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is .* not plain LoRA"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 0}, "r is 0, expected a number above 0"),
    ],
)
def test_adapters_that_are_more_than_lora_are_refused(
    keys: dict[str, Any], says: str, tmp_path: Path
) -> None:
    folder = write_random_adapter(tmp_path / "a", "lora")
    change(folder, **keys)
    with pytest.raises(SessaError, match=f"adapter_config.json: {says}"):
        read_adapter(folder)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    adapter = read_adapter(write_random_adapter(tmp_path / "a", "lora"))
    first = "model.layers.0.W_in"
    del adapter.arrays[f"{first}.lora_B.weight"]
    with pytest.raises(SessaError, match=f"LoRA matrices of {first} do not go together"):
        merge_adapter(CONFIG, WEIGHTS, adapter)
    adapter.arrays[f"{first}.lora_B.weight"] = np.ones((40, 3), np.float32)
    with pytest.raises(SessaError, match=rf"changes {first}.weight by \(40, 24\), .* is for base"):
        merge_adapter(CONFIG, WEIGHTS, adapter)
