"""Time training steps on rows whose documents are separate, over those on joined documents.

    OMP_NUM_THREADS=1 python benchmarks/documents.py [--rounds 5] [--length 1024] [--mean 200]
        [--out FOLDER]

Rows of random tokens are cut into documents of geometric length. First the loss of a batch with
separate documents must equal that of the documents one by one. Then both settings take a step in
turn; seconds are processor time with one thread, so that other programs on the machine matter
little, and the ratio is that of tokens per second, separate over joined (above 1 is faster). The
first step of each is not counted.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from measure import machine, save, table

import sessa_mlx.training
import sessa_torch.training
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.config import SessaConfig
from sessa_common.data.batches import Batch, next_token_batch
from sessa_common.presets import PRESETS
from sessa_common.train_config import TrainConfig

END = 0
BACKENDS = {"torch": sessa_torch.training, "mlx": sessa_mlx.training}
MODELS = ("sessa-1m", "transformer-1m", "mamba2-1m")


def draw_rows(length: int, mean: int, count: int = 4) -> np.ndarray:
    """Token rows (count, length + 1) with an end token after `mean` tokens on average."""
    rng = np.random.default_rng(0)
    rows = rng.integers(1, 4096, (count, length + 1))
    rows[rng.random(rows.shape) < 1 / mean] = END
    return rows


def alone(backend: Any, batch: Batch) -> float:
    """The sum of the losses of every document of a batch as a row of its own."""
    starts, total = batch.document_starts, 0.0
    assert starts is not None
    for row, first in np.argwhere(starts == np.arange(starts.shape[1])):
        span = (slice(row, row + 1), slice(first, first + int((starts[row] == first).sum())))
        parts = (batch.inputs[span], batch.targets[span], batch.weights[span])
        total += backend.evaluate(Batch(*parts))[0]
    return total


def seconds(backend: Any, batch: Batch) -> float:
    """Processor seconds of one step."""
    began = time.process_time()
    backend.step([batch], 1e-4)
    return time.process_time() - began


def main() -> None:
    """Check, time and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--mean", type=int, default=200)
    parser.add_argument("--out", type=Path, help="folder for the results as JSON")
    options = parser.parse_args()
    rows = draw_rows(options.length, options.mean)
    separate, joined = next_token_batch(rows, END), next_token_batch(rows)
    settings = TrainConfig(precision="float32")
    figures = []
    for name in MODELS:
        config = SessaConfig.from_dict(
            PRESETS[name].to_dict() | {"max_position_embeddings": options.length}
        )
        for framework, module in BACKENDS.items():
            backend = module.TrainBackend(config, settings, initial_weights(config, 0), "cpu")
            loss, wanted = backend.evaluate(separate)[0], alone(backend, separate)
            if abs(loss / wanted - 1) > 1e-5:
                raise SystemExit(f"{name}, {framework}: loss {loss}, alone {wanted}")
            times = [
                (seconds(backend, joined), seconds(backend, separate))
                for _ in range(options.rounds + 1)
            ][1:]
            before, after = (median(x) for x in zip(*times, strict=True))
            figures.append(
                {
                    "model": name,
                    "framework": framework,
                    "joined, s": f"{before:.2f}",
                    "separate, s": f"{after:.2f}",
                    "tokens/s, ratio": f"{median(a / b for a, b in times):.2f}",
                }
            )
    documents = int((rows[:, :-1] == END).sum()) + len(rows)
    facts = {"rows": f"{len(rows)} of {options.length} tokens", "documents": documents}
    print("\n".join(f"{key}: {value}" for key, value in (machine() | facts).items()), "\n")
    print(table(figures))
    if options.out is not None:
        save("documents_cpu", [facts, *figures], options.out)


if __name__ == "__main__":
    main()
