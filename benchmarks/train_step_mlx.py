"""Time what Python does for one training step in MLX, eager and compiled, before MLX computes it.

    python benchmarks/train_step_mlx.py [--models demo,sessa-30m] [--save NAME]

The graph of a step (loss, gradients, clipping, AdamW) is built for a row of 8 tokens and thrown
away, so the time does not depend on the device. The first call of the compiled step traces it and
is not timed. A step is timed only after the losses of both kinds agree on the CPU; for the compiled
ones MLX calls a C++ compiler, so --check is for small models.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import mlx.core as mx
import numpy as np
from measure import machine, save, table

from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.data.batches import Batch, next_token_batch
from sessa_common.presets import PRESETS
from sessa_common.train_config import TrainConfig
from sessa_mlx.training import TrainBackend, _arrays

LEARNING_RATE, AGREE_STEPS, AGREE = 1e-3, 3, 1e-4


def trained(name: str, compile: bool) -> TrainBackend:
    config = PRESETS[name]
    settings = TrainConfig(compile=compile, precision="float32")
    return TrainBackend(config, settings, initial_weights(config, 0), "cpu")


def python_ms(backend: TrainBackend, batch: Batch, repeats: int) -> float:
    """Median time of building the graph of a step."""
    arrays, total, times = _arrays(batch), mx.array(8.0), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        backend._finish(
            backend.parameters, backend.moments, None, arrays, total, backend._rates(LEARNING_RATE)
        )
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times[1:]))


def case(name: str, repeats: int, check: bool) -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(0, PRESETS[name].vocab_size, (1, 9))
    batch, row, losses = next_token_batch(ids), {"model": name}, {}
    for kind, compile in (("eager", False), ("compiled", True)):
        backend = trained(name, compile)
        row["parameters"] = len(backend.parameters)
        if check:
            losses[kind] = [backend.step([batch], LEARNING_RATE)[0] for _ in range(AGREE_STEPS)]
            if not np.allclose(losses[kind], losses["eager"], rtol=AGREE):
                return row | {"compiled ms": f"losses {losses} disagree, not timed"}
        row[f"{kind} ms"] = round(python_ms(backend, batch, repeats), 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="demo,sessa-30m,sessa-131m")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--save", help="name of the file under benchmarks/results")
    options = parser.parse_args()
    print(machine() | {"mlx": mx.__version__}, flush=True)
    rows = [case(name, options.repeats, options.check) for name in options.models.split(",")]
    print(table(rows))
    if options.save:
        print(save(options.save, rows))


if __name__ == "__main__":
    main()
