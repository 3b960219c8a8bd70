"""A training state that every process saves in part, by PyTorch's distributed checkpoint.

The files are safetensors with what PyTorch's `HuggingFaceStorageWriter` writes into their headers:
nothing is pickled. `sessa_common.checkpoint.sharded_state` reads them, without PyTorch.
"""

from __future__ import annotations

from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sessa_common.errors import SessaError
from sessa_torch.processes import PATIENCE


def require_pytorch(version: tuple[int, int], what: str) -> None:
    """Raise SessaError where PyTorch is older than what a feature needs."""
    found = tuple(int(number) for number in torch.__version__.split(".")[:2])
    if found < version:
        raise SessaError(
            f"{what} needs PyTorch {'.'.join(map(str, version))} or later, and this is "
            f"{torch.__version__}"
        )


class ShardedState:
    """A `sessa_common.training.backend.ShardedState` of DTensors and of tensors that all hold."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        require_pytorch((2, 9), "`sharded_checkpoints`")
        self.tensors = tensors

    def is_finite(self) -> bool:
        """Return True when this process's part holds neither NaN nor infinity."""
        parts: list[Any] = list(self.tensors.values())
        local = [part.to_local() if hasattr(part, "to_local") else part for part in parts]
        # One transfer, so that the host waits for the device once.
        return bool(torch.stack([part.isfinite().all() for part in local]).all())

    def start(self, folder: Path | None) -> Future[list[str]]:
        """Copy this process's part to the CPU and write it to the main process's folder."""
        from torch.distributed.checkpoint import async_save

        group = _saving_group()
        place: list[Any] = [None if folder is None else str(folder.absolute())]
        dist.broadcast_object_list(place, src=0, group=group)
        writer = _new_writer(place[0])
        writing = async_save(self.tensors, storage_writer=writer, process_group=group)
        assert isinstance(writing, Future)
        done: Future[list[str]] = Future()

        def finish(writing: Future[Any]) -> None:
            error = writing.exception()
            if error is None:
                done.set_result(writer.names)
            else:
                done.set_exception(SessaError(f"a save failed: {_reason(error)}"))

        writing.add_done_callback(finish)
        return done


@cache
def _saving_group() -> dist.ProcessGroup:
    """The processes once more, for saves: their messages must not mix with those of training."""
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert group is not None
    return group


def _new_writer(folder: str) -> Any:
    """Make a writer of PyTorch that keeps the names of the files of all processes.

    Importing it takes long, and training without shards does not need it.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    class Writer(HuggingFaceStorageWriter):
        names: tuple[str, ...] | list[str] = ()

        def finish(self, metadata: Any, results: list[list[Any]]) -> None:
            """Keep the names; PyTorch calls this in the main process only."""
            files = {item.storage_data.relative_path for part in results for item in part}
            self.names = sorted(files)

    writer = Writer(path=folder, save_distributed=True)
    # The tensors are on the CPU: copying ahead would open a stream on the first GPU in its thread.
    writer.per_thread_copy_ahead = 0
    return writer


def _reason(error: BaseException) -> str:
    """Return the errors of a failed save, each with the number of its process."""
    failures: dict[int, Any] = getattr(error, "failures", {})
    texts = [f"process {rank}: {failure[0]}" for rank, failure in sorted(failures.items())]
    return "; ".join(texts) or str(error)
