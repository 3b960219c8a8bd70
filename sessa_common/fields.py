"""Keyword arguments that are fields of configuration classes."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sessa_common.errors import SessaError

Config = TypeVar("Config")


def split_fields(given: Mapping[str, Any], *classes: type) -> list[dict[str, Any]]:
    """Sort keyword arguments by the dataclass that has a field of that name, one dict a class.

    Paths become texts, and a list or a single text becomes the tuple that a field expects. Raises
    SessaError for a name that no class knows, with the nearest known one.
    """
    types = [{field.name: str(field.type) for field in dataclasses.fields(cls)} for cls in classes]
    known = [name for names in types for name in names]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise SessaError(f"{name} is not a known field; {hint}")
    return [
        {name: _as_field(value, names[name]) for name, value in given.items() if name in names}
        for names in types
    ]


def _as_field(value: Any, kind: str) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(str(item) if isinstance(item, Path) else item for item in value)
    if isinstance(value, Path):
        value = str(value)
    is_list = kind.startswith(("tuple", "Sequence"))
    return (value,) if is_list and isinstance(value, str) else value


def read_fields(
    cls: type[Config], given: Mapping[str, Any], where: str, ignored: Collection[str] = ()
) -> Config:
    """Make a configuration from the keys of a file, which every error names with `where`.

    An unknown key is a SessaError, unless it is one of `ignored`.
    """
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(given) - names - set(ignored))
    if unknown:
        raise SessaError(
            f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(sorted(names))}"
        )
    try:
        return build(cls, {name: value for name, value in given.items() if name in names})
    except SessaError as error:
        raise SessaError(f"{where}: {error}") from error.__cause__


def build(cls: type[Config], fields: Mapping[str, Any]) -> Config:
    """Make a configuration; a value of the wrong type is a SessaError too."""
    try:
        return cls(**fields)
    except TypeError as error:
        raise SessaError(f"a value has the wrong type ({error})") from error
