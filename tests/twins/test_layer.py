"""Both frameworks against the golden runs of the author's released layer."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch
from support.frameworks import FRAMEWORKS, TORCH
from support.golden_cases import NAMES, golden_case, gradient_errors, relative_error

from sessa_common.config import SessaConfig
from sessa_common.layer_kinds import KINDS
from sessa_common.reference import model as reference

# MLX computes exp and erf of float64 in float32 accuracy, so float64 proves no more there.
CASES = [
    pytest.param(framework, dtype, id=f"{framework.name}-{dtype}")
    for framework in FRAMEWORKS
    for dtype in ("float64", "float32")
]


def tolerance(framework: object, dtype: str, name: str) -> float:
    if dtype == "float64" and framework is TORCH:
        return 1e-10
    return 1e-3 if name == "strong_feedback" else 1e-4


def new_cache(framework):
    module = import_module(f"sessa_{framework.name}.cache")
    return module.SessaLayerCache()


def in_pieces(framework, module, rows, dtype, **options):
    """Half of the rows (B, T, D) at once, then one at a time, through one cache."""
    T, cache, pieces, start = rows.shape[1], new_cache(framework), [], 0
    for stop in [T // 2, *range(T // 2 + 1, T + 1)]:
        if stop > start:
            given = {name: mask[:, :stop] for name, mask in options.items()}
            piece = module(framework.array(rows[:, start:stop], dtype), cache=cache, **given)
            pieces.append(framework.numpy(piece))
        start = stop
    return np.concatenate(pieces, 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("framework", "dtype"), CASES)
def test_layer_alone_gives_the_golden_output_and_gradients(framework, dtype, name):
    case = golden_case(name)
    layer = framework.layer(case.config, case.params, dtype)
    got = framework.layer_gradients(layer, case.arrays["x"], case.arrays["dy"])
    limit = tolerance(framework, dtype, name)
    assert relative_error(got.pop("y"), case.arrays["y"]) <= limit
    assert relative_error(got.pop("dx"), case.arrays["dx"]) <= limit
    # Gradients that are zero in exact arithmetic hold only the rounding of their terms.
    got = {key: value.astype(np.float64) for key, value in got.items()}
    errors = gradient_errors(got, case.grads)
    assert max(errors.values()) <= limit, errors


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("framework", "dtype"), CASES)
def test_layer_alone_decodes_what_the_release_decodes(framework, dtype, name):
    case = golden_case(name)
    layer = framework.layer(case.config, case.params, dtype)
    with torch.no_grad():
        got = in_pieces(framework, layer, case.arrays["x"], dtype)
    assert relative_error(got, case.arrays["y_decode"]) <= tolerance(framework, dtype, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("framework", "dtype"), CASES)
def test_mixer_alone_gives_the_golden_states(framework, dtype, name):
    case = golden_case(name)
    mixer = framework.layer(case.config, case.params, dtype).mixer
    rows, limit = case.arrays["mixer_in"], tolerance(framework, dtype, name)
    with torch.no_grad():
        whole = framework.numpy(mixer(framework.array(rows, dtype)))
        pieces = in_pieces(framework, mixer, rows, dtype)
    assert relative_error(whole, case.arrays["mixer_out"]) <= limit
    assert relative_error(pieces, case.arrays["mixer_out"]) <= limit


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.attends])
@pytest.mark.parametrize(("framework", "dtype"), CASES)
def test_every_layer_alone_counts_positions_by_the_mask(framework, dtype, kind):
    config = SessaConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, layer_kinds=kind
    )
    rng = np.random.default_rng(0)
    params = {name: rng.normal(0, 0.3, s) for name, s in KINDS[kind].shapes(config).items()}
    x = rng.normal(size=(2, 11, 24))
    mask = np.arange(11) >= np.array([[0], [4]])
    want = reference.layer_forward(config, params, x[1:, 4:])
    layer = framework.layer(config, params, dtype)
    with torch.no_grad():
        whole = layer(framework.array(x, dtype), key_mask=framework.array(mask))
        pieces = in_pieces(framework, layer, x, dtype, key_mask=framework.array(mask))
    limit = tolerance(framework, dtype, "")
    assert relative_error(framework.numpy(whole)[1:, 4:], want) <= limit
    assert relative_error(pieces[1:, 4:], want) <= limit


def pytorchs_own_block(config):
    """torch.nn's pre-norm block, and its parameters under our names (q, k and v are one there)."""
    D = config.hidden_size
    block = torch.nn.TransformerEncoderLayer(
        D,
        config.num_attention_heads,
        config.intermediate_size,
        0.0,
        "gelu",
        config.layer_norm_eps,
        batch_first=True,
        norm_first=True,
        dtype=torch.float64,
    )
    names = {
        "norm1": "ln",
        "norm2": "ln_mlp",
        "self_attn.out_proj": "mixer.out_proj",
        "linear1": "mlp.up_proj",
        "linear2": "mlp.down_proj",
    }

    def ours(values):
        found = {}
        for kind in ("weight", "bias"):
            parts = np.split(values[f"self_attn.in_proj_{kind}"].numpy(), 3)
            for name, part in zip("qkv", parts, strict=True):
                found[f"mixer.{name}_proj.{kind}"] = part
            for theirs, name in names.items():
                found[f"{name}.{kind}"] = values[f"{theirs}.{kind}"].numpy()
        return found

    return block, ours


@pytest.mark.parametrize(("framework", "dtype"), CASES)
def test_standard_block_is_pytorchs_own(framework, dtype):
    config = SessaConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=40,
        use_forward_rope=False,
        layer_kinds="transformer",
        layer_norm_eps=1e-4,
    )
    torch.manual_seed(0)
    block, ours = pytorchs_own_block(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(2, 17, 24, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    future = torch.ones(17, 17, dtype=torch.bool).triu(1)
    y = block(x, src_mask=future, is_causal=True)
    y.backward(dy)
    want = ours({name: p.grad for name, p in block.named_parameters()})
    params = ours({name: p.detach() for name, p in block.named_parameters()})
    rows, upstream = x.detach().numpy(), dy.numpy()
    limit = tolerance(framework, dtype, "")
    layer = framework.layer(config, params, dtype)
    got = framework.layer_gradients(layer, rows, upstream)
    assert relative_error(got.pop("y"), y.detach().numpy()) <= limit
    assert relative_error(got.pop("dx"), x.grad.numpy()) <= limit
    errors = gradient_errors({k: v.astype(np.float64) for k, v in got.items()}, want)
    assert max(errors.values()) <= limit, errors
    dx, grads = reference.layer_backward(config, params, rows, upstream)
    assert (
        max(gradient_errors({**grads, "dx": dx}, {**want, "dx": x.grad.numpy()}).values()) < 1e-10
    )
