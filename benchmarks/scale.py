"""Measure training on the GPUs that are here: speed, memory, losses, one process beside several.

    python benchmarks/scale.py [--only step,operator] [--before FOLDER] [--save NAME] [--out FOLDER]

With one GPU: training steps, and rows whose tokens two processes share. With two or more also data
parallelism, sharded weights and shared rows by NCCL, each beside one GPU. Without a GPU the same
cases run at small sizes, with gloo, as a check of this script. `--before` is a checkout of an older
version, whose compiled and eager steps of the first model are measured too. Every case runs in
processes of its own; one that fails leaves its error in the table. Cases prepare together, because
compiling leaves the GPU idle, and are measured one after the other. Each is printed, and saved with
`--save`, as soon as it is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from measure import RESULTS, machine, median_ms, save, table

from sessa_common.config import SessaConfig

ROOT = Path(__file__).parents[1]
GIB = 2**30
Row = dict[str, Any]
# A case, and the checkout of an older version that it is measured on.
Case = tuple[Row, Path | None]
# Cases that prepare at the same time. Their memory must fit a GPU.
TOGETHER = 5
# Random tokens by Zipf's law: batches of them, and the rate of a step, which rises at first.
BATCHES = 60
LEARNING_RATE, WARM_UP = 3e-4, 1000
# The variable that names the file a case waits for.
TURN = "SCALE_TURN"


def cases(gpus: int) -> dict[str, list[Row]]:
    """Return the cases of each group; a case is what `step` or `operator` below takes."""
    small, many = gpus == 0, max(2, gpus)
    tokens, rows, long, longest = (32, 2, 64, 256) if small else (4096, 8, 65536, 1_000_000)
    medium, large = ("sessa-400k", "sessa-1m") if small else ("sessa-131m", "sessa-1b")
    base: Row = {"measure": "step", "model": medium, "tokens": tokens, "rows": rows}
    fast = {**base, "compile": not small}
    whole = {**fast, "rows": rows * many, "processes": many}
    big = {**fast, "model": large, "checkpoint_activations": "layers", "losses": 50, "repeats": 5}
    shared_row = {**base, "tokens": 128 if small else 262_144, "rows": 1, "repeats": 1, "warm": 0}
    shared_row |= {"checkpoint_activations": "layers"}
    solve: Row = {"measure": "operator", "width": 16 if small else 1024}
    slow = {**solve, "tokens": longest, "repeats": 1}
    shared = {"processes": 2, "context_parallel": 2}
    groups = {
        "step": [
            {**fast, "parts": True},
            *({**fast, "model": name} for name in rivals(medium)),
            *({**fast, "checkpoint_activations": way} for way in ("selective", "layers")),
            {**base, "compile": False},
        ],
        "large": [{**big, "losses": 0}],
        "shared-device": [{**solve, "tokens": long}, {**solve, "tokens": long, **shared}],
    }
    if gpus != 1:
        groups |= {
            "data": [fast, whole, {**whole, "shard_processes": 0}],
            "shard": [big, {**big, "processes": many, "shard_processes": 0}],
            "operator": [slow, slow | shared],
            "long-row": [{**shared_row, **shared}],
        }
    return groups


def rivals(model: str) -> tuple[str, str]:
    size = model.split("-")[1]
    return f"transformer-{size}", f"transformer-{size}-deep"


@dataclasses.dataclass
class Started:
    """A case in processes of its own, which wait for the file `turn` before they measure."""

    case: Row
    before: Path | None
    process: subprocess.Popen[str]
    errors: IO[str]
    turn: Path


def start(case: Row, before: Path | None, turn: Path, gpu: int) -> Started:
    """Start a case, on one GPU if it has one process."""
    count = case.get("processes", 1)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [*(launcher if count > 1 else ()), __file__, "--case", json.dumps(case)]
    here = before or ROOT
    paths = os.pathsep.join(str(path) for path in (here, here / "export", Path(__file__).parent))
    # Otherwise every process starts as many compilers as there are cores.
    threads = max(1, (os.cpu_count() or 1) // TOGETHER)
    added = {"PYTHONPATH": paths, "TORCHINDUCTOR_COMPILE_THREADS": str(threads), TURN: str(turn)}
    if count == 1:
        added["CUDA_VISIBLE_DEVICES"] = str(gpu)
    # A full pipe would stop a process whose errors nobody reads yet.
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | added,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    return Started(case, before, process, errors, turn)


def run_cases(cases: list[Case], folder: Path, gpus: int) -> Iterator[Row]:
    """Prepare cases together, and yield their rows; a GPU measures one case at a time."""
    started = [start(*case, folder / f"turn-{i}", i % max(1, gpus)) for i, case in enumerate(cases)]
    for one in started:
        assert one.process.stdout is not None
        # Other lines are a library's.
        while (line := one.process.stdout.readline()) and line != "prepared\n":
            continue
    for group in on_gpus_of_their_own(started, gpus):
        for one in group:
            one.turn.touch()
        yield from map(finish, group)


def on_gpus_of_their_own(started: list[Started], gpus: int) -> Iterator[list[Started]]:
    """Yield cases that measure at the same time: of one process each, on different GPUs."""
    group: list[Started] = []
    for one in started:
        several = one.case.get("processes", 1) > 1
        if group and (several or len(group) == max(1, gpus)):
            yield group
            group = []
        group.append(one)
        if several:
            yield group
            group = []
    if group:
        yield group


def finish(one: Started) -> Row:
    """Return the row of a case when it has ended."""
    output = one.process.communicate()[0]
    row = ({"version": str(one.before)} if one.before else {}) | one.case
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not one.process.returncode and lines:
        return row | json.loads(lines[-1])
    one.errors.seek(0)
    text = one.errors.read().strip()
    print(text[-3000:], file=sys.stderr, flush=True)
    named = [line for line in text.splitlines() if "Error" in line]
    return row | {"error": (named or ["no output"])[-1][:200]}


def waves(cases: list[Case]) -> Iterator[list[Case]]:
    """Yield cases that prepare together, those of one process first."""
    for i in range(0, len(cases), TOGETHER):
        yield sorted(cases[i : i + TOGETHER], key=lambda case: case[0].get("processes", 1))


def wait_for_turn() -> None:
    """Say that this process is prepared, and wait until it may measure."""
    if os.environ.get("RANK", "0") == "0":
        print("prepared", flush=True)
    while not os.path.exists(os.environ[TURN]):
        time.sleep(0.05)


def prepare(case: Row) -> tuple[Any, SessaConfig, Callable[[], float]]:
    """Return the backend, the model's configuration and a training step, which has run once."""
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
    rng, odds = np.random.default_rng(0), 1 / np.arange(1, vocabulary + 1)
    draws = (rng.choice(vocabulary, (rows, T + 1), p=odds / odds.sum()) for _ in range(BATCHES))
    batches = [next_token_batch(tokens) for tokens in draws]
    steps = itertools.count()

    def train() -> float:
        i = next(steps)
        rate = LEARNING_RATE * min(1, (i + 1) / WARM_UP)
        loss: float = backend.step([batches[i % BATCHES]], rate)[0]
        return loss

    # A replayed CUDA graph allocates nothing, so the peak is that of the first steps.
    reset_peak()
    train()
    return backend, config, train


def step(case: Row) -> Row:
    """Time training steps of a model on random tokens; tokens and memory are of all processes."""
    backend, config, train = prepare(case)
    wait_for_turn()
    losses: list[float] = []
    repeats, warm = case.get("repeats", 10), case.get("warm", 2)
    ms = median_ms(lambda: losses.append(train()), repeats=repeats, warm=warm)
    row = {"ms": round(ms, 2), "tokens/s": round(case["rows"] * case["tokens"] / ms * 1e3)}
    row |= utilisation(config, case, row["tokens/s"]) | held(backend)
    row |= {"peak GiB a process": peak_gib()}
    while len(losses) < case.get("losses", 0):
        losses.append(train())
    if case.get("parts"):
        row |= parts(train)
    return row | ({"losses": losses} if case.get("losses") else {})


def parts(train: Callable[[], float], steps: int = 3) -> Row:
    """Return milliseconds of a training step by kind of kernel, where the version counts them."""
    try:
        from sessa_torch._profile import milliseconds_by_kind, trace
    except ImportError:
        return {}
    with trace() as profiler:
        for _ in range(steps):
            train()
    return milliseconds_by_kind(profiler, steps)


def utilisation(config: SessaConfig, case: Row, rate: float) -> Row:
    """Return the model-FLOP utilisation, where the version counts operations."""
    try:
        from sessa_common.training.operations import operations_per_token, peak_operations
    except ImportError:
        return {}
    peak = peak_operations(machine()["device"])
    if peak is None:
        return {}
    done = operations_per_token(config, case["tokens"]) * rate
    return {"utilisation": round(done / peak / case.get("processes", 1), 3)}


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
    run()
    wait_for_turn()
    reset_peak()
    ms = median_ms(run, repeats=case.get("repeats", 3), warm=0)
    return row | {"ms": round(ms, 1), "peak GiB a process": peak_gib()}


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
    parser.add_argument("--save", help="name of the file of results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of that file")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        measures = {"step": step, "operator": operator}
        row = measures[options.case["measure"]](options.case)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(row), flush=True)
        return
    print(machine(), f"{torch.cuda.device_count()} GPUs", flush=True)
    names = options.only.split(",")
    chosen: list[Case] = []
    for name in names:
        chosen += [({"group": name} | case, None) for case in groups[name]]
        if options.before and name == "step":
            earlier = [({"group": name} | groups[name][i], options.before) for i in (0, -1)]
            chosen += earlier
    rows: list[Row] = []
    for wave in waves(chosen):
        with tempfile.TemporaryDirectory() as folder:
            for row in run_cases(wave, Path(folder), torch.cuda.device_count()):
                print(json.dumps(without_losses(row)), flush=True)
                rows.append(row)
                if options.save:
                    save(options.save, rows, options.out)
    for name in names:
        found = [row for row in rows if row["group"] == name]
        compare(found)
        print(f"\n{name}\n", flush=True)
        print(table([without_losses(row) for row in found]), flush=True)
    if options.save:
        print(save(options.save, rows, options.out))


def without_losses(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "losses"}


if __name__ == "__main__":
    main()
