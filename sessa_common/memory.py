"""A check that a model fits the machine, made before any of it is."""

from __future__ import annotations

import os

from sessa_common.errors import SessaError


def require_memory(needed: int, purpose: str) -> None:
    """Raise SessaError when `needed` bytes for `purpose` are more than the machine's memory.

    Passes where the system does not tell its memory.
    """
    total = total_memory()
    if total is not None and needed > total:
        raise SessaError(
            f"{purpose} needs {needed / 2**30:,.1f} GiB, but this machine has "
            f"{total / 2**30:,.1f} GiB of memory"
        )


def total_memory() -> int | None:
    """Bytes of the machine's memory, None where the system does not tell them."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
