"""All checks of the present machine, one after the other."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import replace

from sessa_common.selftest import models, solve
from sessa_common.selftest.rows import ERROR, OK, TF32, WRONG, Row
from sessa_common.selftest.twin import Twin

PRODUCTS = models.PRODUCTS
# Each check with the name that its row has when an exception ends it.
CHECKS: dict[str, Callable[[Twin], Iterator[Row]]] = {
    PRODUCTS: models.check_products,
    "solve": solve.check_solve,
    "training step": models.check_training,
    "decoding": models.check_decoding,
    "4-bit model": models.check_4_bits,
    "memory": models.check_memory,
}


def machine_facts() -> dict[str, str]:
    """The system, its processor and the versions that do not belong to a framework."""
    mac = platform.mac_ver()[0]
    return {
        "system": f"macOS {mac}" if mac else f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cores": str(os.cpu_count()),
        "Python": platform.python_version(),
    }


def run_checks(twin: Twin) -> Iterator[Row]:
    """The rows of every check; an exception becomes a row, so that the other checks still run.

    Errors of the size of TF32's are accepted only where the framework's own products have them.
    """
    exact_products = False
    for name, check in CHECKS.items():
        twin.use_device()
        try:
            for row in check(twin):
                if row.check == PRODUCTS:
                    exact_products = row.verdict == OK
                yield replace(row, verdict=WRONG) if exact_products and row.verdict == TF32 else row
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            yield Row(
                framework=twin.name,
                device=twin.device_name,
                check=name,
                precision="",
                detail=f"{type(error).__name__}: {reason}",
                verdict=ERROR,
            )
