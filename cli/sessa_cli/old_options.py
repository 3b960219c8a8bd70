"""Old spellings of options, accepted for one release and not shown in any help text."""

from __future__ import annotations

from collections.abc import Sequence

RENAMED: dict[str, dict[str, str]] = {
    "train": {
        "--accumulation": "--gradient-accumulation-steps",
        "--clip-norm": "--max-grad-norm",
        "--window": "--sequence-length",
    },
    "eval": {"--window": "--sequence-length"},
    "compare": {"--mixers": "--models"},
}


def rename_options(arguments: Sequence[str]) -> list[str]:
    """The arguments of `sessa` with every old option of the command under its present name.

    `arguments` begin with the command. What follows a bare "--" is left alone.
    """
    renamed = RENAMED.get(arguments[0], {}) if arguments else {}
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return [_rename(text, renamed) for text in arguments[:end]] + list(arguments[end:])


def _rename(argument: str, renamed: dict[str, str]) -> str:
    name, equals, value = argument.partition("=")
    return renamed.get(name, name) + equals + value
