"""Conversion: every form read, every round trip bit-exact, every bad input named."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import typer
from support.golden_cases import golden_case, relative_error
from support.in_process import fails

from sessa_common.checkpoint import conversion as module
from sessa_common.checkpoint.conversion import convert, parse_size
from sessa_common.checkpoint.folder import (
    INDEX,
    NUMPY_DTYPES,
    load_weights,
    save_weights,
)
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.checkpoint.quantization import quantize_weights
from sessa_common.checkpoint.sources import read_source
from sessa_common.config import SessaConfig, parameter_shapes
from sessa_common.errors import SessaError
from sessa_common.inspection import describe
from sessa_common.reference import model as reference
from sessa_common.storage import write_json

mx = pytest.importorskip("mlx.core")
torch = pytest.importorskip("torch")

CONFIG = SessaConfig(
    vocab_size=37,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    eos_token_id=4,
    max_position_embeddings=50,
)
FILES = {"tokenizer.json": '{"version": "1.0"}', "generation_config.json": '{"eos_token_id": 4}'}


def weights_in(dtype: str, config: SessaConfig = CONFIG) -> dict[str, np.ndarray]:
    """Weights without a constant tensor, so that no swap or loss of one can go unseen."""
    rng = np.random.default_rng(3)
    return {
        name: (value + rng.normal(0, 0.1, value.shape)).astype(NUMPY_DTYPES[dtype])
        for name, value in initial_weights(config, 1).items()
    }


def make_folder(path: Path, weights: dict[str, np.ndarray], **extra) -> Path:
    path.mkdir()
    save_weights(path, CONFIG, weights, extra_config=extra)
    for name, text in FILES.items():
        (path / name).write_text(text)
    return path


def assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape, name
        assert got[name].tobytes() == value.tobytes(), name


def to_mlx(array: np.ndarray) -> mx.array:
    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def from_mlx(array: mx.array) -> np.ndarray:
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)


def metadata(file: Path) -> dict[str, str]:
    raw = file.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]


def release_layer(config: SessaConfig, weights, i: int, buffers: bool) -> dict[str, np.ndarray]:
    """Layer i under the release's names, with the buffers that its state dict carries."""
    prefix = f"model.layers.{i}."
    layer = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
    if buffers:
        if config.use_forward_rope:
            d = config.head_dim
            layer["mixer.rope_inv_freq"] = (10000.0 ** (-np.arange(0, d, 2) / d)).astype(np.float32)
        mask = np.triu(np.ones((50, 50), bool), 1)
        layer |= {"mixer.causal_mask_f_full": mask, "mixer.causal_mask_fb_full": mask}
    return layer


def save_torch(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    from sessa_torch.checkpoint import to_tensor

    torch.save({name: to_tensor(np.asarray(value)) for name, value in tensors.items()}, path)
    return path


def read(path: Path, seed: int = 0, **given):
    return read_source(path, given, seed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_to_mlx_and_back_is_bit_exact(tmp_path, dtype):
    weights = weights_in(dtype)
    one = make_folder(tmp_path / "one", weights, transformers_version="5")
    there = convert(read(one), tmp_path / "two", framework="mlx")
    back = convert(read(tmp_path / "two"), tmp_path / "three")
    assert there.exact and back.exact and "bit-exact" in back.proof()
    assert metadata(tmp_path / "two" / "model.safetensors") == {"format": "mlx"}
    assert metadata(tmp_path / "three" / "model.safetensors") == {"format": "pt"}
    config, got = load_weights(tmp_path / "three")
    assert config == CONFIG
    assert_same(got, weights)
    for name, text in FILES.items():
        assert (tmp_path / "three" / name).read_text() == text
    assert json.loads((tmp_path / "three/config.json").read_text())["transformers_version"] == "5"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_mlx_reads_what_is_written(tmp_path, dtype):
    weights = weights_in(dtype)
    convert(read(make_folder(tmp_path / "one", weights)), tmp_path / "two", framework="mlx")
    loaded = mx.load(str(tmp_path / "two" / "model.safetensors"))
    assert_same({name: from_mlx(value) for name, value in loaded.items()}, weights)


def test_both_frameworks_load_the_result(tmp_path):
    convert(
        read(make_folder(tmp_path / "one", weights_in("float32"))),
        tmp_path / "two",
        framework="mlx",
        bits=4,
        group_size=32,
    )
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 7))
    want = reference.model_logits(*load_weights(tmp_path / "two"), ids)
    import sessa_mlx.checkpoint
    import sessa_torch.checkpoint

    with torch.no_grad():
        got = sessa_torch.checkpoint.load_model(tmp_path / "two")(torch.tensor(ids)).numpy()
    assert relative_error(got, want) <= 1e-5
    got = np.array(sessa_mlx.checkpoint.load_model(tmp_path / "two")(mx.array(ids)))
    assert relative_error(got, want) <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_mlx_files_are_read_bit_exact(tmp_path, dtype, suffix):
    weights = weights_in(dtype)
    arrays = {name: to_mlx(value) for name, value in weights.items()}
    file = tmp_path / f"weights.{suffix}"
    if suffix == "npz":
        mx.savez(str(file), **arrays)
    else:
        mx.save_safetensors(str(file), arrays, metadata={"format": "mlx"})
    source = read(file, num_attention_heads=4, use_forward_rope=True)
    assert source.config.num_key_value_heads == 2 and source.config.dtype == dtype
    assert convert(source, tmp_path / "out").exact
    assert_same(load_weights(tmp_path / "out")[1], weights)


def test_npz_in_a_folder_with_a_configuration(tmp_path):
    weights = weights_in("float32")
    write_json(tmp_path / "config.json", CONFIG.to_dict())
    np.savez(tmp_path / "weights.npz", **weights)
    out = tmp_path.with_name(tmp_path.name + "-out")
    assert convert(read(tmp_path), out).exact
    assert_same(load_weights(out)[1], weights)
    assert not (out / "weights.npz").exists()


def test_file_beside_its_configuration_needs_no_options(tmp_path):
    weights = weights_in("float32")
    folder = make_folder(tmp_path / "one", weights)
    source = read(folder / "model.safetensors")
    assert source.config == CONFIG
    assert_same(source.weights, weights)


def test_sharded_round_trip(tmp_path):
    weights = weights_in("bfloat16")
    report = convert(
        read(make_folder(tmp_path / "one", weights)), tmp_path / "two", shard_size=20_000
    )
    shards = [name for name in report.files if name.startswith("model-")]
    assert len(shards) > 3 and INDEX in report.files and report.exact
    assert all((tmp_path / "two" / name).stat().st_size < 25_000 for name in shards)
    convert(read(tmp_path / "two"), tmp_path / "three")
    assert not (tmp_path / "three" / INDEX).exists()
    assert_same(load_weights(tmp_path / "three")[1], weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantised_by_us_equals_quantised_by_mlx(tmp_path, bits, dtype):
    weights = weights_in(dtype)
    folder = make_folder(tmp_path / "one", weights)
    report = convert(read(folder), tmp_path / "two", framework="mlx", bits=bits, group_size=32)
    packed = mx.load(str(tmp_path / "two" / "model.safetensors"))
    settings = json.loads((tmp_path / "two" / "config.json").read_text())["quantization"]
    assert settings == {"group_size": 32, "bits": bits, "mode": "affine"}
    assert convert(read(tmp_path / "two"), tmp_path / "three").exact
    _, got = load_weights(tmp_path / "three")
    worst = 0.0
    for name, value in weights.items():
        if value.ndim < 2 or "gamma_ctx" in name:
            want = value
        else:
            parts = mx.quantize(to_mlx(value), group_size=32, bits=bits)
            ours = [packed[name.removesuffix("weight") + p] for p in ("weight", "scales", "biases")]
            assert all(mx.array_equal(a, b) for a, b in zip(ours, parts, strict=True)), name
            want = from_mlx(mx.dequantize(*parts, group_size=32, bits=bits))
        assert got[name].tobytes() == want.tobytes(), name
        error = np.abs(want.astype(np.float64) - value.astype(np.float64)).max()
        worst = max(worst, float(error))
    assert not report.exact
    assert report.largest_difference == pytest.approx(worst)


def test_folder_that_mlx_quantised_with_overrides(tmp_path):
    weights = weights_in("bfloat16")
    fine = {
        "model.embed_tokens": {"group_size": 64, "bits": 8},
        "model.layers.1.mixer.q_proj": {"group_size": 32, "bits": 6},
    }
    plain = "model.layers.0.W_in.weight"
    stored, want = {}, dict(weights)
    for name, value in weights.items():
        path = name.removesuffix(".weight")
        if value.ndim < 2 or "gamma_ctx" in name or name == plain:
            stored[name] = to_mlx(value)
            continue
        how = fine.get(path, {"group_size": 32, "bits": 4})
        parts = mx.quantize(to_mlx(value), **how)
        suffixes = ("weight", "scales", "biases")
        stored |= {f"{path}.{s}": part for s, part in zip(suffixes, parts, strict=True)}
        want[name] = from_mlx(mx.dequantize(*parts, **how))
    settings = {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        **fine,
        plain.removesuffix(".weight"): False,
    }
    folder = tmp_path / "one"
    folder.mkdir()
    write_json(folder / "config.json", {**CONFIG.to_dict(), "quantization": settings})
    mx.save_safetensors(str(folder / "model.safetensors"), stored, metadata={"format": "mlx"})
    assert_same(load_weights(folder)[1], want)
    report = convert(read(folder), tmp_path / "two")
    assert report.exact and report.source == "MLX-quantised folder"
    assert_same(load_weights(tmp_path / "two")[1], want)
    assert "quantization" not in json.loads((tmp_path / "two" / "config.json").read_text())


def test_quantised_file_alone_is_read_from_its_shapes(tmp_path):
    folder = make_folder(tmp_path / "one", weights_in("float32"))
    convert(read(folder), tmp_path / "two", framework="mlx", bits=3, group_size=32)
    lone = tmp_path / "lone.safetensors"
    lone.write_bytes((tmp_path / "two" / "model.safetensors").read_bytes())
    source = read(lone, num_attention_heads=4, use_forward_rope=True)
    assert_same(source.weights, load_weights(tmp_path / "two")[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cast_reports_its_rounding(tmp_path, dtype):
    weights = weights_in("float32")
    report = convert(read(make_folder(tmp_path / "one", weights)), tmp_path / "two", dtype=dtype)
    config, got = load_weights(tmp_path / "two")
    assert config.dtype == dtype and not report.exact
    assert_same(got, {name: w.astype(NUMPY_DTYPES[dtype]) for name, w in weights.items()})
    worst = max(np.abs(got[n].astype(np.float64) - w).max() for n, w in weights.items())
    assert report.largest_difference == worst > 0
    assert report.where in weights and report.where in report.proof()
    # Widening again loses nothing more.
    assert (
        convert(read(tmp_path / "two"), tmp_path / "three", dtype="float64").largest_difference == 0
    )


@pytest.mark.parametrize("name", ["base", "gqa", "norope", "single_head"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_release_layer_keeps_its_numbers(tmp_path, name, suffix):
    case = golden_case(name)
    tensors = dict(case.params)
    if case.config.use_forward_rope:
        d = case.config.head_dim
        tensors["mixer.rope_inv_freq"] = 10000.0 ** (-np.arange(0, d, 2) / d)
    tensors["mixer.causal_mask_f_full"] = np.triu(np.ones((130, 130), bool), 1)
    file = save_torch(tmp_path / "layer.pt", tensors)
    if suffix == "safetensors":
        from safetensors.torch import save_file

        save_file(torch.load(file), file := tmp_path / "layer.safetensors")
    given = {} if case.config.use_forward_rope else {"num_attention_heads": 3}
    if case.config.gamma_max != 0.999:
        given["gamma_max"] = case.config.gamma_max
    report = convert(read(file, seed=5, vocab_size=16, **given), tmp_path / "out")
    config, weights = load_weights(tmp_path / "out")
    assert config.num_attention_heads == case.config.num_attention_heads
    assert config.num_key_value_heads == case.config.num_key_value_heads
    assert config.use_forward_rope == case.config.use_forward_rope
    assert config.max_position_embeddings == 130
    prefix = "model.layers.0."
    layer = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
    assert_same(layer, case.params)
    assert (
        relative_error(reference.layer_forward(config, layer, case.arrays["x"]), case.arrays["y"])
        <= 1e-10
    )
    invented = [note for note in report.notes if note.startswith("invented")]
    assert len(invented) == 3 and "seed 5" in invented[0]
    drawn = initial_weights(config, 5)["model.embed_tokens.weight"]
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], drawn.astype(np.float64))


@pytest.mark.parametrize(
    "prefix", ["layers.", "model.layers.", "", "module.blocks.", "_orig_mod.net.layers."]
)
def test_stack_under_any_prefix(tmp_path, prefix):
    weights = weights_in("float32")
    stack = {
        f"{prefix}{i}.{name}": value
        for i in range(2)
        for name, value in release_layer(CONFIG, weights, i, buffers=True).items()
    }
    source = read(save_torch(tmp_path / "stack.pt", stack), vocab_size=37)
    assert source.config.num_hidden_layers == 2 and source.config.num_attention_heads == 4
    want = {name: value for name, value in weights.items() if ".layers." in name}
    assert_same({name: source.weights[name] for name in want}, want)


@pytest.mark.parametrize("tied", [True, False])
def test_whole_model_in_a_training_script_s_pickle(tmp_path, tied):
    config = SessaConfig(**{**CONFIG.__dict__, "tie_word_embeddings": tied})
    weights = weights_in("bfloat16", config)
    names = {
        "model.embed_tokens.weight": "tok_emb.weight",
        "model.norm.weight": "ln_f.weight",
        "model.norm.bias": "ln_f.bias",
        "lm_head.weight": "head.weight",
    }
    tensors = {names.get(name, name): value for name, value in weights.items()}
    tensors["head.weight"] = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    file = tmp_path / "model.pt"
    save_torch(file, tensors)
    torch.save({"model": torch.load(file), "step": 7}, file)
    source = read(file, num_attention_heads=4, use_forward_rope=True)
    assert source.config.tie_word_embeddings == tied
    assert_same(source.weights, weights)


def test_converting_in_place_and_forcing(tmp_path):
    weights = weights_in("float32")
    folder = make_folder(tmp_path / "one", weights)
    with pytest.raises(SessaError, match="not empty"):
        convert(read(folder), folder)
    assert convert(read(folder), folder, dtype="bfloat16", force=True).dtype == "bfloat16"
    assert load_weights(folder)[0].dtype == "bfloat16"
    assert (folder / "tokenizer.json").exists()


@pytest.mark.parametrize("inner", [True, False], ids=["target-inside", "source-inside"])
def test_one_folder_inside_the_other_is_refused(tmp_path, inner):
    folder = make_folder(tmp_path / "one", weights_in("float32"))
    with pytest.raises(SessaError, match="inside"):
        convert(read(folder), folder / "sub" if inner else tmp_path, force=True)
    assert_same(load_weights(folder)[1], weights_in("float32"))


def test_training_state_goes_with_unchanged_weights_only(tmp_path):
    folder = make_folder(tmp_path / "one", weights_in("float32"))
    (folder / "training_state.safetensors").write_bytes(b"state")
    (folder / "training.json").write_text("{}")
    convert(read(folder), tmp_path / "same", framework="mlx")
    convert(read(folder), tmp_path / "half", dtype="bfloat16")
    assert (tmp_path / "same" / "training_state.safetensors").read_bytes() == b"state"
    assert not (tmp_path / "half" / "training_state.safetensors").exists()
    assert (tmp_path / "half" / "training.json").exists()


def test_what_reads_back_wrong_is_not_kept(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "one", weights_in("float32"))

    def damaged(path, config, weights, **options):
        name = "model.norm.bias"
        save_weights(path, config, {**weights, name: np.nextafter(weights[name], 9)}, **options)

    monkeypatch.setattr(module, "save_weights", damaged)
    with pytest.raises(SessaError, match=re.escape("['model.norm.bias'] read back differently")):
        convert(read(folder), tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


def lone_layer(**change) -> dict[str, np.ndarray]:
    layer = release_layer(CONFIG, weights_in("float32"), 0, buffers=False)
    return {name: value for name, value in {**layer, **change}.items() if value is not None}


BAD_TENSORS = {
    "nothing-told": ({}, {}, "add `num_attention_heads`, `use_forward_rope`"),
    "no-vocabulary": ({}, {"num_attention_heads": 4, "use_forward_rope": True}, "add `vocab_size`"),
    "heads": ({}, {"num_attention_heads": 5}, "num_attention_heads 5 does not divide"),
    "heads-0": ({}, {"num_attention_heads": 0}, "num_attention_heads is 0"),
    "kv-heads": ({}, {"num_key_value_heads": 4}, "k_proj.weight has shape (32, 64), expected (64"),
    "told-otherwise": ({}, {"hidden_size": 32}, "hidden_size is 64 in the weights, given 32"),
    "missing": ({"W_out.bias": None}, {}, "tensor model.layers.0.W_out.bias is missing"),
    "no-keys": ({"mixer.k_proj.weight": None}, {}, "mixer.k_proj.weight of layer 0 is missing"),
    "shape": ({"W_in.bias": np.zeros(7)}, {}, "W_in.bias has shape (7,), expected (128,)"),
    "integers": ({"W_in.bias": np.zeros(128, int)}, {}, "W_in.bias is int64, expected a floating"),
    "unknown": ({"conv.weight": np.zeros(7)}, {}, "tensor conv.weight is not part of a Sessa"),
    "twice": ({"a.ln.weight": np.zeros(64)}, {}, "a.ln.weight is a second tensor for ln.weight"),
    "gap": ({"layers.2.ln.weight": np.zeros(64)}, {}, "layers [0, 2] do not count from 0"),
    "other-base": ({"mixer.rope_inv_freq": np.array([1.0, 0.5])}, {}, "not of base 10000"),
}


@pytest.mark.parametrize(("change", "given", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_bad_state_dict_is_named(tmp_path, change, given, message):
    file = save_torch(tmp_path / "layer.pt", lone_layer(**change))
    if message.startswith("add `"):
        options = given
    else:
        options = {"num_attention_heads": 4, "use_forward_rope": True, "vocab_size": 9, **given}
    with pytest.raises(SessaError) as error:
        read(file, **options)
    assert message in str(error.value)


class Harmful:
    """A pickle that would create a file when it is opened without care."""

    def __reduce__(self):
        return (Path.touch, (Path("opened"),))


@pytest.mark.parametrize(
    "content", ["object", "list", "mixed", "garbage", "empty", "numbers", "cut"]
)
def test_pickle_that_is_not_a_state_dict_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "model.pt"
    kinds = {
        "object": Harmful(),
        "list": [torch.zeros(2)],
        "empty": {},
        "mixed": {"ln.weight": torch.zeros(3), "step": 3},
        "numbers": {1: torch.zeros(2)},
    }
    if content == "garbage":
        file.write_bytes(b"not a pickle at all")
    else:
        torch.save(kinds.get(content, lone_layer()), file)
    if content == "cut":
        file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(SessaError, match="state dict") as error:
        read(file)
    assert "model.pt" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("name", ["m.safetensors", "m.npz", "m.bin", "m.gguf", "absent.pt"])
def test_unreadable_file_is_named(tmp_path, name):
    file = tmp_path / name
    if "absent" not in name:
        file.write_bytes(b"\x10\0\0\0\0\0\0\0 broken")
    with pytest.raises(SessaError, match=re.escape(name)):
        read(file)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_npz_is_named(tmp_path, keep):
    file = tmp_path / "weights.npz"
    np.savez(file, **weights_in("float32"))
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    with pytest.raises(SessaError, match=r"weights\.npz: not a readable"):
        read(file)


def test_array_that_is_no_archive_is_refused(tmp_path):
    np.save(tmp_path / "w.npy", np.zeros(3))
    (tmp_path / "w.npy").rename(tmp_path / "w.npz")
    with pytest.raises(SessaError, match="not a readable"):
        read(tmp_path / "w.npz")


def test_pickled_objects_in_npz_are_refused(tmp_path):
    np.savez(tmp_path / "w.npz", **{"ln.weight": np.array([Harmful()], dtype=object)})
    with pytest.raises(SessaError, match="not a readable"):
        read(tmp_path / "w.npz")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4, "framework": "torch"}, "choose `framework` mlx"),
        ({"bits": 7, "framework": "mlx"}, "bits 2, 3, 4, 5, 6, 8"),
        ({"bits": 4, "framework": "mlx", "group_size": 128}, "do not divide into groups of 128"),
        ({"dtype": "float64", "framework": "mlx"}, "MLX cannot read float64"),
        ({"dtype": "float16"}, "beyond float16"),
    ],
)
def test_impossible_conversion_leaves_nothing(tmp_path, options, message):
    weights = weights_in("float32")
    weights["model.norm.weight"][3] = 1e5
    folder = make_folder(tmp_path / "one", weights)
    with pytest.raises(SessaError) as error:
        convert(read(folder), tmp_path / "two", **options)
    assert message in str(error.value)
    assert not (tmp_path / "two").exists()


def test_options_that_contradict_a_folder_are_refused(tmp_path):
    folder = make_folder(tmp_path / "one", weights_in("float32"))
    with pytest.raises(SessaError, match="num_attention_heads 4, given 8"):
        read(folder, num_attention_heads=8)
    with pytest.raises(SessaError, match="feedback_key_dim 64, given 16"):
        read(folder, feedback_key_dim=16)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("20000", 20000), ("7B", 7)]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-1MB", "5TB", "nan", "inf", "5GBGB"])
def test_bad_sizes_are_refused(text):
    with pytest.raises(SessaError, match="shard_size"):
        parse_size(text)


def run_command(function, *arguments) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(function)
    app([str(argument) for argument in arguments], standalone_mode=False)


def test_convert_command_prints_its_proof(tmp_path, capsys):
    from sessa_cli.convert import convert as command

    folder = make_folder(tmp_path / "one", weights_in("float32"))
    run_command(command, folder, tmp_path / "two", "--quantize", 8, "--group-size", 32)
    text = capsys.readouterr().out
    assert "largest rounding difference" in text and "carried along: generation_config" in text
    run_command(command, tmp_path / "two", tmp_path / "three", "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed["exact"] and printed["source"] == "MLX-quantised folder"
    assert printed["parameters"] == sum(math.prod(s) for s in parameter_shapes(CONFIG).values())


def test_convert_command_takes_a_layer_with_options(tmp_path, capsys):
    from sessa_cli.convert import convert as command

    file = save_torch(tmp_path / "layer.pt", lone_layer())
    (tmp_path / "some.json").write_text('{"gamma_max": 0.5}')
    run_command(
        command,
        file,
        tmp_path / "out",
        "--heads",
        4,
        "--no-rope",
        "--vocab-size",
        11,
        "--config",
        tmp_path / "some.json",
        "--to",
        "mlx",
    )
    config, _ = load_weights(tmp_path / "out")
    assert (config.gamma_max, config.use_forward_rope, config.vocab_size) == (0.5, False, 11)
    assert "train before use" in capsys.readouterr().out


@pytest.mark.parametrize("option", [("--to", "jax"), ("--dtype", "int8"), ("--shard-size", "x")])
def test_convert_command_refuses_bad_options(tmp_path, capsys, option):
    folder = make_folder(tmp_path / "one", weights_in("float32"))
    assert f"{option[0]} is {option[1]!r}" in fails(
        capsys, "convert", folder, tmp_path / "two", *option
    )


CASES = {
    "source": ("absent", "out", "no such file or folder"),
    "not-empty": ("one", "full", "the folder is not empty; choose another or add --force"),
    "cut": ("cut", "out", "model.safetensors: not a readable safetensors file"),
    "pickle": ("bad.pt", "out", "bad.pt: not a plain state dict"),
    "key": ("key", "out", "unknown key n_layers"),
    "heads": ("heads", "out", "num_attention_heads 5 does not divide hidden_size 64"),
    "layer": ("layer.pt", "out", "add --num-attention-heads, --rope/--no-rope"),
}


@pytest.mark.parametrize(("source", "target", "message"), CASES.values(), ids=CASES)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, source, target, message):
    from sessa_cli.main import main

    for name in ("one", "full", "cut", "key", "heads"):
        make_folder(tmp_path / name, weights_in("float32"))
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"\x10")
    for name, change in {"key": {"n_layers": 2}, "heads": {"num_attention_heads": 5}}.items():
        write_json(tmp_path / name / "config.json", {**CONFIG.to_dict(), "head_dim": 0, **change})
    torch.save(Harmful(), tmp_path / "bad.pt")
    save_torch(tmp_path / "layer.pt", lone_layer())
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SystemExit) as exit_code:
        main(["convert", str(tmp_path / source), str(tmp_path / target)])
    printed = capsys.readouterr()
    assert exit_code.value.code == 2 and printed.out == ""
    assert message in printed.err and printed.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("quantized", [False, True])
def test_info_counts_from_the_headers(tmp_path, quantized):
    weights = weights_in("bfloat16")
    folder = make_folder(tmp_path / "one", weights)
    (folder / "tokenizer.json").unlink()
    convert(read(folder), tmp_path / "two", framework="mlx", bits=4 if quantized else None)
    found = describe(tmp_path / "two")
    assert found.parameters["total"] == sum(value.size for value in weights.values())
    assert found.parameters["embedding"] == 37 * 64
    assert found.parameters["feedback"] == 2 * (2 * 64 * 64 + 2 * 64 + 64 + 1)
    assert found.parameters["attention"] == 2 * (2 * 64 * 64 + 64 + 2 * (32 * 64 + 32))
    assert (
        sum(n for part, n in found.parameters.items() if part != "total")
        == (found.parameters["total"])
    )
    packed = quantize_weights(weights, 4, 64) if quantized else weights
    assert found.bytes["total"] == sum(value.nbytes for value in packed.values())
    assert ("uint32" in found.bytes) == quantized and found.tokenizer == "none"
    assert found.architecture["num_key_value_heads"] == 2


def test_info_of_a_weight_file(tmp_path, capsys):
    from sessa_cli.info import info

    run_command(info, save_torch(tmp_path / "layer.pt", lone_layer()))
    text = capsys.readouterr().out
    assert "not settled by the weights" in text and "hidden_size" in text
    run_command(info, save_torch(tmp_path / "layer.pt", lone_layer()), "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed["architecture"]["num_hidden_layers"] == 1
    assert "num_attention_heads" not in printed["architecture"]


def test_info_names_the_tokenizer(tmp_path, capsys):
    from sessa_cli.info import info
    from sessa_common.data.tokenizer import byte_tokenizer

    folder = make_folder(tmp_path / "one", weights_in("float32"))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    run_command(info, folder)
    assert "BPE, 257 tokens (DOES NOT FIT the 37 rows" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["missing", "shape", "cut", "no-folder"])
def test_info_names_damage(tmp_path, damage):
    weights = weights_in("float32")
    if damage == "missing":
        del weights["model.norm.bias"]
    if damage == "shape":
        weights["model.norm.bias"] = np.zeros(3, np.float32)
    folder = make_folder(tmp_path / "one", weights)
    if damage == "cut":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    match = {"cut": r"model\.safetensors", "no-folder": "no such"}.get(damage, "model.norm.bias")
    with pytest.raises(SessaError, match=match):
        describe(tmp_path / "two" if damage == "no-folder" else folder)
