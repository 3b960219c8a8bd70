"""Helpers of every benchmark: description of the machine, medians, peak memory, results file."""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sessa_common.markdown import markdown_table

RESULTS = Path(__file__).parent / "results"
MIB = 2**20


def machine() -> dict[str, Any]:
    """Device, versions and date of this run."""
    cuda, runtime = torch.cuda.is_available(), sys.modules.get("onnxruntime")
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **({"onnxruntime": runtime.__version__} if runtime else {}),
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    )
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    # `taskset` and containers may leave a process fewer cores than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.processor()}, {cores} cores"


def median_ms(run: Callable[[], Any], repeats: int = 5, warm: int = 2, calls: int = 1) -> float:
    """Median time of one run() in milliseconds, by events on CUDA and by the wall clock elsewhere.

    Every repeat times `calls` calls in a row, so that a pause before it weighs little.
    """
    if not torch.cuda.is_available():
        return wall_ms(run, repeats=repeats, warm=warm, calls=calls)
    for _ in range(warm):
        run()
    times = []
    for _ in range(repeats):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        for _ in range(calls):
            run()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / calls)
    return sorted(times)[repeats // 2]


def wall_ms(
    run: Callable[[], Any],
    *,
    repeats: int = 5,
    warm: int = 0,
    calls: int = 1,
    seconds: float = 0.0,
    wait: Callable[[Any], Any] = lambda result: None,
) -> float:
    """Median wall time of one run() in milliseconds; `wait` gets its result and ends its work.

    At least `repeats` repeats of `calls` calls are timed, and more until `seconds` have passed.
    """
    for _ in range(warm):
        wait(run())
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < repeats or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(calls):
            wait(run())
        times.append(1e3 * (time.perf_counter() - start) / calls)
    return sorted(times)[len(times) // 2]


def peak_mib(run: Callable[[], Any]) -> float:
    """Peak memory of run() above the memory held before it, in MiB."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    # On Linux, writing 5 resets the high-water mark; free pages are returned first.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return (_resident("VmHWM") - before) / 1024


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


def save(name: str, rows: list[dict[str, Any]], folder: Path = RESULTS) -> Path:
    """Write machine and rows as benchmarks/results/<name>.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """Format rows as a Markdown table, with the columns in the order they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return markdown_table(columns, [[str(row.get(name, "")) for name in columns] for row in rows])
