"""Folders of the Llama family: the same numbers as transformers, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.golden_cases import relative_error

from sessa_common.checkpoint.conversion import convert
from sessa_common.checkpoint.folder import read_safetensors, write_safetensors
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.checkpoint.llama_names import interleave_halves, llama_config, separate_pairs
from sessa_common.checkpoint.quantization import dequantize_weights, quantize_weights
from sessa_common.checkpoint.sources import Source, read_source
from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError
from sessa_common.inference.generation import left_pad
from sessa_common.reference.model import model_logits

STORIES = Path(__file__).parents[2] / "fixtures" / "stories260K"
SETTINGS = json.loads((STORIES / "config.json").read_text())
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
SCALED = {"factor": 4.0, "rope_theta": 1e4}
FAMILIES = {
    "Llama": {"rope_parameters": {"rope_type": "linear", **SCALED}, "tie_word_embeddings": True},
    "Llama with biases": {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    "Mistral": {"sliding_window": None, "head_dim": 10},
    "Qwen2": {"rope_parameters": YARN, "use_sliding_window": False, "tie_word_embeddings": True},
    "Qwen2 with mscale": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}},
    "Qwen2 without truncation": {"rope_parameters": YARN | {"truncate": False, "beta_fast": 20.0}},
    "Qwen3": {"head_dim": 12},
    "Qwen3 with biases": {"head_dim": 6, "attention_bias": True},
}


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    """A random model of transformers, its folder, ids (2, 40) and its float64 logits for them."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    family, options = request.param.split()[0], FAMILIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            # Scores and norms far from their initial values, so that every option has an effect.
            weight += torch.randn_like(weight) * (0.3 if weight.ndim == 1 else 0.15)
    model.save_pretrained(tmp_path / "hf")
    ids = torch.randint(0, 50, (2, 40))
    with torch.no_grad():
        logits = model.double()(ids).logits
    return tmp_path / "hf", ids.numpy(), logits.numpy()


def test_every_family_gives_the_logits_of_transformers(folder, tmp_path):
    path, ids, want = folder
    report = convert(read_source(path), tmp_path / "ours")
    assert report.exact
    source = read_source(tmp_path / "ours")
    assert relative_error(model_logits(source.config, source.weights, ids), want) <= 2e-6
    for backend in ("torch", "mlx"):
        decoding = pytest.importorskip(f"sessa_{backend}.decoding")
        decoder = decoding.load_decoder(tmp_path / "ours")
        assert relative_error(decoder.logits(ids), want) <= 1e-5
        # A padded batch, then single tokens with the cache of both rows.
        decoder.reset()
        tokens, mask = left_pad([ids[0, :30], ids[1, :11]])
        assert relative_error(decoder.step(tokens, mask), want[[0, 1], [29, 10]]) <= 1e-5
        for t in range(5):
            logits = decoder.step(ids[[0, 1], [30 + t, 11 + t]][:, None])
            assert relative_error(logits, want[[0, 1], [30 + t, 11 + t]]) <= 1e-5


def test_every_family_gives_the_logits_of_mlx_lm(folder, tmp_path):
    path, ids, _ = folder
    mx, mlx_lm = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    settings = json.loads((path / "config.json").read_text())
    if settings["model_type"] == "qwen3" and settings["attention_bias"]:
        pytest.skip("mlx-lm has no biases in Qwen3")
    # mlx-lm reads what older versions of transformers wrote.
    rope = settings.pop("rope_parameters")
    settings |= {"rope_theta": rope.pop("rope_theta")}
    settings |= {"rope_scaling": rope} if rope["rope_type"] != "default" else {}
    (path / "config.json").write_text(json.dumps(settings))
    model, _ = mlx_lm.load_model(path)
    convert(path, tmp_path / "ours", feedback="all", feedback_key_dim=6)
    ours = pytest.importorskip("sessa_mlx").load_model(tmp_path / "ours")
    want = np.array(model(mx.array(ids)))
    assert relative_error(np.array(ours(mx.array(ids))), want) <= 1e-5


def test_every_family_returns_bit_for_bit(folder, tmp_path):
    path, ids, want = folder
    convert(path, tmp_path / "ours", feedback="all", feedback_key_dim=6)
    report = convert(tmp_path / "ours", tmp_path / "back", framework="llama")
    assert not list((tmp_path / "back").glob("*.py"))
    assert report.exact and "left out the feedback, whose gain is 0 in every layer" in report.notes
    before, after = (read_safetensors(x / "model.safetensors") for x in (path, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    assert read_source(tmp_path / "back").config == read_source(path).config
    assert not list((tmp_path / "back").glob("*.py"))
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").double()
    with torch.no_grad():
        np.testing.assert_array_equal(model(torch.tensor(ids)).logits.numpy(), want)


def test_a_model_with_a_gain_does_not_become_a_llama(tmp_path):
    convert(STORIES, tmp_path / "ours", feedback="2")
    source = read_source(tmp_path / "ours")
    gain = {"model.layers.2.mixer.gamma_ctx.weight": np.eye(1, 64, 5, dtype=np.float32)}
    source = dataclasses.replace(source, weights={**source.weights, **gain})
    with pytest.raises(SessaError, match="layer 2 has feedback with a gain other than 0"):
        convert(source, tmp_path / "back", framework="llama")
    options = {"norm_type": "rms", "mlp_type": "swiglu", "layer_kinds": "transformer"}
    for change, message in (({"mlp_type": "gelu"}, "mlp_type"), ({"qkv_bias": False}, "no member")):
        config = SessaConfig(**{**options, **change}, num_hidden_layers=1)
        plain = Source(config=config, weights=initial_weights(config, 0), kind="made")
        with pytest.raises(SessaError, match=message):
            convert(plain, tmp_path / "back", framework="llama")
    assert not (tmp_path / "back").exists()


def test_a_published_model_gives_its_logits_and_its_story(tmp_path):
    with np.load(STORIES / "truth.npz") as truth:
        ids, want, greedy = truth["ids"], truth["logits"], truth["greedy"]
    assert convert(read_source(STORIES), tmp_path / "ours").exact
    source = read_source(tmp_path / "ours")
    assert relative_error(model_logits(source.config, source.weights, ids), want) <= 1e-6
    for backend in ("torch", "mlx"):
        decoding = pytest.importorskip(f"sessa_{backend}.decoding")
        decoder = decoding.load_decoder(tmp_path / "ours")
        assert relative_error(decoder.logits(ids), want) <= 1e-5
        decoder.reset()
        logits, told = decoder.step(greedy[None, :1]), [greedy[0]]
        for _ in greedy[1:]:
            told.append(logits[0].argmax())
            logits = decoder.step(np.array([[told[-1]]]))
        assert told == greedy.tolist()


def test_a_folder_quantised_by_mlx_is_read(tmp_path):
    tensors = read_safetensors(STORIES / "model.safetensors")
    # The columns of down_proj do not divide into groups.
    chosen = {k: v for k, v in tensors.items() if "down_proj" not in k}
    packed = tensors | quantize_weights(chosen, 4, 32)
    quantization = {"group_size": 32, "bits": 4}
    floats = dequantize_weights(packed, quantization, 64, "packed")
    for name, stored in (("packed", packed), ("floats", floats)):
        (tmp_path / name).mkdir()
        extra = {"quantization": quantization} if name == "packed" else {}
        (tmp_path / name / "config.json").write_text(json.dumps({**SETTINGS, **extra}))
        write_safetensors(tmp_path / name / "model.safetensors", stored)
    found, want = (read_source(tmp_path / name) for name in ("packed", "floats"))
    assert found.kind == "MLX-quantised llama folder" and found.config == want.config
    for name, value in want.weights.items():
        np.testing.assert_array_equal(found.weights[name], value)


def test_old_and_new_spelling_of_rope_are_one():
    old = {k: v for k, v in SETTINGS.items() if k != "rope_parameters"} | {"rope_theta": 500.0}
    found = []
    for spelled in ({"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}):
        found.append(llama_config({**old, "rope_scaling": spelled}, "config")[0])
    parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    found.append(llama_config({**SETTINGS, "rope_parameters": parameters}, "config")[0])
    first, *rest = (SessaConfig.from_dict(keys) for keys in found)
    assert first.rope_theta == 500.0 and first.rope_scaling is not None
    assert first.rope_scaling.factor == 2.0
    assert all(config == first for config in rest)
    assert SessaConfig.from_dict(first.to_dict()) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"model_type": "mistral"}, "sliding_window is 4096"),
        ({"sliding_window": 4096}, "sliding_window is 4096: layers that see only"),
        ({"layer_types": ["sliding_attention"] * 5}, "layers that see only the newest"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "both given"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "'dynamic' is not supported, because its base follows the length",
        ),
        ({"rope_parameters": {"rope_type": "spiral", "factor": 2.0}}, "rope_type is 'spiral'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "linear has no `factor`"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor is 0, expected"),
        ({"rope_parameters": {"full_attention": {}}}, "expected one object for all layers"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"intermediate_size": None}, "intermediate_size is None, expected a number"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(change, message, tmp_path):
    shutil.copytree(STORIES, tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**SETTINGS, **change}))
    with pytest.raises(SessaError, match=message) as error:
        convert(read_source(tmp_path / "hf"), tmp_path / "ours")
    assert "\n" not in str(error.value) and not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "off",
    [
        {"sliding_window": None},
        {"sliding_window": 4096, "use_sliding_window": False},
        {"sliding_window": 4096, "model_type": "qwen2"},
        {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 5},
        {"sliding_window": 4096, "layer_types": ["full_attention"] * 5},
    ],
)
def test_windows_that_are_switched_off_are_accepted(off):
    keys, _ = llama_config({**SETTINGS, **off}, "config")
    assert SessaConfig.from_dict(keys).num_hidden_layers == 5


def test_rotary_halves_become_pairs_and_return():
    rows = np.arange(24).reshape(12, 2)
    pairs = interleave_halves(rows, 6)
    assert pairs[:6, 0].tolist() == [0, 6, 2, 8, 4, 10]
    np.testing.assert_array_equal(separate_pairs(pairs, 6), rows)
    vector = np.arange(6)
    assert interleave_halves(vector, 6).tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_type": "batch"}, "norm_type is 'batch', expected layer or rms"),
        ({"mlp_type": "relu"}, "mlp_type is 'relu', expected gelu or swiglu"),
        ({"qk_norm": 1}, "qk_norm is 1, expected true or false"),
        ({"feedback_key_dim": -1}, "feedback_key_dim is -1, expected 0 or more"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object or null"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "slope": 1}}, "unknown key slope"),
        ({"layer_kinds": "sessa", "norm_type": "rms"}, "norm_type is 'rms', expected 'layer'"),
        ({"layer_kinds": "sessa", "head_dim": 16}, "head_dim 16 times 4 heads is not hidden_size"),
    ],
)
def test_options_are_checked(options, message):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "layer_kinds": "sessa_transformer"}
    with pytest.raises(SessaError, match=message):
        SessaConfig.from_dict({**sizes, **options})


def test_a_config_json_has_only_the_options_that_differ():
    config = SessaConfig(layer_kinds="sessa_transformer")
    options = {"norm_type", "mlp_type", "qkv_bias", "qk_norm", "rope_scaling", "feedback_key_dim"}
    assert not options & config.to_dict().keys()
    narrow = dataclasses.replace(config, feedback_key_dim=16, qk_norm=True)
    assert narrow.to_dict()["feedback_key_dim"] == 16
    assert SessaConfig.from_dict(narrow.to_dict()) == narrow


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_added_feedback_changes_no_bit_of_a_published_model(backend, tmp_path):
    decoding = pytest.importorskip(f"sessa_{backend}.decoding")
    with np.load(STORIES / "truth.npz") as truth:
        ids = truth["ids"]
    convert(STORIES, tmp_path / "plain")
    logits = decoding.load_decoder(tmp_path / "plain").logits(ids)
    for source, name in ((STORIES, "first"), (tmp_path / "plain", "second")):
        convert(source, tmp_path / name, feedback="every:2", feedback_key_dim=16)
        found = decoding.load_decoder(tmp_path / name)
        kinds = ["sessa_transformer" if i in (1, 3) else "transformer" for i in range(5)]
        assert [kind.name for kind in found.config.kinds] == kinds
        np.testing.assert_array_equal(found.logits(ids), logits)
    # With a gain, the feedback has an influence.
    source = read_source(tmp_path / "first")
    source.weights["model.layers.3.mixer.gamma_bias"] = np.float32(0.5).reshape(())
    convert(source, tmp_path / "gain")
    changed = decoding.load_decoder(tmp_path / "gain").logits(ids)
    assert relative_error(changed, logits) > 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feedback": "some"}, "`feedback` is 'some', expected all, every:2, or layers such as"),
        ({"feedback": "5"}, "`feedback` is '5', expected layers from 0 to 4"),
        ({"feedback": "every:0"}, "`feedback` is 'every:0', expected a number from 1 to 5"),
        ({"feedback": "all", "feedback_key_dim": 0}, "feedback_key_dim is 0, expected above 0"),
    ],
)
def test_feedback_that_cannot_be_added_is_refused(fields, message, tmp_path):
    with pytest.raises(SessaError, match=message):
        convert(STORIES, tmp_path / "ours", **fields)
    assert not (tmp_path / "ours").exists()


def test_feedback_is_not_added_twice(tmp_path):
    convert(STORIES, tmp_path / "some", feedback="0", feedback_key_dim=16)
    with pytest.raises(SessaError, match="layer 0 is sessa_transformer, to which no feedback"):
        convert(tmp_path / "some", tmp_path / "all", feedback="all")
    with pytest.raises(SessaError, match="feedback_key_dim is 32, but the feedback that the model"):
        convert(tmp_path / "some", tmp_path / "more", feedback="1", feedback_key_dim=32)
    convert(tmp_path / "some", tmp_path / "more", feedback="1")
    assert read_source(tmp_path / "more").config.feedback_key_dim == 16
