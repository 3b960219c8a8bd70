"""Tokenize synthetic text, train on the shards, and measure speed and anonymous memory.

    python benchmarks/data_scale.py [--bytes 10e9] [--steps 1000] [--jobs 1] [--folder data-scale]

The text is made of random words with the frequencies of Zipf's law, in .jsonl files. Tokenizing is
killed once and goes on. The memory is the largest sum of RssAnon (memory that no file stands
behind) over the processes of a command, every 50 ms; mapped shards do not count, because the
system can drop them. The model is tiny, so that almost all memory of training is the program and
the data. Prints a line as soon as a command has ended, and keeps it in --out. Ends with an error
where a command took more than --limit GiB.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, save, table

from sessa_common.data.token_shards import TokenShards
from sessa_common.training.metrics import read_metrics

FILE_BYTES = 250_000_000
WORDS = 50_000
SAMPLE_EVERY = 0.05
# A short context, because the head takes most of a step.
MODEL = ("--layers", 1, "--width", 16, "--heads", 2, "--context", 256, "--batch-size", 4)


def write_text(folder: Path, size: int, jobs: int) -> list[Path]:
    """Files of documents of 50 to 2,000 words, together about `size` bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [min(FILE_BYTES, size - start) for start in range(0, size, FILE_BYTES)]
    paths = [folder / f"text-{number:04}.jsonl" for number in range(len(sizes))]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        pool.starmap(write_file, zip(paths, sizes, range(len(sizes)), strict=True), chunksize=1)
    return paths


def write_file(path: Path, size: int, number: int) -> None:
    """Write one file, unless it is there; all files have the same words."""
    if path.exists():
        return
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = ["".join(rng.choice(letters, n)) for n in rng.integers(2, 11, WORDS)]
    odds = np.cumsum(1 / np.arange(1, WORDS + 1))
    rng = np.random.default_rng([1, number])
    scratch = path.with_suffix(".partial")
    with scratch.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            drawn = np.searchsorted(odds, rng.random(200_000) * odds[-1]).tolist()
            pool = [words[i] for i in drawn]
            ends = np.cumsum(rng.integers(50, 2000, 190)).tolist()
            for start, end in pairwise([0, *ends, len(pool)]):
                if text := " ".join(pool[start:end]):
                    file.write(json.dumps({"text": text}) + "\n")
    scratch.rename(path)


def anonymous(root: int) -> int:
    """Bytes of anonymous memory of a process and its children."""
    total, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        except OSError:
            continue
        lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
        total += 1024 * int(lines[0].split()[1]) if lines else 0
    return total


def run(*arguments: object, kill_when: Path | None = None) -> tuple[float, float, int]:
    """Run a command of `sessa`; seconds, processor seconds and the most anonymous memory.

    It is killed when the file `kill_when` appears.
    """
    began, worked, most = time.perf_counter(), processor_seconds(), 0
    command = [sys.executable, "-m", "sessa_cli.main", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            most = max(most, anonymous(process.pid))
            if kill_when is not None and kill_when.exists():
                process.send_signal(signal.SIGKILL)
            time.sleep(SAMPLE_EVERY)
    if process.returncode and kill_when is None:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return time.perf_counter() - began, processor_seconds() - worked, most


def processor_seconds() -> float:
    """Processor time of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Results:
    """The rows of the table, printed and kept one by one."""

    def __init__(self, out: Path | None) -> None:
        self.out, self.rows, self.worst = out, list[dict[str, Any]](), 0

    def add(self, command: str, seconds: float, work: float, memory: int) -> None:
        """Print and keep what a command took."""
        row = {
            "command": command,
            "seconds": f"{seconds:.1f}",
            "processor seconds": f"{work:.1f}",
            "anonymous GiB": f"{memory / 2**30:.2f}",
        }
        print("; ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        self.rows.append(row)
        self.worst = max(self.worst, memory)
        self.save()

    def save(self, facts: Sequence[dict[str, Any]] = ()) -> None:
        """Write the rows behind what is known of the run."""
        if self.out is not None:
            save("data_scale_cpu", [*facts, *self.rows], self.out)


def main() -> None:
    """Write the text, run the commands and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bytes", type=float, default=10e9)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--tokenizer", default="8192")
    parser.add_argument("--limit", type=float, default=2.0, help="GiB of anonymous memory")
    parser.add_argument("--folder", type=Path, default=Path("data-scale"))
    parser.add_argument("--out", type=Path, help="folder for the results as JSON")
    options = parser.parse_args()
    results, began = Results(options.out), time.perf_counter()
    texts = write_text(options.folder / "text", int(options.bytes), options.jobs)
    print(f"text written in {time.perf_counter() - began:.1f} s", flush=True)
    size = sum(path.stat().st_size for path in texts)
    tokens, work = options.folder / "tokens", options.folder / "tokens.partial"
    for old in (tokens, work, options.folder / "run"):
        subprocess.run(["rm", "-rf", old], check=True)
    shard = ("--shard-tokens", min(2**26, max(int(options.bytes) // 40, 1)))
    command = ("data", "tokenize", *texts, tokens, "--tokenizer", options.tokenizer, *shard)
    command = (*command, "--jobs", options.jobs)
    killed = run(*command, kill_when=work / "tokens-00001.bin")
    results.add("tokenize, killed after two shards", *killed)
    results.add("tokenize, gone on with", *run(*command))
    results.add("verify", *run("data", "verify", tokens))
    train = ("train", "--data", tokens, *MODEL, "--steps", options.steps, "--backend", "torch")
    train = (*train, "--device", "cpu", "--evaluate-every", 0, "--out", options.folder / "run")
    results.add(f"train, {options.steps:,} steps", *run(*train))
    shards = TokenShards(tokens)
    records = [r for r in read_metrics(options.folder / "run") if "loss" in r]
    if len(records) != options.steps:
        raise SystemExit(f"{len(records)} steps in the metrics, expected {options.steps}")
    facts = {
        "text": f"{size / 1e9:.2f} GB in {len(texts)} files",
        "tokens": f"{len(shards):,} in {len(shards.shards)} shards",
        "jobs": options.jobs,
        "loss": f"{records[0]['loss']:.2f} to {records[-1]['loss']:.2f}",
    }
    print("\n".join(f"{name}: {value}" for name, value in (machine() | facts).items()), "\n")
    print(table(results.rows))
    results.save([facts])
    if results.worst > options.limit * 2**30:
        raise SystemExit(f"{results.worst / 2**30:.2f} GiB, more than {options.limit:g}")


if __name__ == "__main__":
    main()
