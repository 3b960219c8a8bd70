"""Measure training on the GPUs that are here: speed, memory, losses, one process beside several.

    python benchmarks/scale.py [--only step,operator] [--before FOLDER] [--save NAME]

With one GPU: training steps, and rows whose tokens two processes share. With two or more also data
parallelism, sharded weights and shared rows by NCCL, each beside one GPU. Without a GPU the same
cases run at small sizes, with gloo, as a check of this script. `--before` is a checkout of an older
version, whose compiled and eager steps of the first model are measured too. Every case runs in
processes of its own; one that fails leaves its error in the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine, median_ms, save, table
from model_operations import operations_per_token, peak_operations

ROOT = Path(__file__).parents[1]
GIB = 2**30
Row = dict[str, Any]


def cases(gpus: int) -> dict[str, list[Row]]:
    """Return the cases of each group; a case is what `step` or `operator` below takes."""
    small, many = gpus == 0, max(2, gpus)
    tokens, rows, long, longest = (32, 2, 64, 256) if small else (4096, 8, 65536, 1_000_000)
    medium, large = ("sessa-400k", "sessa-1m") if small else ("sessa-131m", "sessa-1b")
    base: Row = {"measure": "step", "model": medium, "tokens": tokens, "rows": rows}
    whole = {**base, "rows": rows * many}
    big = {**base, "model": large, "checkpoint_activations": "layers", "losses": 50}
    shared_row = {**base, "tokens": 128 if small else 262_144, "rows": 1} | {
        "checkpoint_activations": "layers"
    }
    solve: Row = {"measure": "operator", "width": 16 if small else 1024}
    shared = {"processes": 2, "context_parallel": 2}
    groups = {
        "step": [
            *({**base, "compile": not small, "model": name} for name in (medium, *rivals(medium))),
            {**base, "compile": not small, "checkpoint_activations": "layers"},
            {**base, "compile": False},
        ],
        "large": [{**big, "rows": rows}],
        "shared-device": [{**solve, "tokens": long}, {**solve, "tokens": long, **shared}],
    }
    if gpus != 1:
        groups |= {
            "data": [
                {**base, "compile": not small},
                {**whole, "compile": not small, "processes": many},
                {**whole, "compile": not small, "processes": many, "shard_processes": 0},
            ],
            "shard": [big, {**big, "processes": many, "shard_processes": 0}],
            "operator": [{**solve, "tokens": longest}, {**solve, "tokens": longest, **shared}],
            "long-row": [{**shared_row, **shared}],
        }
    return groups


def rivals(model: str) -> tuple[str, str]:
    size = model.split("-")[1]
    return f"transformer-{size}", f"transformer-{size}-deep"


def run_case(case: Row, before: Path | None = None) -> Row:
    """Run a case in processes of its own and return its row."""
    count = case.get("processes", 1)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [*(launcher if count > 1 else ()), __file__, "--case", json.dumps(case)]
    here = before or ROOT
    paths = os.pathsep.join(str(path) for path in (here, here / "export", Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, *command], env=os.environ | {"PYTHONPATH": paths}, capture_output=True
    )
    row = {"version": str(before)} if before else {}
    lines = [line for line in done.stdout.decode().splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        error = (done.stderr.decode().strip().splitlines() or ["no output"])[-1]
        return row | case | {"error": error[:200]}
    return row | case | json.loads(lines[-1])


def step(case: Row) -> Row:
    """Time training steps of a model on random tokens; tokens and memory are of all processes."""
    # An older version has these names in other modules.
    try:
        from sessa_common.presets import PRESETS
        from sessa_common.train_config import TrainConfig
    except ImportError:
        from sessa_common.config import PRESETS, TrainConfig
    from sessa_common.checkpoint.initialization import initial_weights
    from sessa_common.data.batches import next_token_batch
    from sessa_torch.training import TrainBackend

    T, rows = case["tokens"], case["rows"]
    vocabulary = 32_768 if torch.cuda.is_available() else 512
    config = dataclasses.replace(
        PRESETS[case["model"]], vocab_size=vocabulary, max_position_embeddings=T
    )
    names = ("compile", "checkpoint_activations", "shard_processes", "context_parallel")
    settings = TrainConfig(batch_size=rows, **{name: case[name] for name in names if name in case})
    backend = TrainBackend(config, settings, initial_weights(config, 0), None)
    batch = next_token_batch(np.random.default_rng(0).integers(0, vocabulary, (rows, T + 1)))
    losses: list[float] = []

    def train() -> None:
        losses.append(backend.step([batch], 3e-4)[0])

    reset_peak()
    time = median_ms(train, repeats=10, warm=5)
    row = {"ms": round(time, 2), "tokens/s": round(rows * T / time * 1e3)}
    if (peak := peak_operations(machine()["device"])) is not None:
        done = operations_per_token(config, T) * row["tokens/s"]
        row["utilisation"] = round(done / peak / case.get("processes", 1), 3)
    kept = held(backend)
    row |= kept | {"peak GiB a process": peak_gib()}
    while len(losses) < case.get("losses", 0):
        train()
    return row | ({"losses": losses} if "losses" in case else {})


def held(backend: Any) -> Row:
    """Return GiB of float32 weights, gradients and moments that this process holds."""

    def size(tensors: list[torch.Tensor]) -> float:
        local = (getattr(x, "_local_tensor", x) for x in tensors)
        return round(sum(x.numel() * x.element_size() for x in local) / GIB, 3)

    parameters = list(backend.parameters.values())
    states = backend.optimizer.state.values()
    return {
        "weights GiB": size(parameters),
        "gradients GiB": size([p.grad for p in parameters if p.grad is not None]),
        "moments GiB": size([x for state in states for x in state.values()]),
    }


def operator(case: Row) -> Row:
    """Time forward and backward pass of the solve alone, one row, in bfloat16 on a GPU.

    Up to 65,536 tokens, states and gradients of several processes are compared with those of one.
    """
    from sessa_torch.checkpoint import choose_device
    from sessa_torch.feedback import feedback_solve
    from sessa_torch.processes import open_processes

    T, D, device = case["tokens"], case["width"], choose_device(None)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, T, D)] * 3 + [(1, T), (1, T, D)]
    *inputs, cotangent = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    inputs[3] = inputs[3].tanh()
    solve: Callable[..., torch.Tensor] = feedback_solve
    own = slice(None)
    if open_processes().size > 1:
        from sessa_torch.distributed.context import ContextParallel

        context = ContextParallel(case["context_parallel"])
        context.own(torch.zeros(1, T))
        solve, own = context.feedback_solve, context.exchange.deal.places
    tensors = [x[:, own].to(device).requires_grad_() for x in inputs]
    given = cotangent[:, own].to(device)

    def run() -> list[torch.Tensor]:
        s = solve(*tensors)
        return [s.detach(), *torch.autograd.grad(s, tensors, given)]

    row: Row = {}
    if own != slice(None) and T <= 65_536:
        alone = [x.to(device).requires_grad_() for x in inputs]
        s = feedback_solve(*alone)
        right = [s.detach(), *torch.autograd.grad(s, alone, cotangent.to(device))]
        pairs = zip(run(), (x[:, own] for x in right), strict=True)
        row["largest error"] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
        del alone, right, s
    reset_peak()
    time = median_ms(run, repeats=3, warm=1)
    return row | {"ms": round(time, 1), "peak GiB a process": peak_gib()}


def reset_peak() -> None:
    """Let the peak memory of this process begin anew."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        # On Linux, writing 5 resets the high-water mark of the resident memory.
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    """Return the peak memory since `reset_peak`, on the GPU or of the process."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / GIB, 3)
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return round(int(status.split()[0]) / 2**20, 3)


def compare(rows: list[Row]) -> None:
    """Add to every row of several processes how it relates to the first row, of one process."""
    first = rows[0]
    for row in rows[1:]:
        if row.get("processes", 1) > 1 and "ms" in row and "ms" in first:
            work = row.get("rows", 1) * row["tokens"] / (first.get("rows", 1) * first["tokens"])
            row["times one process"] = round(work * first["ms"] / row["ms"], 2)
        if "losses" in row and "losses" in first:
            one, other = np.array(first["losses"]), np.array(row["losses"])
            row["losses differ by"] = float(np.abs(other / one - 1).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    groups = cases(torch.cuda.device_count())
    parser.add_argument("--only", default=",".join(groups), help="groups, of: " + ", ".join(groups))
    parser.add_argument("--before", type=Path, help="checkout of an older version")
    parser.add_argument("--save", help="name of the file under benchmarks/results")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        row = {"step": step, "operator": operator}[options.case["measure"]](options.case)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(row), flush=True)
        return
    print(machine(), f"{torch.cuda.device_count()} GPUs", flush=True)
    everything: list[Row] = []
    for name in options.only.split(","):
        rows = [run_case(case) for case in groups[name]]
        compare(rows)
        if options.before and name == "step":
            earlier = [groups[name][0], groups[name][-1]]
            rows += [run_case(case, options.before) for case in earlier]
        print(f"\n{name}\n", flush=True)
        print(table([{k: v for k, v in row.items() if k != "losses"} for row in rows]), flush=True)
        everything += [{"group": name} | row for row in rows]
    if options.save:
        print(save(options.save, everything))


if __name__ == "__main__":
    main()
