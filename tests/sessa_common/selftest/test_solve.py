"""The check of the solve passes right paths and notices wrong ones."""

from __future__ import annotations

from unittest import mock

import pytest
from support.frameworks import FRAMEWORKS

from sessa_common.selftest import solve
from sessa_common.selftest.rows import OK, SKIPPED, TF32, WRONG, judge
from sessa_common.selftest.solve import LIMITS, TF32_LIMIT, Size, check_solve

SMALL = (Size(2, 20, 12, 8, P=3, masked=True), Size(1, 1, 12, 8, P=5))

frameworks = pytest.mark.parametrize("twin", FRAMEWORKS, ids=lambda twin: twin.name)


@pytest.fixture(autouse=True)
def small_sizes():
    with mock.patch.object(solve, "CHECKED", SMALL):
        yield


@frameworks
def test_every_path_is_right(twin) -> None:
    rows = list(check_solve(twin))
    judged = [row for row in rows if row.verdict != SKIPPED]
    assert {row.verdict for row in judged} == {OK}
    assert {row.check for row in rows} == {
        f"solve, {path}" for path in ("naive", "blocked", "kernel")
    }
    assert {row.precision for row in judged} == set(LIMITS)


@frameworks
def test_a_wrong_path_is_noticed(twin) -> None:
    right = twin.solve

    def wrong(*arrays, **options):
        return right(*arrays, **options) * (1.1 if options["backend"] == "blocked" else 1)

    with mock.patch.object(twin, "solve", wrong):
        verdicts = {(row.check, row.verdict) for row in check_solve(twin)}
    assert {("solve, blocked", WRONG), ("solve, naive", OK)} <= verdicts


def test_products_of_11_bits_are_named() -> None:
    assert judge(3e-4, LIMITS["float32"], TF32_LIMIT) == TF32
    assert judge(3e-3, LIMITS["float32"], TF32_LIMIT) == WRONG
    assert judge(float("nan"), LIMITS["bfloat16"]) == WRONG
