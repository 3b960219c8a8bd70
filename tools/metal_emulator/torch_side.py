"""torch.mps.compile_shader on the CPU: the same calls, on CPU tensors, run by the emulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from metal_emulator.build import Launch, compile_metal


class EmulatedShader:
    """Stand-in for what torch.mps.compile_shader returns: one attribute a kernel."""

    def __init__(self, text: str, seed: int, mode: str, launches: list[Launch]):
        text.encode("ascii")
        self._text, self._seed, self._mode, self._launches = text, seed, mode, launches

    def __getattr__(self, name: str) -> Callable[..., None]:
        library = compile_metal(self._text, self._mode)
        if name not in library.kernels:
            raise AttributeError(name)

        def launch(*arguments: Any, threads: Sequence[int], group_size: Sequence[int]) -> None:
            arrays = [_bound(argument) for argument in arguments]
            place = tuple(threads), tuple(group_size)
            self._launches.append(Launch(self._text, name, [a.copy() for a in arrays], *place))
            library.run(name, arrays, *place, seed=self._seed)

        return launch


def _bound(argument: Any) -> np.ndarray:
    """Buffer of one argument; integers are bound as int64, floats as float.

    As with MPS, a tensor is its storage from its first element on, whatever its strides.
    """
    if isinstance(argument, torch.Tensor):
        storage = torch.empty(0, dtype=torch.uint8).set_(argument.detach().untyped_storage())
        return storage[argument.storage_offset() * argument.element_size() :].numpy()
    array = np.asarray(argument)
    array = array.astype(np.int64 if array.dtype.kind in "iub" else np.float32)
    array.flags.writeable = False
    return array


@contextmanager
def emulated_shaders(seed: int = 0, mode: str = "") -> Iterator[list[Launch]]:
    """Within the block torch.mps.compile_shader gives the emulator, and empty tensors are NaN.

    Gives the list of launches. `mode` is that of `compile_metal`.
    """
    real, launches = torch.mps.compile_shader, []
    torch.mps.compile_shader = lambda text: EmulatedShader(text, seed, mode, launches)
    torch.use_deterministic_algorithms(True)
    try:
        yield launches
    finally:
        torch.mps.compile_shader = real
        torch.use_deterministic_algorithms(False)
