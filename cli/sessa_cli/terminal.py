"""Standard input and output that no file, model or closed pipe can disturb."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from sessa_common.data.formats import decode
from sessa_common.errors import SessaError

# Control characters except tab and line feed: they begin the sequences that steer a terminal. The
# last ones change the direction of the text around them.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with control characters as escapes such as \\x1b, so that they do nothing."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def for_output(text: str) -> str:
    """Text of a model or a file for standard output: `printable` on a terminal, else unchanged."""
    return printable(text) if sys.stdout.isatty() else text


def read_standard_input() -> str:
    """Read standard input as UTF-8 text, whatever the locale; SessaError when it is not."""
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:
        raise SessaError("standard input is closed, but '-' reads text from it")
    return decode(stream.read(), "standard input")


class SafeOutput:
    """A text stream that never raises: what cannot be written is lost, and `lost` says why.

    A run must not end because the reader of its progress went away or the disk of its log is full.
    Characters that the encoding of the stream lacks are written as escapes.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self.lost: str | None = None
        with contextlib.suppress(AttributeError, OSError, ValueError):
            self._stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, or lose it."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush what was written, or lose it."""
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            if getattr(error, "errno", None) != errno.EPIPE:
                self.lost = self.lost or getattr(error, "strerror", None) or str(error)
            self._discard()

    def _discard(self) -> None:
        """Send everything that follows to nowhere, also what the stream still holds back."""
        with contextlib.suppress(AttributeError, OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def safe_output() -> Iterator[SafeOutput]:
    """Make standard output and error safe inside the block; yields the output."""
    _occupy_closed_files()
    out, err = SafeOutput(sys.stdout), SafeOutput(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):  # type: ignore[type-var]
        try:
            yield out
        finally:
            out.flush()
            err.flush()


def _occupy_closed_files() -> None:
    # A file that is opened while standard output is closed would get its number, and everything
    # that is printed.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
