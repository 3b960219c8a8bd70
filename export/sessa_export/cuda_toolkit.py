"""NVIDIA's compiler, for the CUDA kernels of the native operator."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sessa_common.errors import SessaError

# CMake's name for the architectures to compile for, such as "90" or "80;90".
ARCHITECTURES = "CUDAARCHS"
FOLDERS = ("CUDA_HOME", "CUDA_PATH")
DEFAULT_FOLDER = "/usr/local/cuda"
FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden")


@dataclass(frozen=True)
class Toolkit:
    """nvcc, and the architectures that it compiles for, such as ("90",)."""

    nvcc: Path
    architectures: tuple[str, ...]

    def commands(self, compiler: Sequence[str]) -> tuple[list[str], list[str]]:
        """The beginnings of a compilation and of the link, with `compiler` for what is not CUDA."""
        host = [str(self.nvcc), "-ccbin", compiler[0]]
        targets = [
            option
            for number in self.architectures
            for option in ("-gencode", f"arch=compute_{number},code=sm_{number}")
        ]
        top = self.nvcc.resolve().parent.parent
        folders = [f"-L{top / name}" for name in ("lib64", "lib") if (top / name).is_dir()]
        return [*host, *FLAGS, *targets], [*host, *folders, "-cudart", "static", "-shared"]


def find_toolkit() -> Toolkit:
    """nvcc of CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda, for this machine's GPUs or CUDAARCHS.

    Raises SessaError when there is no nvcc, or neither a GPU nor CUDAARCHS.
    """
    given = [os.environ[name] for name in FOLDERS if os.environ.get(name)]
    candidates = [Path(folder) / "bin" / "nvcc" for folder in given]
    if not given:
        found = shutil.which("nvcc")
        candidates = [Path(found)] if found else [Path(DEFAULT_FOLDER) / "bin" / "nvcc"]
    nvcc = next((path for path in candidates if path.is_file()), None)
    if nvcc is None:
        raise SessaError(
            f"no CUDA compiler found (looked for {', '.join(map(str, candidates))}); install the "
            "CUDA toolkit or name its folder in CUDA_HOME"
        )
    return Toolkit(nvcc, _architectures())


def _architectures() -> tuple[str, ...]:
    given = os.environ.get(ARCHITECTURES)
    if given:
        numbers = tuple(re.split(r"[;,\s]+", given.strip()))
        if not all(re.fullmatch(r"\d+[af]?", number) for number in numbers):
            raise SessaError(f"{ARCHITECTURES} is {given!r}, expected numbers such as 90 or 80;90")
        return numbers
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        said = ""
    found = sorted({line.replace(".", "") for line in re.findall(r"^\d+\.\d+$", said, re.M)})
    if not found:
        raise SessaError(
            f"no NVIDIA GPU found; name the architecture to compile for in {ARCHITECTURES}, as in "
            f"{ARCHITECTURES}=90"
        )
    return tuple(found)
