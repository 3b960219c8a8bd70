"""The optional packages: how a message says what to install."""

from __future__ import annotations


def install(extra: str) -> str:
    """Return the command that installs an extra of this project."""
    return f"pip install 'sessa-toolchain[{extra}]'"
