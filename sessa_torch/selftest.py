"""PyTorch for `sessa_common.selftest`: arrays, gradients, attention, memory, versions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from sessa_common.selftest.twin import MemoryUse
from sessa_torch.checkpoint import choose_device, to_numpy, to_tensor
from sessa_torch.feedback import feedback_solve


class Twin:
    """A `sessa_common.selftest.twin.Twin`; device as in `choose_device`."""

    name = "torch"

    def __init__(self, device: str | None = None) -> None:
        self.solve = feedback_solve
        self.device = choose_device(device)
        self.kind = self.device.split(":")[0]
        is_cuda = self.kind == "cuda"
        self.device_name = torch.cuda.get_device_name(self.device) if is_cuda else self.device

    def facts(self) -> dict[str, str]:
        """Return the versions of PyTorch and CUDA, and the setting of TF32."""
        found = {"torch": torch.__version__, "threads": str(torch.get_num_threads())}
        if self.kind == "cuda":
            found["CUDA"] = str(torch.version.cuda)
            major, minor = torch.cuda.get_device_capability(self.device)
            found["compute capability"] = f"{major}.{minor}"
        return {**found, "float32 products": torch.get_float32_matmul_precision()}

    def use_device(self) -> None:
        """Do nothing: in PyTorch every tensor says where it is."""

    def array(self, value: np.ndarray, dtype: str | None = None) -> Any:
        """Return a tensor on the device, in the dtype of that name unless it is a mask."""
        tensor = to_tensor(np.asarray(value)).to(self.device)
        if dtype is None or value.dtype == bool:
            return tensor
        return tensor.to(getattr(torch, dtype))

    def numpy(self, value: Any) -> np.ndarray:
        """Return a tensor as NumPy, bfloat16 included."""
        return to_numpy(value)

    def vjp(self, run: Callable[..., Any], arrays: Sequence[Any], upstream: Any) -> list[Any]:
        """Return run(*arrays) and the gradient of each tensor for the output's gradient."""
        leaves = [array.detach().requires_grad_() for array in arrays]
        output = run(*leaves)
        gradients = torch.autograd.grad(
            output, leaves, upstream, allow_unused=True, materialize_grads=True
        )
        return [output, *gradients]

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        """Return PyTorch's attention (B, heads, T, width), causal if q is not shorter than k."""
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v, is_causal=q.shape[2] == k.shape[2])

    def wait(self, results: Any) -> None:
        """Wait until the device has done what was asked for."""
        if self.kind != "cpu":
            getattr(torch, self.kind).synchronize()

    def forget_memory(self) -> None:
        """Free the pool and begin a new measurement of the peak."""
        if self.kind != "cpu":
            getattr(torch, self.kind).empty_cache()
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def memory(self) -> MemoryUse | None:
        """Return the memory use since `forget_memory`; None on the CPU, which counts nothing.

        MPS counts no peak: what the driver holds, which only `forget_memory` lowers, stands for it.
        """
        if self.kind == "cuda":
            live = torch.cuda.memory_allocated(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
            return MemoryUse(peak, torch.cuda.memory_reserved(self.device) - live)
        if self.kind == "mps":
            held = torch.mps.driver_allocated_memory()
            return MemoryUse(held, held - torch.mps.current_allocated_memory())
        return None
