"""Times of the feedback solve beside the framework's causal attention."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from sessa_common.selftest.solve import Size, bind, draw
from sessa_common.selftest.twin import Twin

WARM, REPEATS = 2, 7
TIMED = {
    "cpu": (Size(1, 512, 256, 256), Size(1, 1, 256, 256, P=1024)),
    "gpu": (
        Size(1, 1024, 512, 512),
        Size(1, 4096, 512, 512),
        Size(4, 4096, 1024, 1024),
        Size(1, 1, 1024, 1024, P=4096),
    ),
}


@dataclass(frozen=True)
class Timing:
    """Median times in milliseconds of the feedback solve and the framework's causal attention."""

    framework: str
    device: str
    dtype: str
    shape: str
    solve: float
    attention: float
    solve_and_gradients: float | None
    attention_and_gradients: float | None


def measure_times(twin: Twin) -> Iterator[Timing]:
    """The times of each size and dtype that suit the device."""
    twin.use_device()
    on_cpu = twin.device == "cpu"
    for size in TIMED["cpu" if on_cpu else "gpu"]:
        for dtype in ("float32",) if on_cpu else ("float32", "bfloat16"):
            yield _measure(twin, size, dtype)


def _measure(twin: Twin, size: Size, dtype: str) -> Timing:
    drawn = {name: twin.array(array, dtype) for name, array in draw(size).items()}
    ds = drawn.pop("ds")
    run, arrays = bind(twin, drawn, "auto")
    B, T, P, heads = size.B, size.T, size.P, size.D // 64
    random = np.random.default_rng(1)
    q, k, v = (
        twin.array(random.standard_normal((B, heads, rows, 64), np.float32), dtype)
        for rows in (T, P + T, P + T)
    )
    pairs = [(run, arrays, ds), (twin.attention, [q, k, v], q)]
    forward, gradients = [], []
    for function, operands, upstream in pairs:
        forward.append(_median_ms(twin, partial(function, *operands)))
        back = partial(twin.vjp, function, operands, upstream)
        gradients.append(None if T == 1 else _median_ms(twin, back))
    shape = f"B{B} T{T}{f' P{P}' if P else ''} D{size.D}"
    return Timing(twin.name, twin.device_name, dtype, shape, *forward, *gradients)


def _median_ms(twin: Twin, run: Callable[[], Any]) -> float:
    times = []
    for _ in range(WARM + REPEATS):
        began = time.perf_counter()
        twin.wait(run())
        times.append(1e3 * (time.perf_counter() - began))
    return round(statistics.median(times[WARM:]), 3)
