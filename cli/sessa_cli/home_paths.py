"""The home folder in paths that the shell has left as they are, such as --out=~/runs."""

from __future__ import annotations

import os
from collections.abc import Sequence

# Options whose value is a text, never a path.
TEXT_OPTIONS = ("--prompt", "--system")


def expand_home(arguments: Sequence[str]) -> list[str]:
    """The arguments with a `~` at the start of a path replaced by the home folder."""
    before = ("", *arguments)
    return [_expand(text, after) for text, after in zip(arguments, before, strict=False)]


def _expand(argument: str, previous: str) -> str:
    if previous in TEXT_OPTIONS:
        return argument
    name, equals, value = argument.partition("=")
    if equals and name.startswith("--") and name not in TEXT_OPTIONS:
        return name + equals + os.path.expanduser(value)
    return os.path.expanduser(argument)
