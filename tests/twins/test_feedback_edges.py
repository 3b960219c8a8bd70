"""The feedback solve of both frameworks with hidden keys, rows not finite and large gains."""

from __future__ import annotations

import numpy as np
import pytest
from support.edge_cases import (
    GAINS,
    HIDDEN,
    POISONS,
    SIZES,
    Arrays,
    Edges,
    check_causality,
    check_gain,
    check_hidden,
    rows_to_poison,
)
from support.frameworks import FRAMEWORKS

import sessa_mlx.attention
import sessa_torch.attention
from sessa_torch.feedback import blocked

frameworks = pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda x: x.name)
backends = pytest.mark.parametrize("backend", ["naive", "blocked"])
poisons = pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)
sizes = pytest.mark.parametrize("case", [Edges(*size) for size in SIZES], ids=str)


def solver(framework, backend):
    """A backend of a framework as `edge_cases` calls it."""

    def solve(arrays: Arrays, ds: np.ndarray) -> Arrays:
        real = {name: x for name, x in arrays.items() if name != "key_mask"}
        mask, weight = framework.array(arrays.get("key_mask")), framework.array(ds)

        def run(**leaves):
            return framework.solve(**leaves, key_mask=mask, backend=backend)

        s = framework.numpy(run(**{n: framework.array(x) for n, x in real.items()}))

        def loss(**leaves):
            return (run(**leaves) * weight).sum()

        grads = framework.gradients(loss, real, "float32")
        return {"s": s, **{f"d{name}": grad for name, grad in grads.items()}}

    return solve


@frameworks
@backends
@poisons
@sizes
@pytest.mark.parametrize("what", HIDDEN)
def test_what_is_hidden_is_not_felt(framework, backend, case, what, poison):
    if backend == "naive" and case.T > 70:
        pytest.skip("one row at a time: slow, and without blocks")
    check_hidden(solver(framework, backend), case, what, poison)


@frameworks
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("T, P", [(5, 0), (66, 3), (258, 0)])
@pytest.mark.parametrize("what", ["f", "q", "k", "gamma"])
def test_no_row_changes_the_rows_before_it(framework, what, T, P, poison):
    for row in rows_to_poison(T):
        check_causality(forward(framework), Edges(T, P), what, row, poison)


def forward(framework):
    """The blocked path, forward only."""

    def solve(arrays: Arrays, ds: np.ndarray) -> Arrays:
        given = {name: framework.array(x) for name, x in arrays.items()}
        return {"s": framework.numpy(framework.solve(**given, backend="blocked"))}

    return solve


@frameworks
@backends
@pytest.mark.parametrize("gain", GAINS)
def test_gains_of_any_size(framework, backend, gain):
    check_gain(solver(framework, backend), gain, 1e-5)


@pytest.mark.parametrize("gain", GAINS)
def test_gains_of_any_size_without_a_triangular_solve(monkeypatch, gain):
    """Solve a block in the way that PyTorch uses on devices other than the CPU."""

    def by_inverse(N, rhs, *, transposed=False):
        X = blocked.unit_lower_inverse(N)
        return (X.mT if transposed else X) @ rhs

    monkeypatch.setattr(blocked, "_solve_block", by_inverse)
    check_gain(solver(FRAMEWORKS[0], "blocked"), gain, 1e-5)


def attend(framework, arrays: Arrays, dy: np.ndarray) -> Arrays:
    """Output of causal_attention on the visible rows and the gradients of q, k and v."""
    module = {"torch": sessa_torch.attention, "mlx": sessa_mlx.attention}[framework.name]
    mask, weight = framework.array(arrays["key_mask"]), framework.array(dy)
    real = {name: arrays[name] for name in "qkv"}

    def run(q, k, v):
        return module.causal_attention(q, k, v, mask)

    y = framework.numpy(run(**{n: framework.array(x) for n, x in real.items()}))
    grads = framework.gradients(lambda **x: (run(**x) * weight).sum(), real, "float32")
    return {"y": y, **grads}


@frameworks
@poisons
@pytest.mark.parametrize("what", "kv")
@pytest.mark.parametrize("T, P", [(1, 6), (9, 0), (40, 5)])
def test_hidden_keys_and_values_are_not_felt_by_attention(framework, T, P, what, poison):
    random = np.random.default_rng([T, P])
    shapes = {"q": (2, 4, T, 6), "k": (2, 2, P + T, 6), "v": (2, 2, P + T, 6)}
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["key_mask"] = random.random((2, P + T)) > 0.4
    arrays["key_mask"][:, 0], arrays["key_mask"][:, P + T // 2] = False, True
    hidden = np.broadcast_to(~arrays["key_mask"][:, None], (2, 2, P + T))
    # The loss reads visible rows only, as the losses of padded batches do.
    dy = random.normal(size=shapes["q"]).astype(np.float32)
    dy *= arrays["key_mask"][:, None, P:, None]
    found = []
    for value in (0, poison):
        arrays[what] = arrays[what].copy()
        arrays[what][hidden] = value
        found.append(attend(framework, arrays, dy))
    for name, value in found[0].items():
        np.testing.assert_array_equal(found[1][name], value, err_msg=name)
    assert not found[1]["k"][hidden].any() and not found[1]["v"][hidden].any()
