"""Both frameworks against the golden runs of the author's released layer."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from frameworks import FRAMEWORKS, Torch
from golden_cases import NAMES, golden_case, gradient_errors, relative_error

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
    cache = __import__(f"sessa_{framework.name}.cache", fromlist=["LayerCache"]).LayerCache()
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
