"""Feedback solves at their edges: poisoned hidden keys, rows that are not finite, large gains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from support.operands import Arrays, draw_operands

from sessa_common.reference.ops import feedback_solve, feedback_solve_backward

POISONS = {"nan": np.nan, "infinity": np.inf, "3e38": np.float32(3e38)}
# Lengths and pasts around the edges of the blocks and tiles of every backend.
SIZES = [(1, 1), (1, 40), (7, 3), (8, 0), (17, 70), (65, 0), (66, 33), (130, 5), (258, 2)]
# What a hidden position can hold: its key, its state in the past, its right-hand side.
HIDDEN = ("k", "past_s", "f")
B, D, K = 2, 5, 3
NAMES = ("s", "df", "dq", "dk", "dgamma", "dpast_s")
GAINS = (1.0, 3.0, 10.0, -3.0, -10.0)

# A backend takes operands and the gradient of s. It returns s and the gradients, or s alone.
Solve = Callable[[Arrays, np.ndarray], Arrays]


@dataclass(frozen=True)
class Edges:
    """One solve of T rows behind P, in which some keys of the first sequence are hidden."""

    T: int
    P: int

    def __str__(self) -> str:
        return f"T{self.T}-P{self.P}"

    def operands(self) -> tuple[Arrays, np.ndarray]:
        """The operands in float32, and the gradient of s."""
        seed, S = [self.T, self.P], self.P + self.T
        arrays = draw_operands(seed, B=B, T=self.T, D=D, K=K, P=self.P)
        if not self.P:
            del arrays["past_s"]
        arrays["key_mask"] = np.ones((B, S), bool)
        arrays["key_mask"][0, self.hidden()] = False
        ds = np.random.default_rng([*seed, 1]).normal(size=(B, self.T, D))
        return arrays, ds.astype(np.float32)

    def hidden(self) -> list[int]:
        """Hidden keys: the first and the last, both sides of P, and those at edges of blocks."""
        S = self.P + self.T
        edges = {0, self.P - 1, self.P, S - 1}
        edges |= {x + self.P for x in (2, 15, 31, 32, 63, 64, 127, 128, 255, 256)}
        return sorted(x for x in edges if 0 <= x < S)


def check_hidden(
    solve: Solve, case: Edges, what: str, poison: float, tolerance: float = 0.0
) -> None:
    """Whatever hidden keys, past states or rows hold, no other number changes.

    A backend that computes in another way then may differ by `tolerance`. The gradients of hidden
    keys and states are 0.
    """
    arrays, ds = case.operands()
    hidden = ~arrays["key_mask"]
    where = {"k": hidden, "past_s": hidden[:, : case.P], "f": hidden[:, case.P :]}[what]
    if not where.any():
        pytest.skip(f"{what} has no hidden row here")
    clean, poisoned = dict(arrays), dict(arrays)
    for given, value in ((clean, 0), (poisoned, poison)):
        given[what] = arrays[what].copy()
        given[what][where] = value
    wanted, found = solve(clean, ds), solve(poisoned, ds)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        kept = ~where if (what, name) == ("f", "s") else slice(None)
        got, expected = found[name][kept], value[kept]
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance, err_msg=name)
        assert np.isfinite(value).all()
    if "dk" in found:
        assert not found["dk"][hidden].any()
    if "dpast_s" in found:
        assert not found["dpast_s"][hidden[:, : case.P]].any()


def check_causality(
    solve: Solve, case: Edges, what: str, row: int, poison: float, tolerance: float = 0.0
) -> None:
    """A number of row `row` that is not finite changes no row before it, and is felt from there on.

    A key is seen by the rows after its own. A backend that computes in another way then may differ
    by `tolerance`.
    """
    arrays, ds = case.operands()
    del arrays["key_mask"]
    wanted = solve(arrays, ds)["s"]
    arrays[what] = arrays[what].copy()
    at = row + case.P if what == "k" else row
    arrays[what][(0, at) if what == "gamma" else (0, at, 1)] = poison
    found = solve(arrays, ds)["s"]
    first = row + (what == "k")
    for got, expected in ((found[1], wanted[1]), (found[0, :first], wanted[0, :first])):
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)
    # Row 0 without a past sees no key: neither its query nor its gain takes part.
    takes_part = what in "fk" or row + case.P > 0
    if np.isnan(poison) and takes_part:
        columns = 1 if what == "f" else slice(None)
        assert not np.isfinite(found[0, first:, columns]).any()


def rows_to_poison(T: int) -> list[int]:
    """The first rows, the last one, and those at edges of blocks and tiles."""
    return sorted({x for x in (0, 1, 6, 31, 32, 63, 64, 256, T - 1) if 0 <= x < T})


def check_gain(solve: Solve, gain: float, limit: float, *, T: int = 40, P: int = 3) -> None:
    """s and the gradients with gains of size |gain| equal the float64 reference, row by row.

    The largest number up to a row is the scale of its error in s; a gain above 1 lets s grow.
    """
    arrays, ds = Edges(T, P).operands()
    arrays["key_mask"][:] = True
    arrays["q"][1] = 0  # uniform attention, where powers of N grow and cancel most
    arrays["gamma"][:] = gain * np.where(np.arange(B)[:, None], 1, np.sign(arrays["gamma"]))
    exact = {n: x if x.dtype == bool else x.astype(np.float64) for n, x in arrays.items()}
    s = feedback_solve(**exact)
    grads = feedback_solve_backward(ds.astype(np.float64), **exact)
    wanted = dict(zip(NAMES, (s, *grads), strict=True))
    found = solve(arrays, ds)
    grown = np.maximum.accumulate(np.abs(s).max(-1), axis=1)
    error = np.abs(found["s"] - s).max(-1) / grown
    assert error.max() <= limit, f"s: {error.max():.1e}"
    for name in found.keys() - {"s"}:
        error = np.abs(found[name] - wanted[name]).max() / np.abs(wanted[name]).max()
        assert error <= limit, f"{name}: {error:.1e}"
