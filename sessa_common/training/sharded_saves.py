"""Sharded saves of a run, written in the background while training goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from sessa_common.checkpoint.finite import NotFiniteError
from sessa_common.checkpoint.run_files import TRAINING
from sessa_common.checkpoint.saves import open_save
from sessa_common.storage import write_json
from sessa_common.training.backend import ShardedState
from sessa_common.training.processes import Processes, any_process
from sessa_common.training.run_folder import Run, finish_shards


class ShardedSaves:
    """Writes the sharded saves of a run, one at a time; a context that ends with the last of them.

    All processes make the same calls. Every process writes its shard, and the main one makes the
    save the model of the run when all shards are on disk. A save that fails leaves the run folder
    as it was.
    """

    def __init__(self, run: Run, processes: Processes) -> None:
        self.run, self.processes = run, processes
        self._under_way: Future[Any] | None = None

    def start(self, state: ShardedState, step: int, validation_loss: float | None) -> None:
        """Begin the save of a step when the one before is on disk.

        The state is copied before this returns. Raises NotFiniteError, and what `finish` raises.
        """
        self.finish()
        if any_process(self.processes, not state.is_finite()):
            raise NotFiniteError(f"step {step}: a weight or a moment is not a finite number")
        if self.processes.rank:
            self._under_way = state.start(None)
            return
        run, about = self.run, self.run.about(step)
        write_json(run.folder / TRAINING, run.settings.to_dict())
        with ExitStack() as stack:
            save = stack.enter_context(open_save(run.folder, step, run.settings.keep_checkpoints))
            written = state.start(save)
            writer = ThreadPoolExecutor(1, "save")
            self._under_way = writer.submit(
                self._finish, stack.pop_all(), save, written, about, validation_loss
            )
            writer.shutdown(wait=False)

    def has_failed(self) -> bool:
        """Return True when the save under way has met an error, which `finish` raises."""
        save = self._under_way
        return save is not None and save.done() and save.exception() is not None

    def finish(self) -> None:
        """Wait until the save under way is on disk; raises SessaError when it could not be written.

        The error of a full disk, for example, is that of the process that met it.
        """
        if self._under_way is not None:
            save, self._under_way = self._under_way, None
            save.result()

    def _finish(
        self,
        stack: ExitStack,
        save: Path,
        written: Future[list[str]],
        about: dict[str, Any],
        validation_loss: float | None,
    ) -> None:
        with stack:
            finish_shards(save, written.result(), about, validation_loss)

    def __enter__(self) -> ShardedSaves:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish()
        elif self._under_way is not None:
            # The first error says what went wrong; the save is whole or not there.
            wait([self._under_way])
