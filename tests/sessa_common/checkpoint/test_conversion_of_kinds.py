"""Conversion of every kind of layer: layout of convolutions, quantisation, names, refusals."""

from __future__ import annotations

import json
import math
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from support.golden_cases import relative_error
from typer.testing import CliRunner

from sessa_cli.main import app
from sessa_common.checkpoint.conversion import convert
from sessa_common.checkpoint.folder import (
    NUMPY_DTYPES,
    load_weights,
    read_safetensors,
    read_tensors,
    save_weights,
)
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.checkpoint.sources import Source, read_source
from sessa_common.config import SessaConfig, parameter_count
from sessa_common.errors import SessaError
from sessa_common.inspection import describe
from sessa_common.presets import PRESETS
from sessa_common.reference import model as reference
from sessa_common.storage import write_json

KINDS: dict[str, dict] = {
    "sessa": {},
    "attention": {"layer_kinds": "transformer", "intermediate_size": 96},
    "gated": {"layer_kinds": "gated_attention"},
    "one_head": {"layer_kinds": "transformer", "num_attention_heads": 1, "num_key_value_heads": 1},
    "mamba2": {"layer_kinds": "mamba2"},
    "hybrid": {"layer_kinds": ("sessa", "mamba2", "transformer"), "num_hidden_layers": 3},
    "hybrid_gated": {"layer_kinds": ("mamba2", "gated_attention", "sessa"), "num_hidden_layers": 3},
    "sessa_transformer": {"layer_kinds": "sessa_transformer", "intermediate_size": 96},
    "hybrid_standard": {"layer_kinds": ("transformer", "sessa_transformer")},
}
CONV = "model.layers.0.mixer.conv1d.weight"
kinds = pytest.mark.parametrize("kind", KINDS)


def config_of(kind: str, **changes: object) -> SessaConfig:
    base = {
        "vocab_size": 37,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 50,
    }
    if "mamba2" in str(KINDS[kind]):
        base |= {"mamba_d_state": 24, "mamba_d_head": 32, "mamba_d_conv": 3}
    return SessaConfig(**{**base, **KINDS[kind], **changes})


def weights_of(config: SessaConfig, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Weights without a constant tensor, so that no swap or loss of one can go unseen."""
    rng = np.random.default_rng(3)
    return {
        name: (value + rng.normal(0, 0.1, value.shape)).astype(NUMPY_DTYPES[dtype])
        for name, value in initial_weights(config, 1).items()
    }


def make_folder(path: Path, config: SessaConfig, dtype: str = "float32") -> dict[str, np.ndarray]:
    path.mkdir()
    weights = weights_of(config, dtype)
    save_weights(path, config, weights)
    return weights


def assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape, name
        assert got[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@kinds
def test_to_mlx_and_back_is_bit_exact(tmp_path, kind, dtype):
    config = config_of(kind)
    weights = make_folder(tmp_path / "one", config, dtype)
    there = convert(read_source(tmp_path / "one"), tmp_path / "two", framework="mlx")
    back = convert(read_source(tmp_path / "two"), tmp_path / "three", shard_size=20_000)
    assert there.exact and back.exact
    for folder in ("two", "three"):
        assert load_weights(tmp_path / folder)[0] == config
        assert_same(load_weights(tmp_path / folder)[1], weights)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_convolution_s_layout_in_the_file(tmp_path, width):
    config = config_of("mamba2", mamba_d_conv=width)
    weights = make_folder(tmp_path / "one", config)
    channels = 2 * 64 + 2 * 24
    shapes = {"mlx": (channels, width, 1), "torch": (channels, 1, width)}
    for framework, shape in shapes.items():
        convert(read_source(tmp_path / "one"), tmp_path / framework, framework=framework)
        stored = read_safetensors(tmp_path / framework / "model.safetensors")[CONV]
        assert stored.shape == shape
        np.testing.assert_array_equal(stored.reshape(channels, width), weights[CONV][:, 0])
        assert describe(tmp_path / framework).parameters["total"] == parameter_count(config)


def test_a_convolution_of_another_shape_is_named(tmp_path):
    config = config_of("mamba2")
    weights = weights_of(config)
    for shape in ((176, 3), (176, 4, 1), (88, 2, 3)):
        wrong = {**weights, CONV: np.zeros(shape, np.float32)}
        folder = tmp_path / "x".join(map(str, shape))
        folder.mkdir()
        save_weights(folder, config, wrong)
        with pytest.raises(SessaError, match=r"conv1d\.weight has shape .*expected \(176, 1, 3\)"):
            load_weights(folder)


@kinds
def test_a_weight_file_alone_tells_its_kinds(tmp_path, kind):
    config = config_of(kind)
    weights = make_folder(tmp_path / "one", config)
    convert(read_source(tmp_path / "one"), tmp_path / "two", framework="mlx")
    for source in ("one", "two"):
        lone = tmp_path / f"{source}.safetensors"
        shutil.copy(tmp_path / source / "model.safetensors", lone)
        told = {"num_attention_heads": config.num_attention_heads, "use_forward_rope": True}
        found = read_source(lone, given={} if kind == "mamba2" else told)
        assert_same(found.weights, weights)
        assert found.config.layer_kinds == config.layer_kinds
        beside = read_source(tmp_path / source / "model.safetensors")
        assert beside.config == config
        ids = np.random.default_rng(0).integers(0, 37, (2, 7))
        np.testing.assert_array_equal(
            reference.model_logits(found.config, found.weights, ids),
            reference.model_logits(config, weights, ids),
        )


@kinds
def test_every_linear_is_quantised_and_nothing_else(tmp_path, kind):
    weights = make_folder(tmp_path / "one", config_of(kind))
    report = convert(
        read_source(tmp_path / "one"), tmp_path / "two", framework="mlx", bits=8, group_size=32
    )
    assert 0 < report.relative_difference < 0.02
    stored = read_safetensors(tmp_path / "two" / "model.safetensors")
    packed = {name for name, value in stored.items() if value.dtype == np.uint32}
    assert {"embed_tokens", "norm"} == {n.split(".")[1] for n in stored} - {"layers"}
    linear = ("_proj.weight", "proj_fb.weight", "W_in.weight", "W_out.weight", "tokens.weight")
    assert packed == {name for name in weights if name.endswith(linear)}
    convert(read_source(tmp_path / "two"), tmp_path / "three")
    assert_same(load_weights(tmp_path / "three")[1], load_weights(tmp_path / "two")[1])


MLP = "model.layers.0.mlp"


def test_a_width_of_the_mlp_that_no_group_divides_stays_as_it_is(tmp_path):
    config = config_of("attention", intermediate_size=80)
    source = Source(config=config, weights=weights_of(config), kind="made")
    report = convert(source, tmp_path / "out", bits=4, group_size=32)
    assert any("do not divide into groups of 32: 2 matrices" in note for note in report.notes)
    stored = read_tensors(tmp_path / "out")
    assert f"{MLP}.up_proj.scales" in stored and f"{MLP}.down_proj.scales" not in stored
    name = f"{MLP}.down_proj.weight"
    np.testing.assert_array_equal(stored[name], source.weights[name])


@kinds
def test_a_cast_reaches_every_tensor(tmp_path, kind):
    make_folder(tmp_path / "one", config_of(kind))
    report = convert(read_source(tmp_path / "one"), tmp_path / "two", dtype="bfloat16")
    config, weights = load_weights(tmp_path / "two")
    assert report.dtype == config.dtype == "bfloat16"
    assert {str(value.dtype) for value in weights.values()} == {"bfloat16"}


@pytest.mark.parametrize("framework", ["torch", "mlx"])
@kinds
def test_frameworks_load_what_is_written_for_mlx(tmp_path, kind, framework):
    make_folder(tmp_path / "one", config_of(kind))
    convert(read_source(tmp_path / "one"), tmp_path / "two", framework="mlx", bits=4, group_size=32)
    ids = np.random.default_rng(0).integers(0, 37, (2, 7))
    want = reference.model_logits(*load_weights(tmp_path / "two"), ids)
    twin = import_module(f"sessa_{framework}.decoding")
    got = twin.load_decoder(tmp_path / "two").logits(ids)
    assert relative_error(got, want) <= 1e-5


@kinds
def test_info_counts_by_part(tmp_path, kind):
    config = config_of(kind)
    make_folder(tmp_path / "one", config)
    found = describe(tmp_path / "one")
    assert found.parameters["total"] == parameter_count(config)
    assert sum(found.parameters.values()) == 2 * parameter_count(config)
    assert "mixer" not in found.parameters
    names = [kind.name for kind in config.kinds]
    parts = {
        "state space": "mamba2" in names,
        "mlp": bool({"transformer", "sessa_transformer"} & set(names)),
        "feedback": bool({"sessa", "sessa_transformer"} & set(names)),
        "attention": set(names) != {"mamba2"},
    }
    for part, there in parts.items():
        assert (part in found.parameters) == there, part
    assert ("mamba_d_state" in found.architecture) == parts["state space"]
    result = CliRunner().invoke(app, ["info", str(tmp_path / "one")])
    assert result.exit_code == 0 and "num_hidden_layers" in result.stdout
    assert ", ".join(dict.fromkeys(names)) in result.stdout


def test_info_of_a_preset_shows_the_state_space_s_share(tmp_path):
    config = PRESETS["mamba2-1m"]
    save_weights(tmp_path, config, initial_weights(config, 0))
    parts = describe(tmp_path).parameters
    outside = 4096 * 128 + 5 * 128 + 128
    assert parts["state space"] == parameter_count(config) - outside
    assert parts["norms"] == 6 * 128


def release_folder(path: Path, **changes: object) -> tuple[SessaConfig, dict[str, np.ndarray]]:
    """A folder with names and keys as transformers writes them for Mamba2ForCausalLM."""
    config = config_of(
        "mamba2",
        num_attention_heads=1,
        num_key_value_heads=1,
        use_forward_rope=False,
        max_position_embeddings=2048,
    )
    weights = weights_of(config)
    names = {
        "model.embed_tokens": "backbone.embeddings",
        "model.layers": "backbone.layers",
        "model.norm": "backbone.norm_f",
        ".ln.": ".norm.",
    }
    theirs = {}
    for name, value in weights.items():
        for ours, other in names.items():
            name = name.replace(ours, other)
        theirs[name] = value
    settings = {
        "model_type": "mamba2",
        "vocab_size": 37,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "state_size": 24,
        "head_dim": 32,
        "num_heads": 4,
        "conv_kernel": 3,
        "n_groups": 1,
        "tie_word_embeddings": True,
        "layer_norm_epsilon": 1e-5,
        "chunk_size": 256,
        "time_step_limit": [0.0, math.inf],
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **changes,
    }
    path.mkdir()
    save_weights(path, config, theirs)
    write_json(path / "config.json", settings)
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    return config, weights


def test_a_folder_of_transformers_mamba2_is_read(tmp_path):
    config, weights = release_folder(tmp_path / "theirs")
    report = convert(read_source(tmp_path / "theirs"), tmp_path / "ours", framework="mlx")
    assert report.exact and report.source == "transformers mamba2 folder"
    assert any("max_position_embeddings = 2048" in note for note in report.notes)
    assert load_weights(tmp_path / "ours")[0] == config
    assert_same(load_weights(tmp_path / "ours")[1], weights)
    assert (tmp_path / "ours" / "tokenizer.json").is_file()
    longer = read_source(tmp_path / "theirs", given={"max_position_embeddings": 99})
    assert longer.config.max_position_embeddings == 99 and not longer.notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_groups": 8}, "n_groups is 8; only 1"),
        ({"use_bias": True}, "use_bias is True"),
        ({"use_conv_bias": False}, "use_conv_bias is False"),
        ({"rms_norm": False}, "rms_norm is False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"time_step_limit": [0.001, 0.1]}, "time_step_limit is [0.001, 0.1]"),
        ({"state_size": 16}, "expected"),
    ],
)
def test_what_a_mamba2_folder_has_beyond_ours_is_named(tmp_path, change, message):
    release_folder(tmp_path / "theirs", **change)
    with pytest.raises(SessaError) as error:
        read_source(tmp_path / "theirs")
    assert message in str(error.value) and "theirs" in str(error.value)


def test_config_json_lists_the_kinds(tmp_path):
    make_folder(tmp_path / "one", config_of("hybrid"))
    settings = json.loads((tmp_path / "one" / "config.json").read_text())
    assert settings["layer_kinds"] == ["sessa", "mamba2", "transformer"]
    assert settings["mamba_d_state"] == 24 and settings["intermediate_size"] == 256
