"""The solve that MLX takes on CUDA, run on the CPU in small block rows."""

from __future__ import annotations

from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from metal_emulator.mlx_side import to_mlx
from mlx.utils import tree_flatten
from support.edge_cases import (
    GAINS,
    HIDDEN,
    POISONS,
    Arrays,
    Edges,
    check_causality,
    check_gain,
    check_hidden,
    rows_to_poison,
)
from support.metal_cases import NAMES, Case, expected, from_mlx, inputs, plain, relative_error
from support.operands import draw_starts

import sessa_mlx.feedback as feedback
from sessa_common.config import SessaConfig
from sessa_common.reference.ops import feedback_solve, feedback_solve_backward
from sessa_mlx.checkpoint import new_model
from sessa_mlx.feedback import gpu, products

CASES = [
    Case(1, D=3, K=2),
    Case(1, B=2, P=70, masked=True),
    Case(2, D=3, K=2, P=1),
    Case(31),
    Case(33, P=40),
    Case(130, B=2, P=7, masked=True),
    Case(257, D=33, K=40),
    Case(63, gamma=0.999),
    Case(63, gamma=-0.5),
]


@pytest.fixture(autouse=True)
def small_block_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block rows of at most 16 rows in 8 sizes, so that short sequences have many."""
    monkeypatch.setattr(gpu, "_block_rows", lambda T: 16)
    monkeypatch.setattr(gpu, "LEAF", 8)


def solved(arrays: Arrays, ds: np.ndarray, **options: str) -> Arrays:
    """Output and gradients in float64."""
    given = {name: to_mlx(array) for name, array in arrays.items()}
    names = ("past_s", "key_mask", "document_starts")
    optional = {name: given[name] for name in names if name in given}
    required = [given[name] for name in ("f", "q", "k", "gamma")]
    s, sums = gpu.solve_forward(*required, **optional, **options)
    grads = gpu.solve_backward(to_mlx(ds), *required[1:], s, sums, **optional, **options)
    found = zip(NAMES, (s, *grads), strict=True)
    return {name: from_mlx(x) for name, x in found if x is not None}


def solve(case: Case, dtype: str, wide: tuple[str, ...] = (), **options: str) -> Arrays:
    arrays = dict(inputs(case, dtype))
    arrays |= {name: arrays[name].astype(np.float32) for name in wide if name in arrays}
    return solved(arrays, arrays.pop("ds"), **options)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_at_most_twice_the_error_of_plain_arithmetic(case: Case, dtype: str) -> None:
    found, exact, simple = solve(case, dtype), expected(case, dtype), plain(case, dtype)
    # Few numbers say little: their errors are judged together.
    names = [list(exact)] if case.T < 8 else [[name] for name in exact]
    for group in names:
        ours, theirs, wanted = ([x[name] for name in group] for x in (found, simple, exact))
        assert relative_error(ours, wanted) <= 2 * relative_error(theirs, wanted) + 1e-7, group


@pytest.mark.parametrize("block_rows", [1024, 256])
def test_whole_block_rows(monkeypatch: pytest.MonkeyPatch, block_rows: int) -> None:
    monkeypatch.setattr(gpu, "_block_rows", lambda T: block_rows)
    monkeypatch.setattr(gpu, "LEAF", 128)
    case = Case(600, D=9, K=7, P=3, masked=True)
    found, exact = solve(case, "float32"), expected(case, "float32")
    for name, wanted in exact.items():
        assert relative_error([found[name]], [wanted]) < 1e-6, name


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("P", [0, 5])
def test_without_gain_a_row_is_f_bit_for_bit(dtype: str, precision: str, P: int) -> None:
    case = Case(70, P=P, gamma=0.0)
    for wide in ((), ("f", "gamma", "ds", "past_s")):
        s = solve(case, dtype, wide, precision=precision)["s"]
        np.testing.assert_array_equal(s, inputs(case, dtype)["f"].astype(np.float64))


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("auto", 1e-5, 4e-3), ("float32", 0, 1e-6)]
)
def test_float32_states_with_keys_of_16_bits(precision: str, least: float, most: float) -> None:
    case = Case(70, B=2, P=5)
    found = solve(case, "bfloat16", ("f", "gamma", "ds", "past_s"), precision=precision)
    for name, wanted in expected(case, "bfloat16").items():
        limit = 4e-3 if name in ("dq", "dk") else most
        assert least <= relative_error([found[name]], [wanted]) < limit, name


@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)
@pytest.mark.parametrize("case", [Edges(1, 40), Edges(17, 70), Edges(66, 3)], ids=str)
@pytest.mark.parametrize("what", HIDDEN)
def test_what_is_hidden_is_not_felt(case: Edges, what: str, poison: float) -> None:
    check_hidden(solved, case, what, poison)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("T, P", [(1, 5), (66, 3)])
@pytest.mark.parametrize("what", ["f", "q", "k", "gamma"])
def test_no_row_changes_the_rows_before_it(what: str, T: int, P: int, poison: float) -> None:
    for row in rows_to_poison(T):
        check_causality(solved, Edges(T, P), what, row, poison)


@pytest.mark.parametrize("gain", GAINS)
def test_gains_of_any_size(gain: float) -> None:
    check_gain(solved, gain, 1e-5)


def test_float32_does_not_use_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products whose operands are cut to 11 bits, as a GPU cuts them, keep float32 accuracy."""
    case = Case(70, D=30, K=20)
    exact = expected(case, "float32")

    def error() -> float:
        found = solve(case, "float32")
        return max(relative_error([found[name]], [exact[name]]) for name in exact)

    real, cut = mx.array.__matmul__, products.high_bits
    monkeypatch.setattr(mx.array, "__matmul__", lambda a, b: real(cut(a), cut(b)))
    assert error() > 1e-4
    monkeypatch.setattr(products, "operands_lose_bits", lambda: True)
    assert error() < 1e-6


def test_a_model_trains_in_one_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under mx.compile, mx.checkpoint and mx.grad the gradients are those of `blocked`."""
    config = SessaConfig(vocab_size=30, hidden_size=12, num_hidden_layers=2, num_attention_heads=2)
    model = new_model(config, seed=3)
    ids = mx.array(np.random.default_rng(0).integers(0, 30, (2, 40)))

    def loss(parameters: dict) -> mx.array:
        model.update(parameters)
        return mx.checkpoint(lambda ids: mx.logsumexp(model(ids), -1).mean())(ids)

    parameters = model.trainable_parameters()
    wanted = dict(tree_flatten(mx.grad(loss)(parameters)))
    mx.eval(wanted)
    monkeypatch.setattr(feedback, "_implementation", lambda *_: gpu)
    for step in (mx.grad(loss), mx.compile(mx.grad(loss))):
        found = dict(tree_flatten(step(parameters)))
        for name, gradient in wanted.items():
            assert relative_error([np.array(found[name])], [np.array(gradient)]) < 1e-5, name


def test_a_gpu_without_kernels_takes_it() -> None:
    arrays = [mx.zeros(shape) for shape in ((1, 3, 4), (1, 3, 2), (1, 3, 2), (1, 3))]
    assert feedback._implementation("blocked", *arrays[:2]) is not gpu
    with mock.patch.object(mx, "default_device", return_value=mock.Mock(type=mx.DeviceType.gpu)):
        assert feedback._implementation("auto", *arrays[:2]) is gpu


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_documents_read_each_other_nowhere(dtype: str) -> None:
    """As if every document were a sequence of its own."""
    case = Case(70, B=2)
    starts = draw_starts(1, 2, 70, 9)
    arrays = {**inputs(case, dtype), "document_starts": starts}
    found = solved(arrays, arrays.pop("ds"))
    exact = {n: a.astype(np.float64) for n, a in inputs(case, dtype).items()}
    ds = exact.pop("ds")
    results = [feedback_solve(**exact, document_starts=starts)]
    results += feedback_solve_backward(ds, **exact, document_starts=starts)[:4]
    limit = 1e-6 if dtype == "float32" else 2e-2
    for (name, got), want in zip(found.items(), results, strict=True):
        assert relative_error([got], [want]) < limit, name
