"""What the commands share: a framework's choice, the console, JSON for scripts, exit codes."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import math
import platform
import sys
from types import ModuleType
from typing import Any

from rich.console import Console

from sessa_common.errors import SessaError

BACKENDS = ("auto", "mlx", "torch")
# Exit codes: runs of a comparison failed; bad input; a loss that is not finite; Ctrl-C.
FAILED, BAD_INPUT, DIVERGED, INTERRUPTED = 1, 2, 3, 130


def is_installed(name: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None


def choose_backend(name: str | None) -> str:
    """Resolve None and "auto": MLX on Apple silicon, else PyTorch, else what is installed."""
    name = name or "auto"
    if name not in BACKENDS:
        raise SessaError(f"backend is {name!r}, expected one of {', '.join(BACKENDS)}")
    if name == "auto":
        apple = sys.platform == "darwin" and platform.machine() == "arm64"
        order = ("mlx", "torch") if apple else ("torch", "mlx")
        name = next((backend for backend in order if is_installed(backend)), "")
        if not name:
            raise SessaError("neither mlx nor torch is installed; pip install one of them")
    if not is_installed(name):
        raise SessaError(f"backend {name} is not installed; pip install {name}")
    return name


def framework(backend: str, module: str) -> ModuleType:
    """Import a module of one of the twins: ("torch", "train") gives sessa_torch.training."""
    return importlib.import_module(f"sessa_{backend}.{module}")


def given_fields(params: dict[str, Any], cls: type) -> dict[str, Any]:
    """The command's options that were given and that are fields of a configuration class."""
    names = {field.name for field in dataclasses.fields(cls)}
    given = {name: params[name] for name in names & params.keys()}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return {name: value for name, value in given.items() if value not in (None, ())}


def make_console(json_output: bool = False) -> Console:
    """The console for people: stdout, or stderr when stdout carries JSON.

    Text is printed as it is: brackets in a file's name are no markup, colons no pictures.
    """
    return Console(stderr=json_output, markup=False, emoji=False)


def say(console: Console, text: str) -> None:
    """Print a line as it is: not wrapped, not coloured, nothing in it read as markup."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on stdout; a number that JSON has no word for becomes null."""
    print(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
