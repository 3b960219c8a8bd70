"""Mamba-2: the chunked form against the plain recurrence, the whole model against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.frameworks import FRAMEWORKS, TORCH
from support.golden_cases import gradient_errors, relative_error

import sessa_mlx.mamba2
import sessa_torch.mamba2
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.config import SessaConfig
from sessa_common.reference import model as reference

MODULES = {"torch": sessa_torch.mamba2, "mlx": sessa_mlx.mamba2}
CASES = [
    pytest.param(framework, dtype, limit, id=f"{framework.name}-{dtype}")
    for framework, dtype, limit in (
        (FRAMEWORKS[0], "float64", 1e-10),
        (FRAMEWORKS[0], "float32", 1e-4),
        (FRAMEWORKS[1], "float32", 1e-4),
    )
]
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 130, 200]
B, H, P, N = 2, 3, 5, 7


def scan_inputs(T: int, past: bool, longest: float = 0.5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(T)
    inputs = {
        "x": rng.normal(size=(B, T, H, P)),
        "dt": longest * rng.uniform(size=(B, T, H)) ** 3,
        "A": -np.array([0.02, 1.0, 16.0]),
        "b": rng.normal(size=(B, T, N)),
        "c": rng.normal(size=(B, T, N)),
    }
    return inputs | ({"state": rng.normal(size=(B, H, P, N))} if past else {})


def recurrence(x, dt, A, b, c, state=None, document_starts=None):
    """The definition, row by row, in PyTorch so that autograd judges the gradients."""
    assert document_starts is None
    h, rows = 0.0 if state is None else state, []
    for t in range(x.shape[1]):
        added = torch.einsum("bh,bhp,bn->bhpn", dt[:, t], x[:, t], b[:, t])
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + added
        rows.append(torch.einsum("bhpn,bn->bhp", h, c[:, t]))
    return torch.stack(rows, 1), h


def compare(framework, dtype, limit, scan, inputs):
    """Outputs, last state and the gradient of every input of `scan` equal the recurrence's."""
    exact = {name: torch.tensor(value) for name, value in inputs.items()}
    want = [value.numpy() for value in recurrence(**exact)]
    leaves = {name: framework.array(value, dtype) for name, value in inputs.items()}
    for got, value in zip(scan(**leaves), want, strict=True):
        assert relative_error(framework.numpy(got), value) <= limit
    upstream = [np.random.default_rng(i).normal(size=value.shape) for i, value in enumerate(want)]

    def loss(scan, framework, dtype):
        weights = [framework.array(value, dtype) for value in upstream]
        return lambda **a: sum((y * w).sum() for y, w in zip(scan(**a), weights, strict=True))

    wanted = TORCH.gradients(loss(recurrence, TORCH, "float64"), inputs, "float64")
    got = framework.gradients(loss(scan, framework, dtype), inputs, dtype)
    assert max(gradient_errors(got, wanted).values()) <= limit


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("past", [False, True], ids=["start", "past"])
@pytest.mark.parametrize(("framework", "dtype", "limit"), CASES)
def test_chunks_equal_the_recurrence(framework, dtype, limit, past, T):
    compare(framework, dtype, limit, MODULES[framework.name].ssd_chunked, scan_inputs(T, past))


@pytest.mark.parametrize(("framework", "dtype", "limit"), CASES)
def test_a_step_is_one_row_of_the_recurrence(framework, dtype, limit):
    compare(framework, dtype, limit, MODULES[framework.name].ssd_step, scan_inputs(1, True))


@pytest.mark.parametrize("longest", [1e4, 1e30])
@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda x: x.name)
def test_huge_time_steps_give_no_nan(framework, longest):
    """Logs of decays to -1e31: nothing overflows, and short steps after a long one still count."""
    inputs = scan_inputs(130, True, longest)
    leaves = {name: framework.array(value, "float32") for name, value in inputs.items()}
    scan = MODULES[framework.name].ssd_chunked
    y, state = (framework.numpy(value) for value in scan(**leaves))
    want, last = recurrence(**{name: torch.tensor(value) for name, value in inputs.items()})
    assert relative_error(y, want.numpy()) <= 1e-3 and relative_error(state, last.numpy()) <= 1e-3
    grads = framework.gradients(lambda **a: (scan(**a)[0] / longest).sum(), inputs, "float32")
    assert all(np.isfinite(value).all() for value in grads.values())


def test_autocast_keeps_decays_and_states_in_float32():
    inputs = scan_inputs(1000, True, 0.1)
    want, last = recurrence(**{name: torch.tensor(value) for name, value in inputs.items()})
    low = {name: torch.tensor(value).float() for name, value in inputs.items()}
    low |= {name: low[name].bfloat16() for name in "xbc"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = sessa_torch.mamba2.ssd_chunked(**low)
    assert y.dtype == state.dtype == torch.float32
    # A running sum of 1000 terms in bfloat16 would be wrong by more than its own size.
    assert relative_error(y.numpy(), want.numpy()) <= 0.02
    assert relative_error(state.numpy(), last.numpy()) <= 0.02


def small(**changes) -> SessaConfig:
    shape = {"vocab_size": 50, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
    mamba = {"layer_kinds": "mamba2", "mamba_d_state": 10, "mamba_d_head": 6}
    return SessaConfig(**{**shape, **mamba, **changes})


def lively(config: SessaConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        name: (w + 0.2 * rng.normal(size=w.shape)).astype(np.float32)
        for name, w in initial_weights(config, 0).items()
    }


def transformers_model(config: SessaConfig, weights: dict[str, np.ndarray]):
    """`transformers.Mamba2ForCausalLM` in float64 with the same weights, and its names for ours."""
    import transformers  # takes seconds

    inner = config.mamba_expand * config.hidden_size
    theirs = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            n_groups=1,
            num_hidden_layers=config.num_hidden_layers,
            expand=config.mamba_expand,
            state_size=config.mamba_d_state,
            head_dim=config.mamba_d_head,
            chunk_size=16,
            num_heads=inner // config.mamba_d_head,
            conv_kernel=config.mamba_d_conv,
            layer_norm_epsilon=config.layer_norm_eps,
            tie_word_embeddings=True,
            rms_norm=True,
        )
    ).double()
    spelling = {
        name: name.replace("model.embed_tokens", "backbone.embeddings")
        .replace("model.layers", "backbone.layers")
        .replace("model.norm", "backbone.norm_f")
        .replace(".ln.", ".norm.")
        for name in weights
    }
    values = {spelling[name]: torch.tensor(w).double() for name, w in weights.items()}
    lost = theirs.load_state_dict(values, strict=False)
    assert not lost.unexpected_keys and set(lost.missing_keys) <= {"lm_head.weight"}
    return theirs, spelling


@pytest.mark.parametrize("T", [1, 5, 64, 83])
def test_whole_model_is_that_of_transformers(T):
    config = small(mamba_d_conv=3, layer_norm_eps=1e-4)
    weights, ids = lively(config), np.random.default_rng(T).integers(0, 50, (2, T))
    theirs, spelling = transformers_model(config, weights)
    dlogits = np.random.default_rng(9).normal(size=(2, T, 50))
    want = theirs(torch.tensor(ids)).logits
    want.backward(torch.tensor(dlogits))
    values = dict(theirs.named_parameters())
    grads = {name: values[spelling[name]].grad.numpy() for name in weights}
    assert relative_error(reference.model_logits(config, weights, ids), want.detach()) <= 1e-5
    for framework, dtype, limit in (case.values for case in CASES):
        model = framework.checkpoint.build_model(config, weights, dtype=dtype)
        logits = framework.numpy(model(framework.array(ids)))
        # transformers computes parts of its norm and its scan in float32, whatever the model is.
        assert relative_error(logits, want.detach().numpy()) <= max(limit, 1e-5)
        got = framework.model_gradients(model, ids, np.ones((2, T), bool), dlogits)
        errors = gradient_errors({k: v.astype(np.float64) for k, v in got.items()}, grads)
        assert max(errors.values()) <= max(limit, 1e-4), errors


def test_autograd_of_the_whole_model_equals_that_of_the_recurrence(monkeypatch):
    config = small(layer_kinds=("mamba2", "transformer", "mamba2"), num_hidden_layers=3)
    weights, ids = lively(config), np.random.default_rng(2).integers(0, 50, (B, 70))
    mask = np.arange(70) >= np.array([[0], [6]])
    dlogits = np.random.default_rng(3).normal(size=(B, 70, 50)) * mask[..., None]
    build = TORCH.checkpoint.build_model

    def gradients():
        return TORCH.model_gradients(build(config, weights, dtype="float64"), ids, mask, dlogits)

    got = gradients()
    monkeypatch.setattr(sessa_torch.mamba2, "ssd_chunked", recurrence)
    assert max(gradient_errors(got, gradients()).values()) <= 1e-10


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_model_in_each_dtype_equals_the_reference(dtype):
    config = small()
    weights, ids = lively(config), np.random.default_rng(2).integers(0, 50, (2, 83))
    want = reference.model_logits(config, weights, ids)
    model = TORCH.checkpoint.build_model(config, weights, dtype=dtype)
    limit = 1e-10 if dtype == "float64" else 1e-4
    assert relative_error(TORCH.numpy(model(torch.tensor(ids)).detach()), want) <= limit
