"""Both frameworks against the golden runs of the author's released layer."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from support.frameworks import FRAMEWORKS, Torch
from support.golden_cases import NAMES, golden_case, gradient_errors, relative_error

from sessa_common.config import SessaConfig
from sessa_common.reference import model as reference

# MLX computes exp and erf of float64 in float32 accuracy, so float64 proves no more there.
CASES = [
    pytest.param(framework, dtype, id=f"{framework.name}-{dtype}")
    for framework in FRAMEWORKS
    for dtype in ("float64", "float32")
]


def tolerance(framework: object, dtype: str, name: str) -> float:
    if dtype == "float64" and isinstance(framework, Torch):
        return 1e-10
    return 1e-3 if name == "strong_feedback" else 1e-4


def rope_tables(framework, config, start, stop, dtype):
    if not config.use_forward_rope:
        return None
    positions = framework.array(np.arange(start, stop)[None])
    module = torch if isinstance(framework, Torch) else mx
    attention = __import__(f"sessa_{framework.name}.attention", fromlist=["rope_tables"])
    return attention.rope_tables(
        positions, config.head_dim, config.rope_theta, getattr(module, dtype)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("framework", "dtype"), CASES)
def test_layer_gives_the_golden_output_and_gradients(framework, dtype, name):
    case = golden_case(name)
    layer = framework.layer(case.config, case.params, dtype)
    T = case.arrays["x"].shape[1]
    rope = rope_tables(framework, case.config, 0, T, dtype)
    got = framework.layer_gradients(layer, case.arrays["x"], case.arrays["dy"], rope)
    limit = tolerance(framework, dtype, name)
    assert relative_error(got.pop("y"), case.arrays["y"]) <= limit
    assert relative_error(got.pop("dx"), case.arrays["dx"]) <= limit
    # Gradients that are zero in exact arithmetic hold only the rounding of their terms.
    got = {key: value.astype(np.float64) for key, value in got.items()}
    errors = gradient_errors(got, case.grads)
    assert max(errors.values()) <= limit, errors


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("framework", "dtype"), CASES)
def test_layer_decodes_what_the_release_decodes(framework, dtype, name):
    case = golden_case(name)
    layer = framework.layer(case.config, case.params, dtype)
    x = case.arrays["x"]
    T = x.shape[1]
    cache = __import__(
        f"sessa_{framework.name}.cache", fromlist=["SessaLayerCache"]
    ).SessaLayerCache()
    pieces, start = [], 0
    with torch.no_grad():
        for stop in [T // 2, *range(T // 2 + 1, T + 1)]:
            if stop == start:
                continue
            rope = rope_tables(framework, case.config, start, stop, dtype)
            piece = layer(framework.array(x[:, start:stop], dtype), rope=rope, cache=cache)
            pieces.append(framework.numpy(piece))
            start = stop
    got = np.concatenate(pieces, 1)
    assert relative_error(got, case.arrays["y_decode"]) <= tolerance(framework, dtype, name)


def pytorchs_own_block(config):
    """torch.nn's pre-norm block, and its parameters under our names (q, k and v are one there)."""
    D = config.hidden_size
    block = torch.nn.TransformerEncoderLayer(
        D, config.num_attention_heads, config.intermediate_size, 0.0, "gelu",
        config.layer_norm_eps, batch_first=True, norm_first=True, dtype=torch.float64,
    )  # fmt: skip
    names = {
        "norm1": "ln", "norm2": "ln_mlp", "self_attn.out_proj": "mixer.out_proj",
        "linear1": "mlp.up_proj", "linear2": "mlp.down_proj",
    }  # fmt: skip

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
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=40,
        use_forward_rope=False, mixer="attention", layer_norm_eps=1e-4,
    )  # fmt: skip
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
    got = framework.layer_gradients(layer, rows, upstream, None)
    assert relative_error(got.pop("y"), y.detach().numpy()) <= limit
    assert relative_error(got.pop("dx"), x.grad.numpy()) <= limit
    errors = gradient_errors({k: v.astype(np.float64) for k, v in got.items()}, want)
    assert max(errors.values()) <= limit, errors
    dx, grads = reference.layer_backward(config, params, rows, upstream)
    assert (
        max(gradient_errors({**grads, "dx": dx}, {**want, "dx": x.grad.numpy()}).values()) < 1e-10
    )
