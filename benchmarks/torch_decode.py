"""Time prompts and tokens in PyTorch on a CPU, by this code and by an older version of it.

    python benchmarks/torch_decode.py [--before FOLDER] [--out FOLDER] [--tokens 1024] [--rounds 15]

FOLDER holds the older packages, as `git archive COMMIT sessa_common sessa_torch` writes them. Each
version runs in a process of its own and reads the same ids. The logits must agree before anything
is timed. In every round the versions take turns. Times are medians over the rounds, of tokens the
median of a round first; a ratio is the median of the ratios of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from measure import RESULTS, machine, save, table

WORKER = Path(__file__).with_name("torch_decode_worker.py")
LIMIT = 1e-4
# After a run, the threads of a process keep a core busy for a moment.
REST_SECONDS = 0.05


class Version:
    """A process that decodes by the packages in a folder."""

    def __init__(self, name: str, folder: Path, preset: str, length: int) -> None:
        self.name = name
        self.prompts: list[float] = []
        self.steps: list[float] = []
        path = [str(folder.resolve()), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), preset, str(length)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self) -> np.ndarray:
        """Time a prompt and the tokens after it; return the last logits (V,)."""
        assert self.process.stdin is not None and self.process.stdout is not None
        time.sleep(REST_SECONDS)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{self.name}: the process ended, its message is above")
        (prompt, *steps), logits = json.loads(line)
        self.prompts.append(prompt)
        self.steps.append(statistics.median(steps))
        return np.array(logits)


def rows(versions: list[Version], length: int) -> list[dict[str, Any]]:
    """A row of the table for each version; ratios are to the first version."""
    found = []
    for version in versions:
        row: dict[str, Any] = {"code": version.name}
        for name, pick in (
            (f"prompt of {length}", attrgetter("prompts")),
            (f"token after {length}", attrgetter("steps")),
        ):
            # The first round is a warm-up.
            first, mine = pick(versions[0])[1:], pick(version)[1:]
            row[f"{name} (ms)"] = round(1e3 * statistics.median(mine), 2)
            ratios = [a / b for a, b in zip(first, mine, strict=True)]
            row[f"{name}: times as fast"] = round(statistics.median(ratios), 2)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--preset", default="sessa-9m")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(machine(), flush=True)
    folders = {"before": options.before, "now": Path(__file__).parents[1]}
    versions = [
        Version(name, folder, options.preset, options.tokens)
        for name, folder in folders.items()
        if folder is not None
    ]
    logits = [version.run() for version in versions]
    error = np.abs(logits[0] - logits[-1]).max() / np.abs(logits[0]).max()
    if not error <= LIMIT:
        raise SystemExit(f"the logits differ by {error:.1e} of the largest, not timed")
    print(f"the logits differ by {error:.1e} of the largest", flush=True)
    for _ in range(options.rounds):
        for version in versions:
            version.run()
        save("torch_decode_cpu", rows(versions, options.tokens), options.out)
    print(table(rows(versions, options.tokens)))


if __name__ == "__main__":
    main()
