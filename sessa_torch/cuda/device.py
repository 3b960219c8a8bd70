"""Properties of a CUDA device, and the reasons why Triton kernels cannot run on it.

Triton is imported when a property needs it, so that this module can say that it is missing.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from sessa_common.extras import install

# CUDA allows this many programs in the second and third dimension of a grid.
MOST_SEQUENCES = 65535
OLDEST_CAPABILITY = (8, 0)


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why Triton kernels cannot run on this device and type, or None if they can."""
    if (missing := missing_triton()) is not None:
        return missing
    if dtype == torch.float64:
        return "the kernels take float32, bfloat16 and float16, not float64"
    if is_interpreter():
        return None
    if device.type != "cuda":
        return f"the tensors are on {device.type}, the kernels need CUDA"
    if capability(device) < OLDEST_CAPABILITY:
        return "the GPU is older than compute capability 8.0"
    return None


@functools.cache
def missing_triton() -> str | None:
    """The reason why Triton cannot be used here, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed ({install('cuda')})"
    if importlib.util.find_spec("triton.tools.tensor_descriptor") is None:
        return "Triton is older than 3.4 (PyTorch 2.8 brings it)"
    return None


def is_interpreter() -> bool:
    """True if Triton interprets kernels on the CPU (TRITON_INTERPRET=1)."""
    import triton

    return triton.knobs.runtime.interpret


@functools.cache
def num_sms(device: torch.device) -> int:
    """Number of multiprocessors of the device; 4 for the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program can have on the device."""
    from triton.runtime import driver

    return driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The CUDA compute capability of the device."""
    return torch.cuda.get_device_capability(device)


def has_tma(device: torch.device) -> bool:
    """True if kernels read by tensor memory descriptors, which GPUs from Hopper on have."""
    return device.type != "cuda" or capability(device) >= (9, 0)
