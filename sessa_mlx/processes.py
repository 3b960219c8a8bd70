"""The processes of a training run in MLX, started by mlx.launch."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx import nn

from sessa_common.training.processes import OneProcess, Processes
from sessa_mlx.checkpoint import to_numpy


def open_processes() -> Processes:
    """Return the processes that mlx.launch has started, or the only one."""
    group = mx.distributed.init()
    return OneProcess() if group.size() == 1 else _Group(group)


class _Group:
    """`sessa_common.training.processes.Processes` of an MLX group."""

    def __init__(self, group: mx.distributed.Group) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()

    def sum(self, values: np.ndarray) -> np.ndarray:
        return to_numpy(mx.distributed.all_sum(mx.array(values), group=self.group))

    def mean(self, arrays: list[mx.array]) -> list[mx.array]:
        return nn.average_gradients(arrays, self.group)

    def is_lost(self, error: Exception) -> bool:
        return isinstance(error, RuntimeError) and "peer" in str(error)
