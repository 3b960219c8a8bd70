"""Traces of training steps by PyTorch's profiler, and the time of their kernels by kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sessa_common.storage import atomic_path

# Parts of the names of kernels, by kind; the first kind that matches counts.
KERNELS = {
    "messages": ("nccl",),
    "solve": (
        *("solve_kernel", "probabilities_kernel", "means_kernel", "score_gradients_kernel"),
        *("products_kernel", "scores_kernel", "weighted_states_kernel", "combine_kernel"),
        *("block_weights_kernel", "block_gradients_kernel"),
    ),
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "loss": ("cross_entropy",),
    "optimizer": ("multi_tensor", "fused_adam", "lpnorm"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "wgmma", "cublas", "splitk"),
    "element by element": (
        *("elementwise", "reduce", "rotate_kernel", "catarray", "index", "embedding"),
        *("memcpy", "memset"),
    ),
}
# PyTorch's compiler names what it fuses triton_*_fused_ and the operators that it comes from.
FUSED = "triton_"


def trace() -> profile:
    """Return a profiler, a context manager, of the CPU and of CUDA where it is."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities)


def milliseconds_by_kind(profiler: profile, steps: int) -> dict[str, Any]:
    """Return milliseconds that the kernels of each kind take in a step, "other" with their names.

    The products of the loss count as matrix products. There are no kernels without CUDA.
    """
    found: dict[str, float] = {}
    others: dict[str, float] = {}
    for event in profiler.events():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if not on_gpu or event.is_user_annotation:
            continue
        kind, time = kernel_kind(event.name), event.device_time / 1e3 / steps
        found[kind] = found.get(kind, 0.0) + time
        if kind == "other":
            others[event.name[:60]] = others.get(event.name[:60], 0.0) + time
    rounded = {kind: round(found[kind], 2) for kind in (*KERNELS, "other") if kind in found}
    largest = sorted(others, key=lambda name: -others[name])[:5]
    return rounded | ({"other kernels": ", ".join(largest)} if largest else {})


def kernel_kind(name: str) -> str:
    """Return the kind of a kernel of this name."""
    name = name.lower()
    if name.startswith(FUSED):
        return "element by element"
    kinds = (kind for kind, parts in KERNELS.items() if any(part in name for part in parts))
    return next(kinds, "other")


class TorchRecorder:
    """A `sessa_common.training.profiling.Recorder` in PyTorch."""

    def device_name(self, backend: Any) -> str:
        """Return the name of the GPU, or the kind of another device."""
        device = torch.device(backend.device)
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def reset_peak(self) -> None:
        """Let the peak memory of this process on its GPU begin anew."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def memory(self, backend: Any) -> dict[str, int]:
        """Return bytes of weights, gradients and moments, and the peak on CUDA."""
        parameters = list(backend.model.parameters())
        states = backend.optimizer.state.values()
        found = {
            "weights": _bytes(parameters),
            "gradients": _bytes(p.grad for p in parameters if p.grad is not None),
            "moments": _bytes(x for state in states for x in state.values()),
        }
        on_gpu = torch.device(backend.device).type == "cuda"
        return found | ({"peak": torch.cuda.max_memory_allocated()} if on_gpu else {})

    @contextmanager
    def trace(self, path: Path, steps: int) -> Iterator[dict[str, Any]]:
        """Record a Chrome trace of `steps` steps; the dictionary gets the milliseconds by kind."""
        kinds: dict[str, Any] = {}
        with trace() as profiler:
            yield kinds
        kinds |= milliseconds_by_kind(profiler, steps)
        with atomic_path(path) as scratch:
            profiler.export_chrome_trace(str(scratch))


def _bytes(tensors: Iterable[Any]) -> int:
    local = (getattr(x, "_local_tensor", x) for x in tensors)
    return sum(x.numel() * x.element_size() for x in local if isinstance(x, torch.Tensor))
