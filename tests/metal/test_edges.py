"""The Metal kernels with hidden keys, rows that are not finite and large gains."""

from __future__ import annotations

import numpy as np
import pytest
from support.edge_cases import (
    GAINS,
    HIDDEN,
    POISONS,
    Arrays,
    Edges,
    Solve,
    check_causality,
    check_gain,
    check_hidden,
    rows_to_poison,
)
from support.metal_cases import TWINS, solve_emulated

twins = pytest.mark.parametrize("twin", TWINS)
poisons = pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)


def solver(twin: str) -> Solve:
    """A twin's Metal path in blocks of 64 rows, on the emulator."""

    def solve(arrays: Arrays, ds: np.ndarray) -> Arrays:
        return solve_emulated(twin, arrays, ds)[0]

    return solve


@twins
@poisons
@pytest.mark.parametrize("case", [Edges(1, 40), Edges(17, 70), Edges(66, 3)], ids=str)
@pytest.mark.parametrize("what", HIDDEN)
def test_what_is_hidden_is_not_felt(twin, case, what, poison):
    check_hidden(solver(twin), case, what, poison)


@twins
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("T, P", [(1, 5), (66, 3)])
@pytest.mark.parametrize("what", ["f", "q", "k", "gamma"])
def test_no_row_changes_the_rows_before_it(twin, what, T, P, poison):
    for row in rows_to_poison(T):
        check_causality(solver(twin), Edges(T, P), what, row, poison)


@twins
@pytest.mark.parametrize("gain", GAINS)
def test_gains_of_any_size(twin, gain):
    check_gain(solver(twin), gain, 1e-5)
