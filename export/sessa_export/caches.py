"""The caches of an exported model between two runs of the runner, for each layout.

Letters: B batch, T new tokens, P past tokens, C rows of a buffer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# A full buffer is copied to one with room for so many more tokens.
ROOM = 64


class GrownCaches:
    """Caches for natural and uniform: the output of one run is the past of the next, uncopied.

    Caches and logits stay on `device`, named as by `sessions.device_of`.
    """

    def __init__(self, session: Any, device: str = "cpu") -> None:
        self.session = session
        name, _, number = device.partition(":")
        self.device = (name, int(number or 0))
        self.inputs = [i for i in session.get_inputs() if i.name.startswith("past_key_values")]
        self.outputs = [output.name for output in session.get_outputs()]
        self.reset()

    def reset(self) -> None:
        """Empty the caches."""
        self.values: list[Any] = []

    def run(self, tokens: np.ndarray, mask: np.ndarray) -> None:
        """Append tokens (B, T), mask (B, P + T), both int64."""
        if not self.values:
            shapes = [(len(mask), i.shape[1], 0, i.shape[3]) for i in self.inputs]
            self.load([np.zeros(shape, np.float32) for shape in shapes])
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", tokens)
        binding.bind_cpu_input("attention_mask", mask)
        for given, value in zip(self.inputs, self.values, strict=True):
            binding.bind_ortvalue_input(given.name, value)
        for name in self.outputs:
            binding.bind_output(name, *self.device)
        self.session.run_with_iobinding(binding)
        found = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        self.values = [found[i.name.replace("past_key_values", "present")] for i in self.inputs]
        self.found = found["logits"]

    def logits(self) -> np.ndarray:
        """Logits (B, T, V) of the last run."""
        return self.found.numpy()

    def arrays(self) -> list[np.ndarray]:
        """Every cache, (B, heads, P, width)."""
        return [value.numpy() for value in self.values]

    def load(self, arrays: list[np.ndarray]) -> None:
        """Replace every cache, (B, heads, P, width) float32."""
        from onnxruntime import OrtValue

        # A copy, because a slice may lie in the memory of a value that is dropped here.
        self.values = [OrtValue.ortvalue_from_numpy(a.copy(), *self.device) for a in arrays]

    def trim(self, length: int) -> None:
        """Keep the first `length` positions."""
        self.load([array[:, :, :length] for array in self.arrays()])


class BufferedCaches:
    """Caches for buffer: they stay in place, and the new rows of a run are written into them."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.inputs = [i for i in session.get_inputs() if i.name.startswith("past_key_values")]
        # Feedback keys have a spare row that no query sees, so their axis has another name.
        self.spare = [int(i.shape[2] != self.inputs[0].shape[2]) for i in self.inputs]
        self.vocabulary = next(o.shape[2] for o in session.get_outputs() if o.name == "logits")
        self.buffers: list[np.ndarray] = []
        self.reset()

    def reset(self) -> None:
        """Empty the caches; the next text is written into the same buffers if they fit."""
        self.length = 0
        self.bound: tuple[int, ...] = ()

    def run(self, tokens: np.ndarray, mask: np.ndarray) -> None:
        """Append tokens (B, T), mask (B, P + T), both int64."""
        (B, T), P = tokens.shape, self.length
        if not self.buffers or len(self.buffers[0]) != B:
            self.buffers = self._zeros(B, 0)
        # Before the first token no row is valid, however large the buffers are.
        C = self.buffers[0].shape[2] if P else 0
        if self.bound != (B, T, C):
            self._bind(B, T, C)
        self.ids[:] = tokens
        # The mask of unused rows stays 0.
        self.seen[:, :P], self.seen[:, C:] = mask[:, :P], mask[:, P:]
        self.session.run_with_iobinding(self.binding)
        self._write(self.rows, P + T)

    def logits(self) -> np.ndarray:
        """Logits (B, T, V) of the last run."""
        return self.found.copy() if self.bound else self.found

    def arrays(self) -> list[np.ndarray]:
        """Every cache, (B, heads, P, width)."""
        return [buffer[:, :, : self.length] for buffer in self.buffers]

    def load(self, arrays: list[np.ndarray]) -> None:
        """Replace every cache, (B, heads, P, width) float32."""
        self.reset()
        self.buffers = self._zeros(len(arrays[0]), 0)
        self._write(arrays, arrays[0].shape[2])

    def trim(self, length: int) -> None:
        """Keep the first `length` positions."""
        # The bound mask still shows the rows that are dropped, so the next run binds a new one.
        self.length, self.bound = length, ()

    def _zeros(self, B: int, C: int) -> list[np.ndarray]:
        shapes = [
            (B, i.shape[1], C + n, i.shape[3]) for i, n in zip(self.inputs, self.spare, strict=True)
        ]
        return [np.zeros(shape, np.float32) for shape in shapes]

    def _write(self, rows: list[np.ndarray], stop: int) -> None:
        """Append rows to the buffers, after a copy to larger buffers where these are full."""
        if stop > self.buffers[0].shape[2]:
            old, self.buffers = self.arrays(), self._zeros(len(rows[0]), stop + ROOM)
            for buffer, value in zip(self.buffers, old, strict=True):
                buffer[:, :, : self.length] = value
        for buffer, value in zip(self.buffers, rows, strict=True):
            buffer[:, :, self.length : stop] = value
        self.length = stop

    def _bind(self, B: int, T: int, C: int) -> None:
        """Bind arrays for runs of T tokens after C rows; later runs of this shape reuse them."""
        self.ids, self.seen = np.zeros((B, T), np.int64), np.zeros((B, C + T), np.int64)
        self.found = np.empty((B, T, self.vocabulary), np.float32)
        self.rows = [np.empty((B, i.shape[1], T, i.shape[3]), np.float32) for i in self.inputs]
        self.past = self.buffers if C else self._zeros(B, 0)
        # The caller keeps the logits of a run of several tokens, so its arrays are not reused.
        self.binding, self.bound = self.session.io_binding(), (B, T, C) if T == 1 else ()
        self.binding.bind_cpu_input("input_ids", self.ids)
        self.binding.bind_cpu_input("attention_mask", self.seen)
        for given, array in zip(self.inputs, self.past, strict=True):
            self.binding.bind_cpu_input(given.name, array)
        names = [i.name.replace("past_key_values", "new") for i in self.inputs]
        for name, array in zip(["logits", *names], [self.found, *self.rows], strict=True):
            self.binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
