"""The two frameworks behind one interface: arrays, gradients, the solve, memory, versions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from sessa_common.frameworks import choose_backend, framework, is_installed

NAMES = ("torch", "mlx")


@dataclass(frozen=True)
class MemoryUse:
    """Bytes: the most that were in use, and those that the framework holds unused for later."""

    peak: int
    pool: int


class Twin(Protocol):
    """A framework with a device; arrays are its own, and `solve` is its `feedback_solve`.

    `Twin` of sessa_torch.selftest and sessa_mlx.selftest are the two.
    """

    name: str
    device: str  # what the framework calls it: "cpu", "cuda", "mps" or "gpu"
    device_name: str
    solve: Callable[..., Any]

    def facts(self) -> Mapping[str, str]:
        """Return versions, the chip and settings that change results, such as TF32."""

    def use_device(self) -> None:
        """Make the device the default one again, after something ran on another."""

    def array(self, value: np.ndarray, dtype: str | None = None) -> Any:
        """Return an array on the device, in the dtype of that name unless it is a mask."""

    def numpy(self, value: Any) -> np.ndarray:
        """Return an array as NumPy, bfloat16 included."""

    def vjp(self, run: Callable[..., Any], arrays: Sequence[Any], upstream: Any) -> list[Any]:
        """Return run(*arrays) and the gradient of each array for the output's gradient."""

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        """Return the framework's own attention (B, heads, T, width), causal if q is not shorter."""

    def wait(self, results: Any) -> None:
        """Wait until results are computed."""

    def forget_memory(self) -> None:
        """Free the pool and begin a new measurement of the peak."""

    def memory(self) -> MemoryUse | None:
        """Return the memory use since `forget_memory`; None where it is not counted."""


def open_twins(backend: str = "auto", device: str | None = None) -> list[Twin]:
    """The framework of that name, or all that are installed. Raises SessaError."""
    chosen = choose_backend(backend)  # Raises SessaError when no framework is installed.
    names = [chosen] if backend != "auto" else [name for name in NAMES if is_installed(name)]
    return [framework(name, "selftest").Twin(device) for name in names]
