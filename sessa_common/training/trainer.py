"""The training loop, written once for both frameworks."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import islice
from typing import Any, Protocol

from sessa_common.checkpoint.finite import NotFiniteError
from sessa_common.data.batches import Batch
from sessa_common.errors import DivergedError
from sessa_common.inference.evaluation import perplexity
from sessa_common.training.backend import TrainBackend, learning_rate
from sessa_common.training.gains import gain_record
from sessa_common.training.metrics import MetricsLog, draw_losses
from sessa_common.training.processes import OneProcess, Processes, any_process
from sessa_common.training.run_folder import Run, save_run
from sessa_common.training.sharded_saves import ShardedSaves


class Reporter(Protocol):
    """Receives the progress of a run."""

    def preparing(self, activity: str) -> None:
        """Something that may take long goes on before training, such as reading the text."""

    def started(self, record: Mapping[str, Any]) -> None:
        """Training begins: folder, step, steps, parameters, vocab_size, device, precision.

        "trained" is the number of parameters that training changes or adds. "data" says in a
        few words what is trained on, "notes" what was left out, one text each.
        """

    def training(self, record: Mapping[str, Any]) -> None:
        """One step is done: step, loss, learning_rate, gradient_norm, tokens, seconds."""

    def validation(self, record: Mapping[str, Any]) -> None:
        """An evaluation is done: step, validation_loss, validation_perplexity.

        A model with feedback adds the statistics of `sessa_common.training.gains`.
        """


class Silent:
    """A `Reporter` that says nothing."""

    def preparing(self, activity: str) -> None:
        """Say nothing."""

    def started(self, record: Mapping[str, Any]) -> None:
        """Say nothing."""

    def training(self, record: Mapping[str, Any]) -> None:
        """Say nothing."""

    def validation(self, record: Mapping[str, Any]) -> None:
        """Say nothing."""


class Trainer:
    """Trains a backend from `step` on, in a run folder that is a checkpoint folder at all times.

    A run is decided by (config, settings, data) alone: batch i is a function of the seed and i, so
    the step number is the data position and the random state. Every save leaves the weights, to
    use, and training_state.safetensors, to resume from; see `sessa_common.checkpoint.saves`. Of
    several processes each computes, because they may share the weights, and only the main one
    writes and reports.
    """

    def __init__(
        self,
        backend: TrainBackend,
        run: Run,
        step: int = 0,
        reporter: Reporter | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.backend, self.run, self.settings = backend, run, run.settings
        self.source, self.folder = run.source, run.folder
        self.reporter = reporter or Silent()
        self.step = self.saved = step
        self.validation_loss: float | None = None  # the newest since the last save
        self.processes = processes or OneProcess()
        self.saves = ShardedSaves(run, self.processes)
        self.metrics = MetricsLog(run.folder, step) if self.processes.rank == 0 else None
        self.notes = [] if self.metrics is None else self.metrics.notes

    def train(self, until: int | None = None) -> bool:
        """Train to the last step, or to step `until`, and save; True when the last is reached.

        The first Ctrl-C or SIGTERM ends the run, saved, after the step under way; the second ends
        it at once, unsaved.
        """
        settings = self.settings
        last = min(settings.steps, until or settings.steps)
        numbers = range(
            self.step * settings.gradient_accumulation_steps,
            last * settings.gradient_accumulation_steps,
        )
        ahead = made_ahead(self.source.batch, numbers, 2 * settings.gradient_accumulation_steps)
        with self.saves:
            with stop_signal() as stopped, closing(ahead) as self._batches:
                while self.step < last and not self._any_process_ends(stopped):
                    self._train_step()
                    if _is_due(self.step, settings.evaluate_every, settings.steps):
                        self._evaluate()
                    if _is_due(self.step, settings.checkpoint_every, last):
                        self.save()
            if self.step != self.saved:
                self.save()
        return self.step == settings.steps

    def save(self) -> None:
        """Write weights, training state and the loss picture into the folder.

        A state in shards is copied, and written while training goes on.
        """
        state, step, loss = self.backend.state(), self.step, self.validation_loss
        if self.metrics is not None:
            self.metrics.sync()
        try:
            if not isinstance(state, Mapping):
                self.saves.start(state, step, loss)
            elif self.processes.rank == 0:
                save_run(self.run, state, step=step, validation_loss=loss)
        except NotFiniteError as error:
            raise DivergedError(f"{error}; {self._advice()}") from None
        if self.metrics is not None:
            draw_losses(self.folder)
        self.saved, self.validation_loss = step, None

    def _any_process_ends(self, stopped: Callable[[], bool]) -> bool:
        return any_process(self.processes, stopped() or self.saves.has_failed())

    def _advice(self) -> str:
        self.saves.finish()
        return (
            f"the save of step {self.saved} in {self.folder} is good, try a smaller `learning_rate`"
        )

    def _train_step(self) -> None:
        began = time.perf_counter()
        batches = list(islice(self._batches, self.settings.gradient_accumulation_steps))
        rate = learning_rate(self.settings, self.step)
        loss, norm = self.backend.step(batches, rate)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergedError(
                f"step {self.step + 1}: the loss is {loss} and the gradient norm {norm}; "
                f"{self._advice()}"
            )
        self.step += 1
        record = {
            "step": self.step,
            "loss": loss,
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens": sum(batch.inputs.size for batch in batches),
            "seconds": round(time.perf_counter() - began, 4),
        }
        if self.metrics is not None:
            self.metrics.write(record)
            self.reporter.training(record)

    def _evaluate(self) -> None:
        batches = self.source.validation()
        if not batches:
            return
        total = sum(float(batch.weights.sum()) for batch in batches)
        losses, predicted = zip(*map(self.backend.evaluate, batches), strict=True)
        loss = sum(losses) / total
        record = {
            "step": self.step,
            "validation_loss": loss,
            "validation_perplexity": perplexity(loss),
            **self.source.score(predicted),
            **gain_record(self.backend.gains(batches[0].inputs)),
        }
        self.validation_loss = loss
        if self.metrics is not None:
            self.metrics.write(record)
            self.reporter.validation(record)


def made_ahead(
    make: Callable[[int], Batch], numbers: range, count: int
) -> Generator[Batch, None, None]:
    """Yield make(i) of each number in order, up to `count` of them made while the caller is busy.

    One thread makes them, so `make` needs no lock; its error is raised where the batch is due.
    """
    waiting: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(1, "batches") as maker:
        try:
            for number in numbers:
                waiting.append(maker.submit(make, number))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for batch in waiting:
                batch.cancel()


def _is_due(step: int, interval: int, last: int) -> bool:
    return step == last or (interval > 0 and step % interval == 0)


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that answers True after the first Ctrl-C, SIGTERM or closed terminal.

    The second signal interrupts as usual. Under nohup a closed terminal stays ignored.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Windows has no SIGHUP.
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        before[hangup] = signal.getsignal(hangup)

    def ask(number: int, frame: Any) -> None:
        asked.set()
        for each, handler in before.items():
            signal.signal(each, handler)

    try:
        for number in before:
            signal.signal(number, ask)
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
