"""The training interface of a framework, and the rules that both frameworks follow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

import numpy as np

from sessa_common.data.batches import Batch
from sessa_common.train_config import TrainConfig

# Adam's first and second moment, by their names in a training state; Muon has the first only.
MOMENTS = ("m", "v")


class ShardedState(Protocol):
    """A training state of which every process holds a part; all make the same calls."""

    def is_finite(self) -> bool:
        """Return True when this process's part holds neither NaN nor infinity."""

    def start(self, folder: Path | None) -> Future[list[str]]:
        """Copy this process's part, and write the copy into a folder in the background.

        The main process names the folder, the others give None. In the main process the result is
        the names of all files. A part that cannot be written is a SessaError in every process.
        """


class TrainBackend(Protocol):
    """The forward and backward pass and the optimizer of one framework.

    Built as `TrainBackend(config, settings, weights, device)`, with float32 weights by the names of
    `parameter_shapes`, and LoRA's matrices beside them. It trains `trained_shapes`. The state is
    "weights.<name>", "m.<name>" and "v.<name>" (Adam's two moments, Muon's momentum as m alone) of
    what is trained, float32, the same in every framework. `device` and `precision` are those in
    use. Of several processes each makes the same calls, with the same arguments.
    """

    device: str
    precision: str

    def step(self, batches: Sequence[Batch], learning_rate: float) -> tuple[float, float]:
        """Take one step on the weighted mean loss of all rows; (loss in nats, gradient norm)."""

    def evaluate(self, batch: Batch) -> tuple[float, np.ndarray]:
        """Return the weighted sum of the losses of a batch, in nats, and its `predict`."""

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """Return the likeliest next ids int32 (B, T) after inputs (B, T)."""

    def gains(self, inputs: np.ndarray) -> dict[int, np.ndarray]:
        """Return the gains float32 (B, T) of every layer with feedback on inputs (B, T)."""

    def weights(self) -> dict[str, np.ndarray]:
        """Return the float32 weights that are trained."""

    def state(self) -> Mapping[str, np.ndarray] | ShardedState:
        """Return weights and optimizer moments as they are after the last step.

        Only the main one of several processes need return them whole. With `sharded_checkpoints`
        it is a `ShardedState` where processes share the weights.
        """

    def restore(self, state: Mapping[str, np.ndarray], steps: int) -> None:
        """Continue from a state that was taken after `steps` steps."""


def learning_rate(settings: TrainConfig, step: int) -> float:
    """Learning rate of the 0-based `step`: linear over warmup_steps, then half a cosine down."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps, 1)
    falling = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    ratio = settings.min_lr_ratio + (1 - settings.min_lr_ratio) * falling
    return settings.learning_rate * ratio


def decays(shape: Sequence[int]) -> bool:
    """Return True where weight decay applies: matrices, not norms, biases and the gain bias."""
    return len(shape) >= 2
