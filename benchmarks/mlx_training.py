"""Time training steps in MLX, of the product and of mlx-lm's Llama: parts of `mlx_models.py`."""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn, optimizers
from mlx_subjects import GIB, Choice, Row, llama, sessa_config

from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.data.batches import Batch, next_token_batch
from sessa_common.train_config import TrainConfig
from sessa_common.training.metrics import read_metrics, tokens_per_second
from sessa_mlx.training import TrainBackend

TOKENS = 16_384  # of a step
DOCUMENT = 700  # tokens
LEAST_STEPS, MOST_STEPS, MOST_SECONDS = 4, 8, 10.0
Step = Callable[[Batch], float]


def train(choice: Choice) -> Iterator[Row]:
    """Steps of `sessa train`, each row of a batch being one document."""
    yield from _rows("Sessa", sessa_step, choice)


def documents(choice: Choice) -> Iterator[Row]:
    """Steps of `sessa train` with documents of DOCUMENT tokens in the rows of a batch."""
    yield from _rows("Sessa, documents", sessa_step, choice, documents=True)


def train_llama(choice: Choice) -> Iterator[Row]:
    """One compiled step of mlx-lm's Llama."""
    yield from _rows("Llama", llama_step, choice)


def _rows(
    name: str, make: Callable[[Choice], Step], choice: Choice, documents: bool = False
) -> Iterator[Row]:
    lengths = (32, 64) if choice.small else choice.lengths
    step, start = make(choice), time.perf_counter()
    say(f"{name}: weights made")
    for T in lengths:
        B = 2 if choice.small else TOKENS // T
        batch = next_token_batch(np.random.default_rng(0).integers(0, 300, (B, T + 1)))
        if documents:
            length = 8 if choice.small else DOCUMENT
            starts = np.arange(T, dtype=np.int32) // length * length
            batch = dataclasses.replace(batch, document_starts=np.tile(starts, (B, 1)))
        mx.clear_cache()
        mx.reset_peak_memory()
        say(f"{name}, {B} rows of {T}: first step begins")
        losses, times = [], list[float]()
        while len(times) < LEAST_STEPS or (
            len(times) < MOST_STEPS and sum(times[1:]) < MOST_SECONDS
        ):
            start = time.perf_counter()
            losses.append(step(batch))
            times.append(time.perf_counter() - start)
            say(f"{name}, {B} rows of {T}: step {len(times)}, {times[-1]:.3f} s, {losses[-1]:.4f}")
        yield {
            "training": name,
            "rows": B,
            "T": T,
            "layers": sessa_config(choice).num_hidden_layers,
            "tokens/s": round(B * T / median(times[2:])),
            "first step s": round(times[0], 1),
            "step ms": [round(1e3 * seconds, 1) for seconds in times[1:]],
            "peak GiB": round(mx.get_peak_memory() / GIB, 2),
            "pool GiB": round(mx.get_cache_memory() / GIB, 2),
            "losses": [round(losses[0], 3), round(losses[-1], 3)],
        }
    del step
    gc.collect()


def sessa_step(choice: Choice) -> Step:
    """The step of `sessa train`; says how long building its graph takes."""
    config = sessa_config(choice)
    settings = TrainConfig(precision="bfloat16")
    backend = TrainBackend(config, settings, initial_weights(config, 0), None)
    finish = backend._finish

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        made = finish(*arguments)
        say(f"graph of a step built in {time.perf_counter() - start:.3f} s")
        return made

    backend._finish = timed  # type: ignore[assignment]
    return lambda batch: backend.step([batch], 1e-4)[0]


def llama_step(choice: Choice) -> Step:
    """One compiled step in bfloat16 with mlx's AdamW."""
    model, optimizer = llama(choice), optimizers.AdamW(1e-4)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    def loss(model: nn.Module, inputs: mx.array, targets: mx.array) -> mx.array:
        logits = model(inputs).astype(mx.float32)
        return nn.losses.cross_entropy(logits, targets, reduction="mean")

    @partial(mx.compile, inputs=state, outputs=state)
    def step(inputs: mx.array, targets: mx.array) -> mx.array:
        value, grads = nn.value_and_grad(model, loss)(model, inputs, targets)
        optimizer.update(model, grads)
        return value

    def run(batch: Batch) -> float:
        value = step(mx.array(batch.inputs), mx.array(batch.targets))
        mx.eval(value, state)
        return float(value.item())

    return run


def command(choice: Choice) -> Iterator[Row]:
    """`sessa train --backend mlx` of the preset on the texts that every Python brings."""
    for T in (64,) if choice.small else choice.lengths:
        with tempfile.TemporaryDirectory() as folder:
            yield _run_command(choice, T, Path(folder) / "run")


def _run_command(choice: Choice, T: int, out: Path) -> Row:
    sizes = ("demo", T, 2, 4) if choice.small else ("sessa-131m", T, TOKENS // T, 20)
    preset, length, rows, steps = map(str, sizes)
    given = ["--backend", "mlx", "--preset", preset, "--tokenizer", "bytes", "--data", "pydoc"]
    given += ["--max-position-embeddings", length, "--batch-size", rows, "--steps", steps]
    given += ["--evaluate-every", "0", "--checkpoint-every", "0", "--max-documents", "200"]
    start, lines = time.perf_counter(), list[str]()
    with subprocess.Popen(
        [sys.executable, "-m", "sessa_cli.main", "train", "--out", str(out), *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            say(line.rstrip())
    if process.returncode:
        return {"command": "failed", "T": T, "output": "".join(lines)[-1500:]}
    records = read_metrics(out)
    return {
        "command": "sessa train",
        "T": T,
        "seconds": round(time.perf_counter() - start, 1),
        "tokens/s": tokens_per_second(records),
        "step s": [round(r["seconds"], 3) for r in records if r.get("seconds")],
        "dtype": json.loads((out / "config.json").read_text())["dtype"],
    }


def say(text: str) -> None:
    """Print what goes on at once."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
