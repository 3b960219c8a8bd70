"""The training loop, written once; each framework brings a `TrainBackend`."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from sessa_common.checkpoint.folder import (
    read_safetensors,
    save_weights,
    write_json,
    write_safetensors,
)
from sessa_common.config import SessaConfig, TrainConfig, parameter_shapes
from sessa_common.data.batches import Batch, BatchSource
from sessa_common.errors import DivergedError, SessaError
from sessa_common.training.metrics import MetricsLog, draw_losses

TRAINING = "training.json"
STATE = "training_state.safetensors"
MOMENTS = ("m", "v")


class TrainBackend(Protocol):
    """What a framework does in training: the forward and backward pass and the AdamW update.

    Built as `TrainBackend(config, settings, weights, device)`, with float32 master weights by the
    names of `parameter_shapes`. The state is "weights.<name>", "m.<name>" and "v.<name>" (Adam's
    two moments), float32, the same in every framework.
    """

    def step(self, batches: Sequence[Batch], learning_rate: float) -> tuple[float, float]:
        """Take one step on the weighted mean loss of all rows; (loss in nats, gradient norm)."""

    def evaluate(self, batch: Batch) -> tuple[float, np.ndarray]:
        """The weighted sum of the losses of a batch, in nats, and what `predict` gives for it."""

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """The likeliest next ids int32 (B, T) after inputs (B, T)."""

    def weights(self) -> dict[str, np.ndarray]:
        """The float32 master weights."""

    def state(self) -> dict[str, np.ndarray]:
        """Weights and optimizer moments as they are after the last step."""

    def restore(self, state: Mapping[str, np.ndarray], steps: int) -> None:
        """Continue from a state that was taken after `steps` steps."""


class Reporter(Protocol):
    """Who is told about the progress of a run; see `sessa_cli.progress`."""

    def training(self, record: Mapping[str, Any]) -> None:
        """One step is done: step, loss, learning_rate, gradient_norm, tokens, seconds."""

    def validation(self, record: Mapping[str, Any]) -> None:
        """An evaluation is done: step, validation_loss, validation_perplexity."""


class Silent:
    """A `Reporter` that says nothing."""

    def training(self, record: Mapping[str, Any]) -> None:
        """Say nothing."""

    def validation(self, record: Mapping[str, Any]) -> None:
        """Say nothing."""


def learning_rate(settings: TrainConfig, step: int) -> float:
    """Learning rate of the 0-based `step`: linear over warmup_steps, then half a cosine down."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps, 1)
    falling = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    ratio = settings.min_lr_ratio + (1 - settings.min_lr_ratio) * falling
    return settings.learning_rate * ratio


def decays(shape: Sequence[int]) -> bool:
    """Whether weight decay applies: to matrices, not to norms, biases and the gain bias."""
    return len(shape) >= 2


class Trainer:
    """Runs a learner over a batch source, into a folder that is a checkpoint folder all the time.

    A run is decided by (config, settings, data) alone: batch i is a function of the seed and i, so
    the step number is the data position and the random state. Every save leaves model.safetensors,
    to use, and training_state.safetensors, to resume from, each renamed into place whole.
    """

    def __init__(
        self,
        learner: TrainBackend,
        source: BatchSource,
        config: SessaConfig,
        settings: TrainConfig,
        folder: Path,
        reporter: Reporter | None = None,
    ) -> None:
        self.learner, self.source, self.folder = learner, source, folder
        self.config, self.settings = config, settings
        self.reporter = reporter or Silent()
        self.step = self.saved = 0
        if (folder / STATE).exists():
            self._resume()
            self.metrics = MetricsLog(folder, self.step)
        else:
            self.metrics = MetricsLog(folder, 0)
            # A run that is killed before its first interval can be resumed too.
            self.save()

    def run(self, until: int | None = None) -> bool:
        """Train to the last step, or to step `until`, and save; True when the last is reached.

        The first Ctrl-C or SIGTERM ends the run, saved, after the step under way; the second at
        once, unsaved.
        """
        settings = self.settings
        last = min(settings.steps, until or settings.steps)
        numbers = range(
            self.step * settings.gradient_accumulation_steps,
            last * settings.gradient_accumulation_steps,
        )
        ahead = made_ahead(self.source.batch, numbers, 2 * settings.gradient_accumulation_steps)
        with stop_signal() as stopped, closing(ahead) as self._batches:
            while self.step < last and not stopped():
                self._train_step()
                if _is_due(self.step, settings.evaluate_every, settings.steps):
                    self._evaluate()
                if _is_due(self.step, settings.checkpoint_every, last):
                    self.save()
        if self.step != self.saved:
            self.save()
        return self.step == settings.steps

    def save(self) -> None:
        """Write weights, training state and the loss picture into the folder."""
        save_weights(self.folder, self.config, self.learner.weights())
        write_state(self.folder, self.learner.state(), self.step, self.source.fingerprint)
        write_json(self.folder / TRAINING, self.settings.to_dict())
        draw_losses(self.folder)
        self.saved = self.step

    def _train_step(self) -> None:
        began = time.perf_counter()
        batches = list(islice(self._batches, self.settings.gradient_accumulation_steps))
        rate = learning_rate(self.settings, self.step)
        loss, norm = self.learner.step(batches, rate)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergedError(
                f"step {self.step + 1}: the loss is {loss} and the gradient norm {norm}; the last "
                f"checkpoint in {self.folder} is good, try a smaller --lr"
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
        self.metrics.write(record)
        self.reporter.training(record)

    def _evaluate(self) -> None:
        batches = self.source.validation()
        if not batches:
            return
        total = sum(float(batch.weights.sum()) for batch in batches)
        losses, predicted = zip(*map(self.learner.evaluate, batches), strict=True)
        loss = sum(losses) / total
        # Above 700 nats exp leaves the range of a float.
        record = {"step": self.step, "validation_loss": loss,
                  "validation_perplexity": math.exp(min(loss, 700.0)),
                  **self.source.score(predicted)}  # fmt: skip
        self.metrics.write(record)
        self.reporter.validation(record)

    def _resume(self) -> None:
        state, step, fingerprint = read_state(self.folder, self.config)
        if fingerprint != self.source.fingerprint:
            raise SessaError(
                f"{self.folder}: the data are not those that this run began with; give it the same "
                "--data or --task, or start a new run with --init"
            )
        self.learner.restore(state, step)
        self.step = self.saved = step


def made_ahead(
    make: Callable[[int], Batch], numbers: range, count: int
) -> Generator[Batch, None, None]:
    """make(i) of each number in order, up to `count` of them made while the caller is busy.

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


def write_state(folder: Path, state: Mapping[str, np.ndarray], step: int, fingerprint: str) -> None:
    """Write what a resume needs as one file, so that no crash can leave halves of two steps."""
    about = json.dumps({"step": step, "fingerprint": fingerprint})
    write_safetensors(folder / STATE, state, {"training": about})


def read_state(folder: Path, config: SessaConfig) -> tuple[dict[str, np.ndarray], int, str]:
    """The arrays, step and data fingerprint of `write_state`, checked against the architecture."""
    path = folder / STATE
    state = read_safetensors(path)
    step, fingerprint = read_state_facts(folder)
    expected = {
        f"{kind}.{name}": shape
        for kind in ("weights", *MOMENTS)
        for name, shape in parameter_shapes(config).items()
    }
    for name in sorted(expected.keys() | state.keys()):
        found = tuple(state[name].shape) if name in state else "missing"
        if found != expected.get(name):
            raise SessaError(
                f"{path}: saved by another architecture: {name} is {found}, "
                f"config.json expects {expected.get(name, 'no such tensor')}"
            )
    return state, step, fingerprint


def read_state_facts(folder: Path) -> tuple[int, str]:
    """Step and data fingerprint of `write_state`, without the arrays."""
    path = folder / STATE
    try:
        with safe_open(str(path), framework="np") as file:
            about = json.loads((file.metadata() or {})["training"])
        return int(about["step"]), str(about["fingerprint"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise SessaError(f"{path}: not a training state ({error})") from None


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C, SIGTERM or closed terminal into an answer True.

    The next one interrupts as usual. Under nohup a closed terminal stays ignored.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
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
