"""Helpers that several commands use: the console, JSON for scripts, exit codes, a stopwatch."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from typing import Any

from rich.console import Console
from rich.text import Text

from sessa_cli.terminal import printable

# Exit codes: runs of a comparison failed; bad input; a loss that is not finite; Ctrl-C.
FAILED, BAD_INPUT, DIVERGED, INTERRUPTED = 1, 2, 3, 130


def given_fields(params: dict[str, Any], *classes: type) -> dict[str, Any]:
    """The command's options that were given and that are fields of one of the classes."""
    names = {field.name for cls in classes for field in dataclasses.fields(cls)}
    given = {name: value for name, value in params.items() if name in names}
    return {name: value for name, value in given.items() if value not in (None, [], ())}


class PlainConsole(Console):
    """A console that prints strings as they are, with control characters spelled out.

    Brackets in a file's name are no markup, colons no pictures, escape sequences no commands.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a string, also one in a cell of a table."""
        return super().render_str(printable(text), **options)


class Stopwatch:
    """Measures the seconds since it was made."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds until now."""
        return time.perf_counter() - self.began


def make_console(json_output: bool = False) -> Console:
    """The console for people: stdout, or stderr when stdout carries JSON."""
    return PlainConsole(stderr=json_output, markup=False, emoji=False)


def say(console: Console, text: str) -> None:
    """Print a line as it is: not wrapped, not coloured, nothing in it read as markup."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on stdout; a number that is not finite becomes null.

    Where stdout cannot carry every character, JSON's own escapes are used.
    """
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(_finite(value), ensure_ascii=not unicode, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
