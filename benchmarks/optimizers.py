"""Compare AdamW and Muon: held-out loss of one model after the same steps on the same text.

    OMP_NUM_THREADS=1 nice python benchmarks/optimizers.py [--preset sessa-400k] [--data pydoc]
        [--steps 250] [--rows 8] [--length 256] [--rates 3e-3,1e-2,3e-2] [--seeds 3]
        [--device cpu] [--backends torch,mlx] [--out FOLDER]

Called again with the same options and --out, it goes on behind the runs that it made. Each
optimizer trains at every learning rate with seed 0 in the first backend. The rate with the
lowest held-out loss is then taken for the other seeds, and for seed 0 in the other backends.
The losses of both backends must be near. Processor seconds, the median over the runs of the first
backend and over that of AdamW, include reading text and evaluation.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import RESULTS, machine, save, table

OPTIMIZERS = ("adamw", "muon")
NAME = f"optimizers_cpu_{datetime.date.today()}"


class Runs:
    """Training runs in a temporary folder, and a row for each, also for earlier ones in `out`."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        path = options.out / f"{NAME}.json"
        before = json.loads(path.read_text())["rows"] if path.exists() else []
        self.rows: list[dict[str, Any]] = [row for row in before if "seed" in row]

    def train(self, backend: str, optimizer: str, rate: float, seed: int) -> float:
        """Train, unless that was done before, and return the held-out loss in nats."""
        options, began = self.options, time.process_time()
        run = {"backend": backend, "optimizer": optimizer, "learning rate": rate, "seed": seed}
        key = {"preset": options.preset, "steps": options.steps, "rows": options.rows, **run}
        for row in self.rows:
            if all(row[name] == value for name, value in key.items()):
                return float(row["held-out loss"])
        tokenizers = [str(path) for path in self.folder.glob("*/tokenizer.json")]
        result = importlib.import_module(f"sessa_{backend}").train(
            self.folder / f"{backend}-{optimizer}-{rate:g}-{seed}",
            preset=options.preset,
            data=options.data,
            tokenizer=tokenizers[0] if tokenizers else None,
            steps=options.steps,
            batch_size=options.rows,
            sequence_length=options.length,
            warmup_steps=options.steps // 10,
            optimizer=optimizer,
            learning_rate=rate,
            seed=seed,
            evaluate_every=0,
            evaluate_batches=options.evaluate_batches,
            checkpoint_every=0,
            device=options.device,
        )
        loss = float(result.metrics["validation_loss"])
        row = {**key, "held-out loss": round(loss, 4)}
        self.rows.append({**row, "CPU s": round(time.process_time() - began, 1)})
        print(self.rows[-1], flush=True)
        save(NAME, self.rows, options.out)
        return loss


def summary(rows: list[dict[str, Any]], best: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each optimizer: best rate, loss over the seeds, loss of seed 0 in each backend."""
    first = rows[0]["backend"]
    seconds = {
        name: statistics.median(
            row["CPU s"] for row in rows if (row["optimizer"], row["backend"]) == (name, first)
        )
        for name in OPTIMIZERS
    }
    found = []
    for name in OPTIMIZERS:
        kind = (name, best[name])
        own = [row for row in rows if (row["optimizer"], row["learning rate"]) == kind]
        losses = [row["held-out loss"] for row in own if row["backend"] == first]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        found.append(
            {
                "optimizer": name,
                "learning rate": best[name],
                f"loss, {len(losses)} seeds": f"{statistics.mean(losses):.3f} ± {spread:.3f}",
                **{f"{r['backend']}, seed 0": r["held-out loss"] for r in own if r["seed"] == 0},
                "CPU time": round(seconds[name] / seconds["adamw"], 2),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="sessa-400k")
    parser.add_argument("--data", nargs="+", default=["pydoc"])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rates", default="3e-3,1e-2,3e-2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluate-batches", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backends", default="torch,mlx")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    print(machine(), flush=True)
    rates = [float(rate) for rate in options.rates.split(",")]
    first, *others = options.backends.split(",")
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(options, Path(folder))
        for name in OPTIMIZERS:
            best[name] = min(rates, key=lambda rate: runs.train(first, name, rate, 0))
            for seed in range(options.seeds):
                runs.train(first, name, best[name], seed)
            for backend in others:
                runs.train(backend, name, best[name], 0)
    rows = summary(runs.rows, best)
    save(NAME, [*rows, *runs.rows], options.out)
    print(table(rows), flush=True)


if __name__ == "__main__":
    main()
