"""Adapters of `sessa finetune` in mlx-lm, and adapters of mlx-lm here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.adapters import IDS, write_model, write_random_adapter

import sessa_mlx
from sessa_mlx.evaluation import logits_function

mlx_lm = pytest.importorskip("mlx_lm")
mx = pytest.importorskip("mlx.core")


def their_logits(base: Path, adapter: Path) -> np.ndarray:
    model, _ = mlx_lm.load(
        str(base),
        adapter_path=str(adapter),
        tokenizer_config={"trust_remote_code": True},
        trust_remote_code=True,
    )
    return np.array(model(mx.array(IDS)))


@pytest.mark.parametrize("train", ["lora", "feedback"])
def test_mlx_lm_loads_an_adapter_and_gives_the_same_logits(train: str, tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base"), write_random_adapter(tmp_path / "a", train)
    wanted = logits_function(sessa_mlx.load_model(base, adapter=adapter, device="cpu"))(IDS)
    before = logits_function(sessa_mlx.load_model(base, device="cpu"))(IDS)
    assert np.abs(wanted - before).max() > 0.1
    np.testing.assert_allclose(their_logits(base, adapter), wanted, atol=2e-5)


def test_an_adapter_of_mlx_lm_is_read(tmp_path: Path) -> None:
    """mlx-lm's own folder: its names alone, its keys alone in the config."""
    base, adapter = write_model(tmp_path / "base"), write_random_adapter(tmp_path / "a", "lora")
    (adapter / "adapter_model.safetensors").unlink()
    path = adapter / "adapter_config.json"
    given = json.loads(path.read_text())
    kept = ("fine_tune_type", "num_layers", "lora_parameters")
    path.write_text(json.dumps({"model": str(base), **{key: given[key] for key in kept}}))
    loaded = sessa_mlx.load_model(base, adapter=adapter, device="cpu")
    np.testing.assert_allclose(logits_function(loaded)(IDS), their_logits(base, adapter), atol=2e-5)
