"""A model that is trained in bfloat16 is stored in bfloat16; its training state is float32."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from support.golden_cases import relative_error

from sessa_common import convert
from sessa_common.checkpoint.folder import load_config, read_safetensors, read_tensors
from sessa_common.checkpoint.saves import list_saves, verify_saves
from sessa_common.checkpoint.stored_types import is_exact
from sessa_export.exporter import export_checkpoint

TINY = {
    "num_hidden_layers": 2,
    "layer_kinds": ("sessa", "mamba2"),
    "hidden_size": 16,
    "num_attention_heads": 2,
    "mamba_d_head": 8,
    "max_position_embeddings": 32,
    "tokenizer": "bytes",
    "steps": 4,
    "checkpoint_every": 2,
    "evaluate_every": 2,
    "batch_size": 2,
    "warmup_steps": 1,
    "precision": "bfloat16",
}
TWINS = ("torch", "mlx")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    return path


def module(twin: str, name: str):
    return importlib.import_module(f"sessa_{twin}.{name}")


def train(twin: str, *arguments, **options):
    module(twin, "training").train(*arguments, device="cpu", **options)


@pytest.fixture(scope="module", params=TWINS)
def run(request, text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / request.param
    train(request.param, folder, data=str(text), **TINY)
    return folder


def test_every_save_is_in_bfloat16_and_the_state_in_float32(run):
    assert verify_saves(run)
    for folder in (run, *list_saves(run)):
        assert load_config(folder).dtype == "bfloat16"
        weights = read_tensors(folder)
        state = read_safetensors(folder / "training_state.safetensors")
        for name, value in weights.items():
            master = state[f"weights.{name}"]
            assert master.dtype == np.float32
            assert value.dtype == (np.float32 if is_exact(name) else ml_dtypes.bfloat16), name
            np.testing.assert_array_equal(value, master.astype(value.dtype), name)
    assert json.loads((run / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_both_frameworks_load_it_and_keep_gains_in_float32(run):
    ids, logits = np.arange(24)[None], []
    for twin in TWINS:
        model = module(twin, "checkpoint").load_model(run, device="cpu")
        weights = module(twin, "checkpoint").model_weights(model)
        for name, value in read_tensors(run).items():
            assert weights[name].dtype == value.dtype, name
            np.testing.assert_array_equal(weights[name], value, name)
        logits.append(module(twin, "decoding").Decoder(model).logits(ids).astype(np.float32))
    assert relative_error(*logits) < 0.05


def test_another_dtype_can_be_asked_for(run):
    ids, logits = np.arange(24)[None], []
    for twin in TWINS:
        decoder = module(twin, "decoding").load_decoder(run, dtype="float32", device="cpu")
        logits.append(decoder.logits(ids))
    assert relative_error(*logits) < 1e-5


def test_a_resumed_run_goes_on_bit_for_bit(run, text, tmp_path):
    twin = run.name
    train(twin, tmp_path / "half", data=str(text), **{**TINY, "steps": 2, "min_lr_ratio": 1.0})
    train(twin, resume=tmp_path / "half", steps=4)
    train(twin, tmp_path / "whole", data=str(text), **{**TINY, "min_lr_ratio": 1.0})
    halves, whole = (
        read_safetensors(tmp_path / name / "training_state.safetensors")
        for name in ("half", "whole")
    )
    for name, value in whole.items():
        np.testing.assert_array_equal(halves[name], value, name)
    assert load_config(tmp_path / "half").dtype == "bfloat16"


def test_it_is_converted_and_exported(text, run, tmp_path):
    report = convert(run, tmp_path / "copy")
    assert report.exact and load_config(tmp_path / "copy").dtype == "bfloat16"
    config = {k: v for k, v in TINY.items() if not k.startswith("mamba")}
    folder = tmp_path / "rows"
    train(run.name, folder, data=str(text), **{**config, "layer_kinds": "sessa"})
    export_checkpoint(folder, tmp_path / "exported")
