"""The float64 reference against the released layer, finite differences and the closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from support.golden_cases import gradient_errors, relative_error
from support.operands import draw_operands

from sessa_common.config import SessaConfig, parameter_shapes
from sessa_common.errors import SessaError
from sessa_common.reference import model as reference
from sessa_common.reference.ops import masked_softmax
from sessa_common.rope import RopeScaling

CONFIGS = {
    "mha": SessaConfig(vocab_size=11, hidden_size=12, num_hidden_layers=2, num_attention_heads=3),
    "gqa_untied": SessaConfig(
        vocab_size=11,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        gamma_max=0.9,
    ),
    "single_norope": SessaConfig(
        vocab_size=11,
        hidden_size=10,
        num_hidden_layers=1,
        num_attention_heads=1,
        use_forward_rope=False,
    ),
    "no_feedback": SessaConfig(
        vocab_size=11,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        layer_kinds="gated_attention",
    ),
    "standard": SessaConfig(
        vocab_size=11,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        layer_kinds="transformer",
        intermediate_size=20,
    ),
    "standard_one_head": SessaConfig(
        vocab_size=11,
        hidden_size=10,
        num_hidden_layers=1,
        num_attention_heads=1,
        layer_kinds="transformer",
        tie_word_embeddings=False,
    ),
    "gated_then_sessa": SessaConfig(
        vocab_size=11,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        layer_kinds=("gated_attention", "sessa"),
    ),
    "standard_with_feedback": SessaConfig(
        vocab_size=11,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        layer_kinds=("sessa_transformer", "transformer"),
        intermediate_size=20,
        gamma_max=0.9,
    ),
    "every_block_option": SessaConfig(
        vocab_size=11,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        layer_kinds=("sessa_transformer", "transformer"),
        intermediate_size=20,
        norm_type="rms",
        mlp_type="swiglu",
        qkv_bias=False,
        out_proj_bias=False,
        mlp_bias=False,
        qk_norm=True,
        feedback_key_dim=5,
        rope_scaling=RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    ),
}
RECURRENT = {
    "mamba2": SessaConfig(
        vocab_size=11,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        layer_kinds="mamba2",
        mamba_d_state=5,
        mamba_d_head=6,
        mamba_d_conv=3,
        tie_word_embeddings=False,
    ),
    "mamba2_no_window": SessaConfig(
        vocab_size=11,
        hidden_size=10,
        num_hidden_layers=1,
        num_attention_heads=1,
        layer_kinds="mamba2",
        mamba_d_state=3,
        mamba_d_head=4,
        mamba_d_conv=1,
    ),
    "hybrid": SessaConfig(
        vocab_size=11,
        hidden_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        layer_kinds=("mamba2", "transformer", "sessa"),
        mamba_d_state=5,
        mamba_d_head=8,
    ),
}


@pytest.fixture(params=CONFIGS)
def config(request) -> SessaConfig:
    """Every model that has gradients here."""
    return CONFIGS[request.param]


@pytest.fixture(params=[*CONFIGS, *RECURRENT])
def any_config(request) -> SessaConfig:
    return {**CONFIGS, **RECURRENT}[request.param]


def random_weights(config: SessaConfig, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0.0, 1.5 * (shape[-1] if shape else 1) ** -0.5, shape)
        for name, shape in parameter_shapes(config).items()
    }


def layer_weights(config: SessaConfig) -> dict[str, np.ndarray]:
    prefix = "model.layers.0."
    return {
        name.removeprefix(prefix): value
        for name, value in random_weights(config).items()
        if name.startswith(prefix)
    }


def directional(function, arrays: dict[str, np.ndarray], grads: dict[str, np.ndarray]) -> None:
    """Compare each gradient with a central difference of `function(arrays)` along a direction."""
    rng, h = np.random.default_rng(7), 1e-5
    for name, value in arrays.items():
        direction = rng.normal(size=value.shape)
        up = function({**arrays, name: value + h * direction})
        down = function({**arrays, name: value - h * direction})
        want = (up - down) / (2 * h)
        got = float((grads[name] * direction).sum())
        assert got == pytest.approx(want, rel=1e-6, abs=1e-8), name


def test_golden_forward(golden):
    y = reference.layer_forward(golden.config, golden.params, golden.arrays["x"])
    assert relative_error(y, golden.arrays["y"]) <= 1e-10


def test_golden_backward(golden):
    x, dy = golden.arrays["x"], golden.arrays["dy"]
    dx, grads = reference.layer_backward(golden.config, golden.params, x, dy)
    assert relative_error(dx, golden.arrays["dx"]) <= 1e-10
    errors = gradient_errors(grads, golden.grads)
    assert max(errors.values()) <= 1e-10, errors


def test_golden_decode(golden):
    x = golden.arrays["x"]
    half, cache = x.shape[1] // 2, None
    pieces = [x[:, :half], *np.split(x[:, half:], x.shape[1] - half, axis=1)]
    out = []
    for piece in pieces:
        y, cache = reference.layer_decode(golden.config, golden.params, piece, cache)
        out.append(y)
    assert relative_error(np.concatenate(out, axis=1), golden.arrays["y_decode"]) <= 1e-10


def test_gradient_errors_notice_a_wrong_gradient(golden):
    worst = max(golden.grads, key=lambda name: np.abs(golden.grads[name]).max())
    wrong = {**golden.grads, worst: golden.grads[worst] * (1 + 1e-6)}
    assert gradient_errors(wrong, golden.grads)[worst] > 1e-7
    del wrong[worst]
    assert gradient_errors(wrong, golden.grads)[worst] == np.inf


@pytest.mark.parametrize("T", [1, 2, 15, 17])
@pytest.mark.parametrize("P", [0, 5])
@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
def test_feedback_solve_is_the_dense_inverse(T, P, masked):
    f, q, k, gamma, past, mask = feedback_inputs(T, P, masked)
    alpha = np.zeros((2, T, P + T))
    for b in range(2):
        for t in range(T):
            seen = [j for j in range(P + t) if mask is None or mask[b, j]]
            scores = np.array([q[b, t] @ k[b, j] / np.sqrt(7) for j in seen])
            if seen:
                alpha[b, t, seen] = np.exp(scores) / np.exp(scores).sum()
    N = gamma[..., None] * alpha
    right = f + N[:, :, :P] @ past if P else f
    want = np.linalg.solve(np.eye(T) - N[:, :, P:], right)
    got = reference.feedback_solve(f, q, k, gamma, past, mask)
    assert relative_error(got, want) <= 1e-13


def feedback_inputs(T, P, masked):
    drawn = draw_operands(T + P, T=T, P=P, D=5, K=7, dtype=np.float64)
    past = drawn["past_s"] if P else None
    # The second sequence starts with columns that nobody may see.
    mask = np.arange(P + T) >= np.array([[0], [3]]) if masked else None
    return *(drawn[name] for name in ("f", "q", "k", "gamma")), past, mask


@pytest.mark.parametrize("T", [1, 2, 9])
@pytest.mark.parametrize("P", [0, 4])
@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
def test_feedback_solve_backward(T, P, masked):
    f, q, k, gamma, past, mask = feedback_inputs(T, P, masked)
    ds = np.random.default_rng(1).normal(size=f.shape)
    gradients = reference.feedback_solve_backward(ds, f, q, k, gamma, past, mask)
    arrays = {"f": f, "q": q, "k": k, "gamma": gamma, "past_s": past}
    grads = dict(zip(arrays, gradients, strict=True))
    if past is None:
        assert grads.pop("past_s") is None and arrays.pop("past_s") is None
    directional(
        lambda a: float((ds * reference.feedback_solve(**a, key_mask=mask)).sum()), arrays, grads
    )


def test_row_with_nothing_visible_is_its_right_hand_side():
    f, q, k, gamma, _, _ = feedback_inputs(6, 0, False)
    mask = np.ones((2, 6), dtype=bool)
    mask[1] = False
    s = reference.feedback_solve(f, q, k, gamma, key_mask=mask)
    np.testing.assert_array_equal(s[1], f[1])
    np.testing.assert_array_equal(s[0, 0], f[0, 0])
    assert np.abs(s[0, 1:] - f[0, 1:]).min() > 0


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.761, 0.999, -0.6])
@pytest.mark.parametrize("T", [1, 2, 63, 257])
def test_uniform_routing_is_the_gamma_ratio(T, gamma):
    rng = np.random.default_rng(0)
    f, k = np.eye(T)[None], rng.normal(size=(1, T, 3))
    K = reference.feedback_solve(f, np.zeros((1, T, 3)), k, np.full((1, T), gamma))[0]
    want = reference.uniform_kernel(gamma, T)
    below = np.tril_indices(T, -1)
    np.testing.assert_allclose(K[below], want[below], rtol=1e-11)
    np.testing.assert_array_equal(np.triu(K), np.eye(T))


@pytest.mark.parametrize("T", [1, 2, 63, 257])
def test_uniform_routing_with_gains_that_vary(T):
    rng = np.random.default_rng(T)
    f, k = np.eye(T)[None], rng.normal(size=(1, T, 3))
    gains = rng.uniform(-0.999, 0.999, T)
    K = reference.feedback_solve(f, np.zeros((1, T, 3)), k, gains[None])[0]
    np.testing.assert_allclose(K, reference.uniform_kernel(gains, T), rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("bound", [0.3, 0.9, 0.999])
def test_states_stay_within_the_stability_bound(bound):
    rng = np.random.default_rng(3)
    f, q, k = rng.normal(size=(2, 130, 5)), *rng.normal(0, 3, size=(2, 2, 130, 7))
    gamma = bound * np.sign(rng.normal(size=(2, 130)))
    s = reference.feedback_solve(f, q, k, gamma)
    assert np.abs(s).max() <= np.abs(f).max() / (1 - bound)
    ones = reference.feedback_solve(np.ones_like(f), q, k, np.full((2, 130), bound))
    # Equal signs reach the bound: 1 + g + g^2 + ... up to the depth of the chain.
    assert ones[:, -1].min() > 1 + bound


def test_softmax_survives_large_scores():
    weights = masked_softmax(np.array([[1e4, -1e4, 1e4]]), np.array([[True, True, False]]))
    np.testing.assert_array_equal(weights, [[1.0, 0.0, 0.0]])


@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
def test_layer_backward(config, masked):
    rng, weights = np.random.default_rng(5), layer_weights(config)
    x, dy = rng.normal(size=(2, 2, 6, config.hidden_size))
    mask = np.arange(6) >= np.array([[0], [3]]) if masked else None
    dx, grads = reference.layer_backward(config, weights, x, dy, key_mask=mask)
    assert grads.keys() == weights.keys()

    def value(arrays):
        x = arrays.pop("x")
        return float((dy * reference.layer_forward(config, arrays, x, key_mask=mask)).sum())

    directional(value, {"x": x, **weights}, {"x": dx, **grads})


def test_model_backward(config):
    weights = random_weights(config)
    ids = np.random.default_rng(2).integers(0, config.vocab_size, (2, 7))
    mask = np.arange(6) >= np.array([[0], [2]])
    count = mask.astype(float)

    def loss(arrays):
        logits = reference.model_logits(config, arrays, ids[:, :-1], mask)
        return reference.cross_entropy(logits, ids[:, 1:], count)[0]

    logits = reference.model_logits(config, weights, ids[:, :-1], mask)
    _, dlogits = reference.cross_entropy(logits, ids[:, 1:], count)
    grads = reference.model_backward(config, weights, ids[:, :-1], dlogits, mask)
    assert grads.keys() == weights.keys()
    directional(loss, weights, grads)


@pytest.mark.parametrize("name", RECURRENT)
def test_gradients_of_mamba2_are_refused(name):
    config, ids = RECURRENT[name], np.zeros((1, 3), dtype=int)
    with pytest.raises(SessaError, match="no gradients of a Mamba-2 layer"):
        reference.model_backward(config, random_weights(config), ids, np.zeros((1, 3, 11)))
    x = np.zeros((1, 3, config.hidden_size))
    with pytest.raises(SessaError, match="no gradients of a Mamba-2 layer"):
        reference.layer_backward(config, layer_weights(config), x, x)


def test_mamba2_layer_decodes_what_it_computes_at_once():
    config = RECURRENT["mamba2"]
    weights, x = layer_weights(config), np.random.default_rng(3).normal(size=(2, 7, 12))
    cache, rows = None, []
    for piece in np.split(x, [4, 5], axis=1):
        y, cache = reference.layer_decode(config, weights, piece, cache)
        rows.append(y)
    want = reference.layer_forward(config, weights, x)
    assert relative_error(np.concatenate(rows, axis=1), want) <= 1e-13


def test_cross_entropy_of_equal_logits_is_the_log_of_their_number():
    loss, dlogits = reference.cross_entropy(np.zeros((2, 3, 11)), np.zeros((2, 3), dtype=int))
    assert loss == pytest.approx(np.log(11))
    assert dlogits.sum() == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("cuts", [(13,), (5, 9, 13), tuple(range(1, 14))], ids=["1", "3", "13"])
def test_pieces_through_a_cache_equal_the_whole(any_config, cuts):
    config = any_config
    weights = random_weights(config)
    ids = np.random.default_rng(4).integers(0, config.vocab_size, (2, 13))
    cache = reference.empty_cache(config, 2)
    pieces = np.split(ids, cuts[:-1], axis=1)
    got = [reference.model_logits(config, weights, piece, cache=cache) for piece in pieces]
    want = reference.model_logits(config, weights, ids)
    assert relative_error(np.concatenate(got, axis=1), want) <= 1e-12


def test_left_padded_batch_equals_each_prompt_alone(any_config):
    config = any_config
    weights = random_weights(config)
    rng = np.random.default_rng(6)
    prompts = [rng.integers(0, config.vocab_size, n) for n in (8, 5, 1)]
    ids = np.stack([np.pad(p, (8 - len(p), 0), constant_values=3) for p in prompts])
    mask = np.stack([np.arange(8) >= 8 - len(p) for p in prompts]).astype(np.int64)
    cache = reference.empty_cache(config, 3)
    first = reference.model_logits(config, weights, ids, mask, cache)
    assert np.isfinite(first).all()
    next_ids = rng.integers(0, config.vocab_size, (3, 2))
    # The cache remembers the mask: the two new tokens need none.
    second = reference.model_logits(config, weights, next_ids, cache=cache)
    for row, prompt in enumerate(prompts):
        alone = np.concatenate([prompt, next_ids[row]])[None]
        want = reference.model_logits(config, weights, alone)[0]
        got = np.concatenate([first[row, 8 - len(prompt) :], second[row]])
        assert relative_error(got, want) <= 1e-12


def test_padding_tokens_do_not_reach_real_ones(any_config):
    config = any_config
    weights = random_weights(config)
    ids = np.random.default_rng(8).integers(0, config.vocab_size, (1, 9))
    mask = np.arange(9)[None] >= 4
    other = np.where(mask, ids, (ids + 1) % config.vocab_size)
    got = reference.model_logits(config, weights, other, mask)[:, 4:]
    np.testing.assert_array_equal(got, reference.model_logits(config, weights, ids, mask)[:, 4:])


def test_rope_depends_on_distance_only():
    rng = np.random.default_rng(9)
    q, k = rng.normal(size=(2, 1, 2, 1, 8))

    def score(i, j):
        at = np.array([[i]]), np.array([[j]])
        turned = reference.rotate(q, at[0], 1e4), reference.rotate(k, at[1], 1e4)
        return (turned[0] * turned[1]).sum()

    assert score(5, 2) == pytest.approx(score(1005, 1002), rel=1e-12)
    assert score(5, 2) != pytest.approx(score(5, 3), rel=1e-3)


def test_no_feedback_keeps_the_attention_output():
    config = CONFIGS["mha"]
    weights = layer_weights(config)
    x = np.random.default_rng(10).normal(size=(2, 5, config.hidden_size))
    closed = {
        **weights,
        "mixer.gamma_ctx.weight": np.zeros((1, config.hidden_size)),
        "mixer.gamma_bias": np.array(0.0),
    }
    want = reference.layer_forward(config, closed, x)
    feedback = ("mixer.proj_fb", "mixer.gamma")
    plain = {name: value for name, value in weights.items() if not name.startswith(feedback)}
    np.testing.assert_allclose(reference.layer_forward(config, plain, x), want, atol=1e-14)
