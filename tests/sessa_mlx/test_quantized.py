"""Quantised folders in MLX: weights stay packed in memory and give the tokens of dense ones."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.export_models import small_config, write_checkpoint
from support.golden_cases import relative_error

from sessa_common.checkpoint.conversion import convert
from sessa_common.checkpoint.folder import load_weights
from sessa_common.errors import SessaError
from sessa_common.inference.sampling import SamplingConfig
from sessa_mlx.checkpoint import build_model, load_model, model_weights
from sessa_mlx.decoding import Decoder

KINDS = ("mamba2", "transformer", "sessa")


@pytest.fixture(scope="module", params=[4, 8])
def folder(request, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("quantized")
    config = small_config(
        "untied", hidden_size=64, layer_kinds=KINDS, num_hidden_layers=3, mamba_d_head=16
    )
    write_checkpoint(root / "dense", config)
    convert(root / "dense", root / "packed", bits=request.param, group_size=32)
    return root / "packed"


def stored_bytes(model) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def test_weights_stay_packed(folder):
    config, dense = load_weights(folder)
    packed = stored_bytes(load_model(folder))
    assert packed < 0.45 * stored_bytes(build_model(config, dense))
    files = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    assert abs(packed - files) < 20_000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_packed_model_decodes_like_its_dense_one(folder, dtype):
    config, dense = load_weights(folder)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 40))
    limit = 1e-4 if dtype == "float32" else 5e-2
    logits, tokens = [], []
    for model in (load_model(folder, dtype=dtype), build_model(config, dense, dtype=dtype)):
        decoder = Decoder(model)
        pieces = [decoder.logits(ids[:, :30])] + [
            decoder.logits(ids[:, t : t + 1]) for t in (30, 31)
        ]
        logits.append(np.concatenate(pieces, 1))
        decoder.reset()
        decoder.feed(ids)
        drawn = decoder.draw(SamplingConfig(temperature=0.9, seed=3), 50)
        tokens.append(np.stack(list(drawn), 1).tolist())
    assert relative_error(*logits) <= limit
    if dtype == "float32":
        assert tokens[0] == tokens[1]


def test_a_packed_model_gives_the_numbers_that_its_weights_stand_for(folder):
    _, dense = load_weights(folder)
    found = model_weights(load_model(folder))
    assert found.keys() == dense.keys()
    for name, value in dense.items():
        np.testing.assert_array_equal(found[name], value.astype(found[name].dtype), name)


def test_float64_has_no_packed_product_and_is_expanded(folder):
    model = load_model(folder, dtype="float64")
    assert mx.uint32 not in {array.dtype for _, array in tree_flatten(model.parameters())}


def test_a_packed_folder_with_a_missing_part_is_refused(folder, tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mixer.q_proj.biases"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(SessaError, match="q_proj is quantised in mode"):
        load_model(tmp_path)
