"""The native operator and the ONNX bodies with hidden keys, rows not finite and large gains."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from support.cuda_kernels import solve_emulated
from support.edge_cases import (
    GAINS,
    HIDDEN,
    POISONS,
    SIZES,
    Arrays,
    Edges,
    Solve,
    check_causality,
    check_gain,
    check_hidden,
    rows_to_poison,
)
from support.operator_models import operator_model, session_of
from support.ort_op_cases import built_library, instruction_sets, use_instruction_set
from support.ort_op_cases import solve as solve_natively


def native(name: str) -> Solve:
    """The native operator with one instruction set of this processor."""
    library = built_library()
    if name not in instruction_sets(library):
        pytest.skip(f"this processor has no {name}")

    def solve(arrays: Arrays, ds: np.ndarray) -> Arrays:
        use_instruction_set(library, name)
        return {"s": solve_natively(library, arrays)}

    return solve


@cache
def body(large_block: int | None = None) -> Solve:
    """The body in standard operators; past and mask are filled in where a case has none."""
    session = session_of(operator_model(large_block=large_block))

    def solve(arrays: Arrays, ds: np.ndarray) -> Arrays:
        none = arrays["f"][:, :0]
        everything = np.ones(arrays["k"].shape[:2], bool)
        return {"s": session.run(None, {"past_s": none, "key_mask": everything, **arrays})[0]}

    return solve


def cuda(arrays: Arrays, ds: np.ndarray) -> Arrays:
    """The native operator's CUDA kernels, on the processor."""
    return {"s": solve_emulated(arrays)}


SETS = ["sse2", "avx2", "avx512", "neon"]
backends = pytest.mark.parametrize("backend", ["body", "body for a GPU", "cuda", *SETS])
poisons = pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)


def solver(backend: str) -> Solve:
    others = {"body": body, "body for a GPU": lambda: body(128), "cuda": lambda: cuda}
    return others[backend]() if backend in others else native(backend)


def tolerance_of(backend: str) -> float:
    """The body for a GPU repeats a solve that is not finite in smaller blocks."""
    return 1e-5 if backend == "body for a GPU" else 0.0


EMULATED = "the emulated kernels take seconds for each: one of each kind is enough"


@backends
@poisons
@pytest.mark.parametrize("case", [Edges(*size) for size in SIZES], ids=str)
@pytest.mark.parametrize("what", HIDDEN)
def test_what_is_hidden_is_not_felt(backend, case, what, poison):
    if backend == "cuda" and not np.isnan(poison):
        pytest.skip(EMULATED)
    check_hidden(solver(backend), case, what, poison, tolerance_of(backend))


@backends
@pytest.mark.parametrize("poison", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("T, P", [(1, 5), (5, 0), (66, 3), (258, 0)])
@pytest.mark.parametrize("what", ["f", "q", "k", "gamma"])
def test_no_row_changes_the_rows_before_it(backend, what, T, P, poison):
    if backend == "cuda" and (T > 66 or (T > 5 and not np.isposinf(poison))):
        pytest.skip(EMULATED)
    for row in rows_to_poison(T):
        check_causality(solver(backend), Edges(T, P), what, row, poison, tolerance_of(backend))


@backends
def test_any_bits_of_nan_stay_nan(backend):
    """Arithmetic on the bits of a number must not make a finite one of NaN."""
    poison = np.array([0x7FFFFFFF], np.uint32).view(np.float32)[0]
    for T in (5, 66):
        check_causality(solver(backend), Edges(T, 3), "q", 2, poison, tolerance_of(backend))


@backends
@pytest.mark.parametrize("gain", GAINS)
def test_gains_of_any_size(backend, gain):
    check_gain(solver(backend), gain, 1e-5)
