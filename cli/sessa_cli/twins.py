"""The two frameworks behind one interface: arrays, gradients, attention and the feedback solve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from sessa_common.frameworks import framework


class Twin(Protocol):
    """A framework with a device; arrays are its own, and `solve` is its `feedback_solve`."""

    name: str
    device: str  # what the framework calls it: "cpu", "cuda", "mps" or "gpu"
    device_name: str
    solve: Callable[..., Any]

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


class TorchTwin:
    """PyTorch, on a GPU when there is one and no other device is named."""

    name = "torch"

    def __init__(self, device: str | None = None) -> None:
        import torch

        self.torch, self.checkpoint = torch, framework("torch", "checkpoint")
        self.solve = framework("torch", "feedback").feedback_solve
        found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        self.device = device or next((name for name, there in found.items() if there), "cpu")
        is_cuda = self.device.startswith("cuda")
        self.device_name = torch.cuda.get_device_name(self.device) if is_cuda else self.device

    def array(self, value: np.ndarray, dtype: str | None = None) -> Any:
        tensor = self.checkpoint.to_tensor(np.asarray(value)).to(self.device)
        if dtype is None or value.dtype == bool:
            return tensor
        return tensor.to(getattr(self.torch, dtype))

    def numpy(self, value: Any) -> np.ndarray:
        return self.checkpoint.to_numpy(value)

    def vjp(self, run: Callable[..., Any], arrays: Sequence[Any], upstream: Any) -> list[Any]:
        leaves = [array.detach().requires_grad_() for array in arrays]
        output = run(*leaves)
        gradients = self.torch.autograd.grad(
            output, leaves, upstream, allow_unused=True, materialize_grads=True
        )
        return [output, *gradients]

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        attend = self.torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v, is_causal=q.shape[2] == k.shape[2])

    def wait(self, results: Any) -> None:
        if self.device != "cpu":
            getattr(self.torch, self.device.split(":")[0]).synchronize()


class MlxTwin:
    """MLX on its default device."""

    name = "mlx"

    def __init__(self) -> None:
        import mlx.core as mx

        self.mx, self.checkpoint = mx, framework("mlx", "checkpoint")
        self.solve = framework("mlx", "feedback").feedback_solve
        self.device = "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu"
        self.device_name = str(mx.device_info().get("device_name", self.device))

    def array(self, value: np.ndarray, dtype: str | None = None) -> Any:
        array = self.checkpoint.to_tensor(np.asarray(value))
        if dtype is None or value.dtype == bool:
            return array
        return array.astype(getattr(self.mx, dtype))

    def numpy(self, value: Any) -> np.ndarray:
        return self.checkpoint.to_numpy(value)

    def vjp(self, run: Callable[..., Any], arrays: Sequence[Any], upstream: Any) -> list[Any]:
        outputs, gradients = self.mx.vjp(lambda *a: run(*a), list(arrays), [upstream])
        return [outputs[0], *gradients]

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        attend = self.mx.fast.scaled_dot_product_attention
        mask = "causal" if q.shape[2] == k.shape[2] else None
        return attend(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)

    def wait(self, results: Any) -> None:
        self.mx.eval(results)
        self.mx.synchronize()


# The class of each twin by the name of its framework.
TWINS: dict[str, Callable[[], Twin]] = {"torch": TorchTwin, "mlx": MlxTwin}
