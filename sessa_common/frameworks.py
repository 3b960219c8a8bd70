"""The two frameworks by name: which one is installed, which one to use, and its modules.

`sessa_common` never imports a framework for itself. `framework` imports one only when a caller has
named it.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
from types import ModuleType

from sessa_common.errors import SessaError, expect
from sessa_common.extras import install

BACKENDS = ("auto", "mlx", "torch")


def is_installed(name: str) -> bool:
    """Return True when a package can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None


def choose_backend(name: str | None) -> str:
    """Resolve None and "auto": MLX on Apple silicon, else PyTorch, else the one installed."""
    name = name or "auto"
    expect(name in BACKENDS, "backend", name, f"one of {', '.join(BACKENDS)}")
    if name == "auto":
        apple = sys.platform == "darwin" and platform.machine() == "arm64"
        order = ("mlx", "torch") if apple else ("torch", "mlx")
        name = next((backend for backend in order if is_installed(backend)), "")
        if not name:
            raise SessaError(f"neither mlx nor torch is installed; {install('torch')} or [mlx]")
    if not is_installed(name):
        raise SessaError(f"backend {name} is not installed; {install(name)}")
    return name


def framework(backend: str, module: str) -> ModuleType:
    """Import a module of one of the twins: ("torch", "training") gives sessa_torch.training."""
    return importlib.import_module(f"sessa_{backend}.{module}")
