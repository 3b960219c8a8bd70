"""The public API as text, one line a name.

python tests/support/public_api.py > tests/public_api.txt
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    root = Path(__file__).parents[2]
    sys.path[:0] = [str(root), str(root / "export")]

PACKAGES = ("sessa_common", "sessa_torch", "sessa_mlx", "sessa_export")


def describe_package(package: str) -> Iterator[str]:
    """Yield a line for every public name and for every method of a public class."""
    module = importlib.import_module(package)
    for name in sorted(module.__all__):
        value = getattr(module, name)
        home = getattr(value, "__module__", package)
        if home.split(".")[0] != package and package != "sessa_common":
            yield f"{package}.{name} = {home}.{name}"
        elif inspect.isclass(value):
            yield f"{package}.{name}{_arguments(value)}"
            yield from _methods(f"{package}.{name}", value)
        else:
            yield f"{package}.{name}{_arguments(value) if callable(value) else ''}"


def _methods(where: str, cls: type) -> Iterator[str]:
    for name, value in sorted(vars(cls).items()):
        call = name in ("__call__", "forward")
        if isinstance(value, property):
            yield f"{where}.{name}"
        elif call or (not name.startswith("_") and callable(getattr(cls, name))):
            # The name of a module's call differs between the frameworks.
            shown = "__call__" if call else name
            yield f"{where}.{shown}{_arguments(getattr(cls, name))}"


def _arguments(value: Any) -> str:
    try:
        signature = inspect.signature(value)
    except ValueError:
        return "(...)"
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))


if __name__ == "__main__":
    for package in PACKAGES:
        print("\n".join(describe_package(package)))
