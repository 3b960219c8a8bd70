"""The processes of a training run in PyTorch, started by torchrun."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from datetime import timedelta
from functools import cache

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sessa_common.errors import SessaError
from sessa_common.training.processes import OneProcess, Processes

# The others wait this long for a process that reads data or writes a save.
PATIENCE = timedelta(hours=1)
# Numbers that one message holds: 64 MiB in float32.
BUCKET = 2**24


@cache
def open_processes() -> Processes:
    """Return the processes that torchrun has started, or the only one.

    CUDA tensors travel by NCCL where every process of this machine has a GPU of its own, and by
    gloo elsewhere, like tensors of the CPU. Raises SessaError when the variables that torchrun sets
    are not complete.
    """
    if (size := os.environ.get("WORLD_SIZE", "1")) == "1":
        return OneProcess()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise SessaError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set; start the processes with "
            "torchrun, or unset WORLD_SIZE for one process"
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    alone = dist.is_nccl_available() and 0 < here <= torch.cuda.device_count()
    dist.init_process_group("cpu:gloo,cuda:nccl" if alone else "gloo", timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)
    return _Group()


def _buckets(arrays: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield neighbouring arrays together, because sending many small ones takes long."""
    bucket: list[Tensor] = []
    for array in arrays:
        if bucket and sum(x.numel() for x in bucket) + array.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(array)
    if bucket:
        yield bucket


class _Group:
    """`sessa_common.training.processes.Processes` of all processes of torch.distributed."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def sum(self, values: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(np.array(values))
        dist.all_reduce(tensor)
        return tensor.numpy()

    def mean(self, arrays: list[Tensor]) -> list[Tensor]:
        for bucket in _buckets(arrays):
            packed = torch.cat([array.flatten() for array in bucket])
            dist.all_reduce(packed)
            parts = (packed / self.size).split([array.numel() for array in bucket])
            torch._foreach_copy_(bucket, [x.view_as(y) for x, y in zip(parts, bucket, strict=True)])
        return arrays

    def is_lost(self, error: Exception) -> bool:
        return isinstance(error, dist.DistError) or "gloo" in str(error)
