"""mx.fast.metal_kernel on the CPU: the text comes from MLX itself, the emulator runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np

from metal_emulator.build import Launch, compile_metal

# What MLX puts before a kernel's text and the kernels here rely on (kernels/utils.h and bf16.h).
PREAMBLE = "using namespace metal;\ntypedef half float16_t;\ntypedef bfloat bfloat16_t;\n"

_NUMPY = {
    mx.float32: np.float32,
    mx.float16: np.float16,
    mx.bfloat16: ml_dtypes.bfloat16,
    mx.int32: np.int32,
    mx.uint32: np.uint32,
    mx.bool_: np.bool_,
}


def exported_kernels(function: Callable[..., Any], *arrays: mx.array) -> list[dict[str, Any]]:
    """The launches that MLX would hand to Metal for the metal_kernels of `function`, in order.

    Each has name, text, grid, threadgroup; "bound": for every input whether its shape, strides and
    number of dimensions are bound too; "copies_strided": ensure_row_contiguous. MLX traces the
    calls while exporting, without a GPU.
    """
    calls = []

    def keep(record: dict[str, Any]) -> None:
        if record["type"] == "primitive" and record["name"] == "CustomKernel":
            calls.append(_kernel_call(record))

    mx.export_function(keep, function, *arrays)
    return calls


def _kernel_call(primitive: dict[str, Any]) -> dict[str, Any]:
    name, text, *rest = primitive["arguments"]
    return {
        "name": name,
        "text": PREAMBLE + text,
        "grid": tuple(rest[0:3]),
        "threadgroup": tuple(rest[3:6]),
        "bound": rest[6],
        "copies_strided": rest[7],
    }


class EmulatedKernel:
    """Stand-in for what mx.fast.metal_kernel returns; outputs start as NaN."""

    def __init__(self, real: Callable[..., Any], seed: int, mode: str, launches: list[Launch]):
        self.real, self.seed, self.mode, self.launches = real, seed, mode, launches

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Any],
        output_dtypes: Sequence[mx.Dtype],
        **options: Any,
    ) -> list[mx.array]:
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        outputs = {"output_shapes": output_shapes, "output_dtypes": output_dtypes}
        (call,) = exported_kernels(
            lambda *traced: self.real(inputs=list(traced), **outputs, **options), *arrays
        )
        bound = [
            buffer
            for x, used in zip(arrays, call["bound"], strict=True)
            for buffer in _bound(x, used, strided=not call["copies_strided"])
        ]
        results = [
            poisoned(shape, _NUMPY[dtype])
            for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
        ]
        place = call["grid"], call["threadgroup"]
        self.launches.append(
            Launch(call["text"], call["name"], [a.copy() for a in bound + results], *place)
        )
        library = compile_metal(call["text"], self.mode)
        library.run(call["name"], bound + results, *place, seed=self.seed)
        return [to_mlx(result) for result in results]


def _bound(x: mx.array, used: Sequence[bool], strided: bool) -> Iterator[np.ndarray]:
    """The buffers of one input: its data, then its shape, strides and rank where they are used.

    A kernel that takes strided inputs gets x inside a larger array, every axis longer by one.
    """
    data = to_numpy(x)
    if strided:
        larger = poisoned([size + 1 for size in x.shape], data.dtype)
        larger[tuple(slice(size) for size in x.shape)] = data
        data = larger
    strides = np.array([stride // data.itemsize for stride in data.strides], np.int64)
    extras = (np.array(x.shape, np.int32), strides, np.array(x.ndim, np.int32))
    wanted = [extra for extra, is_used in zip(extras, used, strict=True) if is_used and x.ndim]
    for array in (data, *wanted):
        array.flags.writeable = False
        yield array


def poisoned(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array of bytes 0xFF: NaN in every floating type."""
    array = np.empty(shape, dtype)
    array.reshape(-1).view(np.uint8).fill(0xFF)
    return array


def to_numpy(x: mx.array) -> np.ndarray:
    """A C-contiguous copy of x in its own type."""
    if x.dtype == mx.bfloat16:
        return np.array(x.view(mx.uint16)).view(ml_dtypes.bfloat16).reshape(x.shape)
    return np.array(x, order="C").reshape(x.shape)


def to_mlx(array: np.ndarray) -> mx.array:
    """The array in MLX, in its own type."""
    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


@contextmanager
def emulated_metal_kernels(seed: int = 0, mode: str = "") -> Iterator[list[Launch]]:
    """Within the block mx.fast.metal_kernel runs on the emulator; gives the list of launches.

    `mode` is that of `compile_metal`.
    """
    real, launches = mx.fast.metal_kernel, []
    mx.fast.metal_kernel = lambda *a, **k: EmulatedKernel(real(*a, **k), seed, mode, launches)
    try:
        yield launches
    finally:
        mx.fast.metal_kernel = real
