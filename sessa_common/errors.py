"""The errors that the command line shows as one line."""


class SessaError(ValueError):
    """What the user gave cannot be used; the message says what was expected and what to do."""


class DivergedError(SessaError):
    """Training met a loss or a gradient that is not finite."""


def check_text(text: str, where: str) -> str:
    """The text; SessaError when it holds half of a surrogate pair, which no UTF-8 file can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SessaError(
            f"{where}: character {error.start + 1} is half of a surrogate pair, which is not text"
        ) from None
    return text
