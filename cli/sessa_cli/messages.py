"""Errors of the library as a person at the command line reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# A field or an argument in a message of the library.
NAME = re.compile(r"`([a-z][a-z0-9_]*)`")


def name_options(message: str, options: Mapping[str, str]) -> str:
    """Replace every `field` that is an option of the command by that option, as in --batch-size.

    `options` are the options by field. Other names stay as they are, without the backticks.
    """
    return NAME.sub(lambda found: options.get(found[1], found[1]), message)


def options_of(command: Any) -> dict[str, str]:
    """The options of a command by the field that each sets; --rope/--no-rope for a switch."""
    found = (p for p in command.params if p.param_type_name == "option")
    return {p.name: "/".join([p.opts[0], *p.secondary_opts[:1]]) for p in found}
