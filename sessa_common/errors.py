"""The error that the command line shows as one line and exit code 2."""


class SessaError(ValueError):
    """What the user gave cannot be used; the message says what was expected and what to do."""
