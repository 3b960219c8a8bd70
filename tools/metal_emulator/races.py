"""Data races in Metal kernels: the emulator under gcc's ThreadSanitizer.

`python tools/metal_emulator/races.py` replays the launches of feedback solves, their gradients and
decode steps, with MLX's text and with PyTorch's, in three modes, prints the number of races of each
and exits with 1 unless all are 0.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

TOOLS = Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path[:0] = [str(TOOLS), str(TOOLS.parent / "tests")]

from metal_emulator.build import DEVICE, THREADGROUP, Launch, Library, compiled  # noqa: E402

# The memory that a barrier orders, if its flags name it. The last two catch a wrong flag.
MODES = {
    "all memory": DEVICE | THREADGROUP,
    "threadgroup memory": THREADGROUP,
    "device memory": DEVICE,
}


def races(launches: list[Launch]) -> dict[str, str]:
    """ThreadSanitizer's reports by mode; a mode without a race is not there."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        index = []
        for i, launch in enumerate(launches):
            path, kernels = compiled(launch.text, "tsan")
            buffers = [np.frombuffer(array.tobytes(), np.uint8) for array in launch.arrays]
            np.savez(folder / f"{i}.npz", *buffers)
            index.append([str(path), list(kernels), launch.name, launch.grid, launch.threadgroup])
        (folder / "launches.json").write_text(json.dumps(index))
        reports = {mode: _replayed(folder, sync) for mode, sync in MODES.items()}
    return {mode: report for mode, report in reports.items() if report}


def _replayed(folder: Path, sync: int) -> str:
    """Report of ThreadSanitizer on one run of the launches in `folder`; empty without a race."""
    library = subprocess.run(
        ["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True
    )
    environment = os.environ | {
        "LD_PRELOAD": str(Path(library.stdout.strip()).resolve()),
        "TSAN_OPTIONS": "exitcode=66 history_size=4",
        "PYTHONPATH": str(TOOLS),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, "--replay", str(folder), str(sync)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 66):
        raise RuntimeError(f"the run under ThreadSanitizer failed:\n{done.stderr[-4000:]}")
    return done.stderr if done.returncode else ""


def _replay(folder: Path, sync: int) -> None:
    launches = json.loads((folder / "launches.json").read_text())
    for i, (path, kernels, name, grid, threadgroup) in enumerate(launches):
        with np.load(folder / f"{i}.npz") as stored:
            arrays = [stored[f"arr_{j}"] for j in range(len(stored.files))]
        Library(Path(path), kernels).run(name, arrays, tuple(grid), tuple(threadgroup), sync=sync)


def _feedback_launches() -> list[Launch]:
    """Every kernel, masked and not, with tiles cut by the edges, in both frameworks' texts."""
    from support.metal_cases import TWINS, Case, emulated

    cases = (
        Case(36, B=2, K=6, P=5, masked=True),
        Case(34),
        Case(1, P=40),
        Case(1, B=2, P=40, masked=True),
    )
    return [
        launch for twin in TWINS for case in cases for launch in emulated(twin, case, "float32")[1]
    ]


def main() -> int:
    """Print a line a mode; 1 if there is a race."""
    launches = _feedback_launches()
    reports = races(launches)
    for mode in MODES:
        report = reports.get(mode, "")
        count = report.count("WARNING: ThreadSanitizer")
        print(f"{mode}: {len(launches)} launches, {count} races")
        print(report[:4000], end="")
    return 1 if reports else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--replay"]:
        _replay(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        sys.exit(main())
