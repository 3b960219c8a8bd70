"""Time an exported model in ONNX Runtime and in PyTorch on a CPU: prefill, decode, load time, size.

python benchmarks/exported_model.py [--out FOLDER] [--preset sessa-9m] [--tokens 1024] [--rounds 5]

The native operator is built first, which needs a C++ compiler. Every export passes the float64
check of `sessa export` before it is timed, and the float32 exports are compared with PyTorch on the
timed tokens too. All runtimes take turns in every round and use the same number of threads. Figures
are medians over the rounds. The table is written after every round.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import RESULTS, machine, save, table

from sessa_common.checkpoint.folder import save_weights
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.inference.generation import Decoder
from sessa_common.presets import PRESETS
from sessa_common.reference.parity import TOLERANCE
from sessa_export import native
from sessa_export.exporter import Options, export_checkpoint
from sessa_export.quantization import DTYPES
from sessa_export.runtime import load_decoder
from sessa_torch.decoding import load_decoder as load_torch

STEPS = 16
LOADS = 5
BASE = "PyTorch"
# After a run, the runtime's threads keep a core busy for a moment.
REST_SECONDS = 0.05


class Runtime(NamedTuple):
    """One line of the table."""

    name: str
    dtype: str
    layout: str
    folder: Path
    load: Callable[[], Decoder]


def make_runtimes(root: Path, preset: str, context: int, threads: int) -> list[Runtime]:
    """A checkpoint with random weights in PyTorch, and its exports in ONNX Runtime."""
    config = dataclasses.replace(PRESETS[preset], max_position_embeddings=context)
    checkpoint = root / "checkpoint"
    checkpoint.mkdir()
    save_weights(checkpoint, config, initial_weights(config, 0))
    native.build()
    runtimes = [
        Runtime(BASE, "fp32", "", checkpoint, partial(load_torch, checkpoint, device="cpu"))
    ]
    for layout, dtype in product(("natural", "buffer"), DTYPES):
        folder = root / f"{layout}-{dtype}"
        report = export_checkpoint(checkpoint, folder, Options(dtype=dtype, layout=layout))
        worst = max(r.difference for results in report.results.values() for r in results)
        print(f"{layout} {dtype}: logits to {worst:.1e} of the largest", flush=True)
        for operator in (False, True) if dtype == "fp32" else (True,):
            name = "ONNX Runtime, native operator" if operator else "ONNX Runtime"
            load = partial(load_decoder, folder, threads=threads, native=operator)
            runtimes.append(Runtime(name, dtype, layout, folder, load))
    return runtimes


def require_agreement(decoders: dict[Runtime, Decoder], tokens: np.ndarray) -> None:
    """Compare the float32 runtimes on the tokens that will be timed."""
    found = {}
    for runtime, decoder in decoders.items():
        if runtime.dtype == "fp32":
            decoder.reset()
            single = (tokens[:, i : i + 1] for i in range(STEPS))
            found[runtime] = np.stack([decoder.step(piece) for piece in (tokens, *single)])
    want = next(logits for runtime, logits in found.items() if runtime.name == BASE)
    for runtime, got in found.items():
        error = np.abs(got - want).max() / np.abs(want).max()
        if not error <= TOLERANCE:
            raise SystemExit(f"{runtime.name}: differs from PyTorch by {error:.1e}, not timed")


def clock(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def time_once(decoder: Decoder, tokens: np.ndarray) -> tuple[float, list[float]]:
    """Seconds of the prefill, and of every decoded token after it."""
    time.sleep(REST_SECONDS)
    decoder.reset()
    whole = clock(lambda: decoder.step(tokens))
    return whole, [clock(lambda: decoder.step(tokens[:, :1])) for _ in range(STEPS)]


def measure(runtimes: list[Runtime], length: int, rounds: int, out: Path) -> list[dict[str, Any]]:
    decoders = {runtime: runtime.load() for runtime in runtimes}
    vocab_size = next(iter(decoders.values())).config.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab_size, (1, length))
    require_agreement(decoders, tokens)
    loads = {r: np.median([clock(r.load) for _ in range(LOADS)]) for r in runtimes}
    print("the float32 runtimes agree, and all were loaded", flush=True)
    times: dict[Runtime, list] = {runtime: [] for runtime in runtimes}
    rows: list[dict[str, Any]] = []
    # The first round is a warm-up.
    for turn in range(rounds + 1):
        for runtime, decoder in decoders.items():
            found = time_once(decoder, tokens)
            times[runtime] += [found] if turn else []
        if turn:
            medians = {
                r: (median(a for a, _ in x), median(b for _, b in x)) for r, x in times.items()
            }
            rows = [row(r, medians, loads[r], length) for r in runtimes]
            save("exported_model", rows, out)
            print(f"round {turn} of {rounds}", flush=True)
    return rows


def median(values: Iterable[Any]) -> float:
    return float(np.median(list(values)))


def row(
    runtime: Runtime, medians: dict[Runtime, tuple[float, float]], load: float, length: int
) -> dict[str, Any]:
    base = next(value for other, value in medians.items() if other.name == BASE)
    prefill, token = medians[runtime]
    size = sum(file.stat().st_size for file in runtime.folder.iterdir())
    return {
        "runtime": runtime.name,
        "weights": runtime.dtype,
        "layout": runtime.layout,
        f"prefill {length} (ms)": round(1e3 * prefill, 1),
        "x PyTorch": round(base[0] / prefill, 2),
        f"decode after {length} (tokens/s)": round(1 / token, 1),
        "x PyTorch ": round(base[1] / token, 2),
        "load (ms)": round(1e3 * load),
        "folder (MB)": round(size / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="sessa-9m")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="sessa-bench-") as root:
        threads = torch.get_num_threads()
        runtimes = make_runtimes(Path(root), args.preset, 2 * args.tokens, threads)
        print(table(measure(runtimes, args.tokens, args.rounds, args.out)))


if __name__ == "__main__":
    main()
