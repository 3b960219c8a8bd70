"""Time one training step of the small models, eager and compiled, and the share of the device.

    python benchmarks/train_step.py [--device cuda] [--models sessa-1m,mamba2-1m] [--tokens 378]

A model is timed only after its compiled losses have agreed with the eager ones over some steps. The
time is the median wall time of a step; "device" is the sum of its kernels' times, on CUDA only.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measure import machine, save, table, wall_ms
from torch.profiler import ProfilerActivity, profile

from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.data.batches import Batch, next_token_batch
from sessa_common.presets import PRESETS
from sessa_common.train_config import TrainConfig
from sessa_torch.training import TrainBackend

VOCABULARY, LEARNING_RATE = 613, 1e-3
AGREE_STEPS, AGREE = 3, 2e-2


def learner(name: str, tokens: int, device: str, compile: bool) -> TrainBackend:
    config = dataclasses.replace(
        PRESETS[name], vocab_size=VOCABULARY, max_position_embeddings=tokens
    )
    settings = TrainConfig(compile=compile)
    return TrainBackend(config, settings, initial_weights(config, 0), device)


def device_ms(step: Callable[[], Any], repeats: int = 5) -> float:
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in seen.key_averages()) / repeats / 1e3


def case(name: str, batch: Batch, device: str, repeats: int) -> dict[str, Any]:
    rows, tokens = batch.inputs.shape
    row: dict[str, Any] = {"model": name, "rows": rows, "tokens": tokens}
    losses = {}
    for kind, compile in (("eager", False), ("compiled", True)):
        model = learner(name, tokens, device, compile)

        def step(model: TrainBackend = model) -> float:
            return model.step([batch], LEARNING_RATE)[0]

        losses[kind] = [step() for _ in range(AGREE_STEPS)]
        if not np.allclose(losses[kind], losses["eager"], rtol=AGREE):
            return row | {"compiled ms": f"losses {losses} disagree, not timed"}
        # A step ends with a transfer of its loss, so the device has done its work.
        row[f"{kind} ms"] = round(wall_ms(step, repeats=repeats), 2)
        if device.startswith("cuda"):
            row[f"{kind} device ms"] = round(device_ms(step), 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", default="sessa-1m,transformer-1m,mamba2-1m")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=378)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--save", help="name of the file under benchmarks/results")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    batch = next_token_batch(rng.integers(0, VOCABULARY, (options.rows, options.tokens + 1)))
    print(machine(), flush=True)
    rows = [
        case(name, batch, options.device, options.repeats) for name in options.models.split(",")
    ]
    print(table(rows))
    if options.save:
        print(save(options.save, rows))


if __name__ == "__main__":
    main()
