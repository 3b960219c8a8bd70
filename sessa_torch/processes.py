"""The processes of a training run in PyTorch: one, so far."""

from __future__ import annotations

import os

from sessa_common.errors import SessaError
from sessa_common.training.processes import OneProcess, Processes


def open_processes() -> Processes:
    """Return the only process. Raises SessaError under torchrun with more than one."""
    if (size := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise SessaError(
            f"{size} processes were started (WORLD_SIZE), but only MLX trains with several so far; "
            "start one process, or use mlx.launch with the backend mlx"
        )
    return OneProcess()
