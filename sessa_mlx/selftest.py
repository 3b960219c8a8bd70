"""MLX for `sessa_common.selftest`: arrays, gradients, attention, memory, versions."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np

from sessa_common.selftest.twin import MemoryUse
from sessa_mlx.checkpoint import choose_device, to_numpy, to_tensor
from sessa_mlx.feedback import feedback_solve


class Twin:
    """A `sessa_common.selftest.twin.Twin`; device as in `choose_device`."""

    name = "mlx"

    def __init__(self, device: str | None = None) -> None:
        self.solve = feedback_solve
        self.device = choose_device(device)
        self.use_device()
        self.device_name = str(mx.device_info().get("device_name", self.device))

    def facts(self) -> dict[str, str]:
        """Return the version of MLX, what it says of the device, and the setting of TF32."""
        found = {"mlx": version("mlx")}
        for name, value in mx.device_info().items():
            sized = name.endswith(("size", "length"))
            found[name] = f"{int(value) / 2**30:.1f} GiB" if sized else str(value)
        return {**found, "MLX_ENABLE_TF32": os.environ.get("MLX_ENABLE_TF32", "not set")}

    def use_device(self) -> None:
        """Make the device the default one again, after something ran on another."""
        mx.set_default_device(mx.Device(getattr(mx, self.device)))

    def array(self, value: np.ndarray, dtype: str | None = None) -> Any:
        """Return an array in the dtype of that name unless it is a mask."""
        array = to_tensor(np.asarray(value))
        if dtype is None or value.dtype == bool:
            return array
        return array.astype(getattr(mx, dtype))

    def numpy(self, value: Any) -> np.ndarray:
        """Return an array as NumPy, bfloat16 included."""
        return to_numpy(value)

    def vjp(self, run: Callable[..., Any], arrays: Sequence[Any], upstream: Any) -> list[Any]:
        """Return run(*arrays) and the gradient of each array for the output's gradient."""
        outputs, gradients = mx.vjp(lambda *a: run(*a), list(arrays), [upstream])
        return [outputs[0], *gradients]

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        """Return MLX's attention (B, heads, T, width), causal if q is not shorter than k."""
        attend = mx.fast.scaled_dot_product_attention
        mask = "causal" if q.shape[2] == k.shape[2] else None
        return attend(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)

    def wait(self, results: Any) -> None:
        """Compute results and wait for them."""
        mx.eval(results)
        mx.synchronize()

    def forget_memory(self) -> None:
        """Free the pool and begin a new measurement of the peak."""
        mx.clear_cache()
        mx.reset_peak_memory()

    def memory(self) -> MemoryUse | None:
        """Return the memory use since `forget_memory`."""
        return MemoryUse(mx.get_peak_memory(), mx.get_cache_memory())
