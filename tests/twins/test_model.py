"""The language model of both frameworks: logits, decoding, padding, trimming, weights."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from support.block_options import FAMILIES, LLAMA
from support.frameworks import FRAMEWORKS, TORCH
from support.golden_cases import gradient_errors, relative_error

from sessa_common.checkpoint.folder import save_weights
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.config import SessaConfig, parameter_shapes
from sessa_common.errors import SessaError
from sessa_common.reference import model as reference

BASE = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "mamba_d_state": 10,
    "mamba_d_head": 8,
}
VARIANTS = {
    "base": {},
    "grouped": {"num_key_value_heads": 2},
    "one-head": {"num_attention_heads": 1},
    "norope": {"use_forward_rope": False},
    "untied": {"tie_word_embeddings": False},
    "weak-gain": {"gamma_max": 0.5},
    "transformer": {
        "layer_kinds": "transformer",
        "num_key_value_heads": 2,
        "intermediate_size": 40,
    },
    "gated": {"layer_kinds": "gated_attention"},
    "sessa_transformer": {
        "layer_kinds": "sessa_transformer",
        "num_key_value_heads": 2,
        "intermediate_size": 40,
    },
    **FAMILIES,
    "narrow-keys": {"feedback_key_dim": 5},
    "mamba2": {"layer_kinds": "mamba2"},
    "hybrid": {"layer_kinds": ("mamba2", "transformer", "sessa"), "num_hidden_layers": 3},
}
RECURRENT = ("mamba2", "hybrid")
FIRST_DRAWS = {
    "model.embed_tokens.weight": [2.4603067e-05, 0.0059749107, -0.005482757],
    "model.layers.1.W_out.weight": [0.12320121, -0.059893526, 0.18669757],
    "model.layers.1.mixer.gamma_ctx.weight": [0.16902851, 0.08522066, -0.49145177],
}
frameworks = pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda x: x.name)
variants = pytest.mark.parametrize("variant", VARIANTS)
LIMIT = 1e-4


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def make(framework, variant="base", seed=0):
    """A model whose biases and norms are random too, and its weights."""
    config = SessaConfig(**{**BASE, **VARIANTS[variant]})
    rng = np.random.default_rng(seed)
    weights = initial_weights(config, seed)
    weights = {n: w + 0.1 * rng.normal(size=w.shape).astype(np.float32) for n, w in weights.items()}
    return framework.checkpoint.build_model(config, weights), config, weights


def tokens(T, B=2, seed=1):
    return np.random.default_rng(seed).integers(0, 60, (B, T))


def run(framework, model, ids, **options):
    options = {k: framework.array(v) if k == "attention_mask" else v for k, v in options.items()}
    return framework.numpy(model(framework.array(ids), **options))


def new_cache(framework, config):
    module = __import__(f"sessa_{framework.name}.cache", fromlist=["SessaCache"])
    return module.SessaCache(config)


@frameworks
@variants
def test_logits_equal_the_reference(framework, variant):
    model, config, weights = make(framework, variant)
    ids = tokens(37)
    want = reference.model_logits(config, weights, ids)
    assert relative_error(run(framework, model, ids), want) <= LIMIT
    last = run(framework, model, ids, logits_to_keep=3)
    assert relative_error(last, want[:, -3:]) <= LIMIT


@frameworks
@variants
@pytest.mark.parametrize(
    "pieces", [[37], [20, 17], [7, 1, 29], [1] * 37], ids=["prefill", "two", "three", "tokens"]
)
def test_decoding_in_pieces_equals_the_full_pass(framework, variant, pieces):
    model, config, weights = make(framework, variant)
    ids = tokens(37)
    cache, start, logits = new_cache(framework, config), 0, []
    for count in pieces:
        logits.append(run(framework, model, ids[:, start : start + count], cache=cache))
        start += count
    assert cache.length == 37
    want = reference.model_logits(config, weights, ids)
    assert relative_error(np.concatenate(logits, 1), want) <= LIMIT


@frameworks
@variants
def test_left_padded_prompts_equal_single_prompts(framework, variant):
    model, config, weights = make(framework, variant)
    lengths, total, more = (5, 19), 19, 6
    ids = tokens(total + more)
    mask = np.array([[j >= total - n for j in range(total)] for n in lengths])
    full = np.concatenate([mask, np.ones((2, more), bool)], 1)
    whole = run(framework, model, ids, attention_mask=full)
    cache = new_cache(framework, config)
    first = run(framework, model, ids[:, :7], cache=cache, attention_mask=mask[:, :7])
    second = run(framework, model, ids[:, 7:total], cache=cache, attention_mask=mask)
    rest = [
        run(framework, model, ids[:, t : t + 1], cache=cache) for t in range(total, total + more)
    ]
    decoded = np.concatenate([first, second, *rest], 1)
    for row, n in enumerate(lengths):
        alone = ids[row : row + 1, total - n :]
        want = reference.model_logits(config, weights, alone)[0]
        assert relative_error(whole[row, total - n :], want) <= LIMIT
        assert relative_error(decoded[row, total - n :], want) <= LIMIT


@frameworks
@pytest.mark.parametrize(
    ("kind", "without_feedback", "options"),
    [
        ("sessa", "gated_attention", {}),
        ("sessa_transformer", "transformer", {}),
        ("sessa_transformer", "transformer", {**LLAMA, "qk_norm": True, "feedback_key_dim": 6}),
    ],
    ids=["sessa", "sessa_transformer", "llama"],
)
def test_a_gain_of_zero_changes_no_bit(framework, kind, without_feedback, options):
    config, plain = (
        SessaConfig(**{**BASE, **options, "layer_kinds": name}) for name in (kind, without_feedback)
    )
    weights = initial_weights(config, 4)
    for name in weights:
        if "gamma_" in name:
            weights[name] = np.zeros_like(weights[name])
    kept = {name: weights[name] for name in parameter_shapes(plain)}
    ids = tokens(130)
    got = run(framework, framework.checkpoint.build_model(config, weights), ids)
    want = run(framework, framework.checkpoint.build_model(plain, kept), ids)
    np.testing.assert_array_equal(got, want)


@frameworks
def test_a_mask_longer_or_shorter_than_the_tokens_is_refused(framework):
    model, config, _ = make(framework)
    cache = new_cache(framework, config)
    run(framework, model, tokens(5), cache=cache)
    with pytest.raises(ValueError, match="attention_mask has 6 columns, expected 5 cached \\+ 2"):
        run(framework, model, tokens(2), cache=cache, attention_mask=np.ones((2, 6), bool))


def float64_gradients(config, weights, ids, mask, dlogits):
    """From the reference, or by autograd where the reference has none (see test_mamba2)."""
    if all(kind.attends for kind in config.kinds):
        return reference.model_backward(config, weights, ids, dlogits, mask)
    model = TORCH.checkpoint.build_model(config, weights, dtype="float64")
    return TORCH.model_gradients(model, ids, mask, dlogits)


@frameworks
@pytest.mark.parametrize(
    "variant",
    ["base", "transformer", "gated", "sessa_transformer", "qwen2", "qwen3", "mamba2", "hybrid"],
)
def test_every_gradient_of_the_model(framework, variant):
    model, config, weights = make(framework, variant)
    ids, mask = tokens(70), np.arange(70) >= np.array([[0], [4]])
    dlogits = np.random.default_rng(3).normal(size=(2, 70, 60)) * mask[..., None]
    with torch.enable_grad():
        want = float64_gradients(config, weights, ids, mask, dlogits)
        got = framework.model_gradients(model, ids, mask, dlogits)
    assert got.keys() == want.keys() == parameter_shapes(config).keys()
    errors = gradient_errors({k: v.astype(np.float64) for k, v in got.items()}, want)
    assert max(errors.values()) <= LIMIT, errors


@frameworks
@pytest.mark.parametrize("variant", RECURRENT)
def test_a_recurrent_state_is_dropped_whole_or_not_at_all(framework, variant):
    model, config, _ = make(framework, variant)
    ids, cache = tokens(12), new_cache(framework, config)
    whole = run(framework, model, ids)
    run(framework, model, ids[:, :8], cache=cache)
    cache.trim(0)
    for count, message in ((3, "cannot be rolled back"), (9, "cannot drop 9 of 8")):
        with pytest.raises(ValueError, match=message):
            cache.trim(count)
    rest = run(framework, model, ids[:, 8:], cache=cache)
    assert relative_error(rest, whole[:, 8:]) <= LIMIT
    cache.trim(12)
    assert cache.length == 0
    assert relative_error(run(framework, model, ids, cache=cache), whole) <= LIMIT


@frameworks
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in RECURRENT])
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_trimming_is_exact(framework, variant, padded):
    model, config, _ = make(framework, variant)
    ids, other = tokens(300), tokens(9, seed=2)
    mask = np.ones((2, 300), bool)
    mask[0, :4] = False
    options = {"attention_mask": mask} if padded else {}
    trimmed, fresh = new_cache(framework, config), new_cache(framework, config)
    run(framework, model, ids, cache=trimmed, **options)
    trimmed.trim(50)
    options = {"attention_mask": mask[:, :250]} if padded else {}
    run(framework, model, ids[:, :250], cache=fresh, **options)
    got = run(framework, model, other, cache=trimmed)
    np.testing.assert_allclose(got, run(framework, model, other, cache=fresh), atol=1e-5)
    with pytest.raises(ValueError, match="cannot drop"):
        trimmed.trim(1000)


@frameworks
def test_bfloat16_keeps_positions_and_cached_states_in_float32(framework):
    config = SessaConfig(**{**BASE, **VARIANTS["hybrid"]}, dtype="bfloat16")
    model = framework.checkpoint.new_model(config, 3)
    cache = new_cache(framework, config)
    for piece in (tokens(9), tokens(1)):
        run(framework, model, piece, cache=cache)
        assert "float32" in str(cache.layers[2].s.rows.dtype)
        assert "bfloat16" in str(cache.layers[2].tensors()["k"].dtype)
        assert "float32" in str(cache.layers[0].state.dtype)
        assert "bfloat16" in str(cache.layers[0].conv.dtype)


@frameworks
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_survive_the_model_bit_for_bit(framework, dtype, tmp_path):
    config = SessaConfig(**BASE, tie_word_embeddings=False, dtype=dtype)
    low = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    weights = {n: w.astype(low) for n, w in initial_weights(config, 5).items()}
    save_weights(tmp_path, config, weights)
    model = framework.checkpoint.load_model(tmp_path)
    got = framework.checkpoint.model_weights(model)
    assert got.keys() == weights.keys() == parameter_shapes(config).keys()
    for name, value in weights.items():
        assert got[name].dtype == value.dtype and got[name].tobytes() == value.tobytes(), name


@frameworks
def test_weights_of_another_model_are_refused(framework):
    model, _, weights = make(framework)
    del weights["model.layers.1.W_out.bias"]
    with pytest.raises(SessaError, match=r"model\.layers\.1\.W_out\.bias is missing"):
        framework.checkpoint.set_weights(model, weights)


@pytest.mark.parametrize("variant", ["base", "hybrid"])
def test_both_frameworks_start_from_the_same_numbers(variant):
    config = SessaConfig(**{**BASE, **VARIANTS[variant]})
    first, second = (
        x.checkpoint.model_weights(x.checkpoint.new_model(config, 7)) for x in FRAMEWORKS
    )
    assert all((first[name] == second[name]).all() for name in first)


def test_a_seed_means_the_same_model_as_before():
    """Drawn by the first release of `initial_weights`, which knew Sessa layers only."""
    weights = initial_weights(SessaConfig(**BASE), 7)
    for name, want in FIRST_DRAWS.items():
        np.testing.assert_allclose(weights[name][0, :3], want, rtol=1e-6)


def test_the_residual_stream_gets_terms_of_equal_size():
    config = SessaConfig(
        vocab_size=8,
        hidden_size=64,
        num_hidden_layers=4,
        layer_kinds=("mamba2", "transformer", "sessa", "sessa_transformer"),
    )
    weights = initial_weights(config, 0)
    terms = {
        "0.mixer.out_proj": (128, 4),
        "1.mixer.out_proj": (64, 8),
        "1.mlp.down_proj": (256, 8),
        "1.mixer.q_proj": (64, 1),
        "2.W_out": (64, 4),
        "2.mixer.out_proj": (64, 1),
        "3.mixer.out_proj": (64, 8),
        "3.mlp.down_proj": (256, 8),
        "3.mixer.proj_fb": (64, 1),
    }
    for name, (fan_in, count) in terms.items():
        spread = weights[f"model.layers.{name}.weight"].std()
        assert spread == pytest.approx((fan_in * count) ** -0.5, rel=0.05), name


def test_mamba2_starts_in_its_ranges():
    config = SessaConfig(hidden_size=256, num_hidden_layers=1, layer_kinds="mamba2", mamba_d_head=2)
    weights = {n.split("mixer.")[-1]: w for n, w in initial_weights(config, 0).items()}
    dt, A = np.logaddexp(0, weights["dt_bias"]), np.exp(weights["A_log"])
    assert 0.00099 < dt.min() < 0.0015 and 0.07 < dt.max() < 0.1001
    # Log-uniform: the median is the geometric mean of the ends.
    assert np.median(dt) == pytest.approx(0.01, rel=0.3)
    assert 1 <= A.min() < 1.5 and 15 < A.max() <= 16 and A.mean() == pytest.approx(8.5, rel=0.1)
    assert (weights["D"] == 1).all() and (weights["conv1d.bias"] == 0).all()
    taps = np.abs(weights["conv1d.weight"])
    assert 0.49 < taps.max() <= 0.5 and taps.mean() == pytest.approx(0.25, rel=0.1)


@pytest.mark.parametrize("variant", ["base", "sessa_transformer", "hybrid"])
def test_torch_compile_runs_the_whole_model(variant):
    with torch.enable_grad():
        model, _, _ = make(TORCH, variant)
        ids = torch.tensor(tokens(20))
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(ids), model(ids))
        compiled(ids).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
