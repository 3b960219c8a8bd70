"""One result of a check, and the rule that judges it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sessa_common.selftest.twin import Twin

# Verdicts. Products of float32 numbers whose operands are rounded to TF32 are no error of ours.
OK, TF32, WRONG, ERROR, SKIPPED = "ok", "11-bit products", "WRONG", "ERROR", "skipped"
FAILURES = (WRONG, ERROR)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One check: what was measured, what is allowed, and the verdict.

    `measured` is a relative error unless `detail` names another quantity. `detail` says where the
    worst error is, or why a check was skipped or ended by an exception.
    """

    framework: str
    device: str
    check: str
    precision: str
    measured: float | None = None
    allowed: float | None = None
    detail: str = ""
    verdict: str = OK


def judge(measured: float, allowed: float, tf32_allowed: float | None = None) -> str:
    """OK within `allowed`, TF32 within `tf32_allowed` if there is one, else WRONG; NaN is WRONG."""
    if measured <= allowed:
        return OK
    return TF32 if tf32_allowed is not None and measured <= tf32_allowed else WRONG


def skipped(twin: Twin, check: str, precision: str, reason: str) -> Row:
    """The row of a check that cannot be made here."""
    return Row(
        framework=twin.name,
        device=twin.device_name,
        check=check,
        precision=precision,
        detail=reason,
        verdict=SKIPPED,
    )
