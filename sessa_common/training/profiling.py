"""The cost of a run's training step: speed, utilisation, memory by kind, and a trace of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Protocol

from sessa_common.checkpoint.run_files import PROFILE, TRACE
from sessa_common.config import SessaConfig
from sessa_common.data.batches import Batch
from sessa_common.errors import require
from sessa_common.storage import write_json
from sessa_common.training.backend import TrainBackend
from sessa_common.training.operations import operations_per_token, peak_operations

# Steps that compile and settle, steps that are timed, and steps that are traced.
FIRST, TIMED, TRACED = 3, 5, 2
STEPS = FIRST + TIMED + TRACED


class Recorder(Protocol):
    """The profiler of a framework."""

    def device_name(self, backend: TrainBackend) -> str:
        """Return the name of the device as its maker gives it."""

    def reset_peak(self) -> None:
        """Let the peak memory of this process begin anew."""

    def memory(self, backend: TrainBackend) -> dict[str, int]:
        """Return bytes of weights, gradients and moments, and the peak where it is known."""

    def trace(self, path: Path, steps: int) -> AbstractContextManager[dict[str, Any]]:
        """Record a trace file of `steps` steps; the dictionary gets the milliseconds by kind."""


class StepProfile:
    """A `TrainBackend` that measures the first steps which it hands on to another backend.

    After FIRST steps, TIMED steps are timed and TRACED steps recorded, and both files are written.
    """

    def __init__(
        self,
        backend: TrainBackend,
        recorder: Recorder,
        config: SessaConfig,
        folder: Path,
        processes: int,
    ) -> None:
        self.backend, self.recorder, self.config = backend, recorder, config
        self.folder, self.processes = folder, processes
        self.seconds: list[float] = []
        self.result: dict[str, Any] | None = None
        self.calls = 0
        self._tracing = ExitStack()
        self._kinds: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def step(self, batches: Sequence[Batch], learning_rate: float) -> tuple[float, float]:
        """Take a step of the backend, and measure it when it is its turn."""
        number, self.calls = self.calls, self.calls + 1
        if number == FIRST:
            self.recorder.reset_peak()
        if number == FIRST + TIMED:
            self.result = self._measured(batches)
            trace = self.recorder.trace(self.folder / TRACE, TRACED)
            self._kinds = self._tracing.enter_context(trace)
        began = time.perf_counter()
        taken = self.backend.step(batches, learning_rate)
        if FIRST <= number < FIRST + TIMED:
            self.seconds.append(time.perf_counter() - began)
        if number == STEPS - 1 and self.result is not None:
            self.close()
            self.result["milliseconds_by_kind"] = self._kinds
            write_json(self.folder / PROFILE, self.result)
        return taken

    def close(self) -> None:
        """End a trace that is under way, and write its file."""
        self._tracing.close()

    def _measured(self, batches: Sequence[Batch]) -> dict[str, Any]:
        seconds = statistics.median(self.seconds)
        tokens = sum(batch.inputs.size for batch in batches)
        device = self.recorder.device_name(self.backend)
        peak, T = peak_operations(device), batches[0].inputs.shape[1]
        done = operations_per_token(self.config, T) * tokens / seconds / self.processes
        memory = self.recorder.memory(self.backend)
        held = sum(size for kind, size in memory.items() if kind != "peak")
        if "peak" in memory:
            memory["activations and other"] = memory["peak"] - held
        return {
            "device": device,
            "milliseconds": 1e3 * seconds,
            "tokens_per_second": tokens / seconds,
            "operations_per_second": done,
            "utilisation": None if peak is None else done / peak,
            "bytes": memory,
        }


def require_steps(left: int) -> None:
    """Raise SessaError unless a run has enough steps left to be profiled."""
    require(
        left >= STEPS,
        f"a profile takes {STEPS} steps, but the run has {left} left; give a larger `steps`",
    )
