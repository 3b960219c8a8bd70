"""Errors that the command line shows as one line, and the checks that raise them."""

from __future__ import annotations


class SessaError(ValueError):
    """Input that cannot be used: the message says what was given, what was expected, what to do.

    A message names a field or an argument in backticks, as in `batch_size`. The command line shows
    such a name as the option that sets it.
    """


class DivergedError(SessaError):
    """Training met a loss or a gradient that is not finite."""


def require(ok: bool, message: str) -> None:
    """Raise SessaError with this message unless `ok`."""
    if not ok:
        raise SessaError(message)


def expect(ok: bool, name: str, value: object, expected: str) -> None:
    """Raise SessaError "name is value, expected ..." unless `ok`."""
    require(ok, f"{name} is {value!r}, expected {expected}")


def is_count(value: object) -> bool:
    """Return True for a positive integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_text(text: str, where: str) -> str:
    """Return the text; SessaError when it holds half of a surrogate pair, which UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SessaError(
            f"{where}: character {error.start + 1} is half of a surrogate pair, which is not text"
        ) from None
    return text
