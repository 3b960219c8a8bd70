"""Write every Metal text of the feedback solve and, on a Mac, compile each with Apple's compiler.

    python tools/compile_metal.py FOLDER

FOLDER receives the text for PyTorch and the texts that MLX would hand to Metal, as it exports them,
under the headers that its package ships. No GPU is needed. On a Mac every text is compiled in each
version of the language that the newest Xcode and the chosen one know, without fast math, and
compile.log keeps what the compiler says. Exit code 1 if a text is refused, or if the compiler is
missing on a Mac; elsewhere the texts are only written.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from itertools import product
from pathlib import Path

import mlx.core as mx

TOOLS = Path(__file__).parent
sys.path[:0] = [str(TOOLS), str(TOOLS.parent)]

from metal_emulator.mlx_side import PREAMBLE, exported_kernels  # noqa: E402

from sessa_mlx.feedback import metal  # noqa: E402

# Versions of the language: the first two are required, from macOS 14 and 15 on.
STANDARDS = ("metal3.1", "metal3.2", "metal4.0")
REQUIRED = STANDARDS[:2]
MLX_HEADER = '#include "mlx/backend/metal/kernels/utils.h"\n'
MLX_INCLUDE = Path(mx.__file__).parent / "include"
XCODES = Path("/Applications")
# Solves of (B, T, P, D): two block rows; a past; one new token; and inputs of fewer than 8
# elements, which MLX binds as constants.
SIZES = ((2, 300, 0, 20), (2, 70, 5, 20), (2, 1, 40, 20), (1, 2, 1, 3), (1, 1, 1, 3))


def texts() -> dict[str, str]:
    """Every text by the name of its file."""
    shared = files("sessa_common").joinpath("kernels/feedback_solve.metal").read_text("ascii")
    found = {"torch": shared}
    for size, dtype, masked in product(SIZES, metal.STORAGE, (False, True)):
        for call in _mlx_kernels(*size, dtype, masked):
            name = re.sub(r"\W", "_", call["name"].removeprefix("custom_kernel_sessa_"))
            found[f"mlx_{name}"] = MLX_HEADER + call["text"].removeprefix(PREAMBLE)
    return found


def _mlx_kernels(
    B: int, T: int, P: int, D: int, dtype: mx.Dtype, masked: bool
) -> Iterator[dict[str, str]]:
    """The kernels of one solve and of its gradients, which are traced and not run."""
    K = D // 2 + 1
    f, s, ds = (mx.zeros((B, T, D), dtype) for _ in range(3))
    q, k = mx.zeros((B, T, K), dtype), mx.zeros((B, P + T, K), dtype)
    gamma, lse = mx.zeros((B, T), mx.float32), mx.zeros((B, T), mx.float32)
    past_s = mx.zeros((B, P, D), dtype) if P else None
    key_mask = mx.ones((B, P + T), mx.bool_) if masked else None
    options = {"past_s": past_s, "key_mask": key_mask}
    yield from exported_kernels(lambda *a: metal.solve_forward(*a, **options), f, q, k, gamma)
    given = (ds, q, k, gamma, s, lse)
    yield from exported_kernels(lambda *a: _present(metal.solve_backward(*a, **options)), *given)


def _present(results: tuple[mx.array | None, ...]) -> list[mx.array]:
    return [result for result in results if result is not None]


def developer_folders() -> list[Path | None]:
    """The chosen Xcode (None) and the newest one, which may be the same."""
    installed = sorted(XCODES.glob("Xcode*.app/Contents/Developer"), key=_version)
    return [None, *installed[-1:]]


def _version(folder: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(folder))]


def compile_one(source: Path, standard: str, developer: Path | None) -> tuple[bool, str]:
    """Compile a text: whether it is accepted, and what the compiler says."""
    options = [f"-std={standard}", "-fno-fast-math", "-Wall", f"-I{MLX_INCLUDE}"]
    environment = os.environ | ({} if developer is None else {"DEVELOPER_DIR": str(developer)})
    with tempfile.TemporaryDirectory() as scratch:
        command = ["xcrun", "-sdk", "macosx", "metal", *options]
        command += ["-c", str(source), "-o", f"{scratch}/text.air"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode == 0, done.stderr


def compile_all(folder: Path) -> int:
    """Compile every text of a folder, print a line a compiler and version, return the exit code."""
    sources = sorted(folder.glob("*.metal"))
    log: list[str] = []
    known: set[str] = set()
    refused = 0
    for developer, standard in product(developer_folders(), STANDARDS):
        name = f"{developer or 'chosen Xcode'}, {standard}"
        if not _is_known(standard, developer, log):
            print(f"{name}: not known to this compiler")
            continue
        known.add(standard)
        results = {source.name: compile_one(source, standard, developer) for source in sources}
        for text, (accepted, said) in results.items():
            log.append(f"== {name}, {text}: {'accepted' if accepted else 'REFUSED'}\n{said}")
        bad = [text for text, (accepted, _) in results.items() if not accepted]
        print(f"{name}: {len(sources) - len(bad)} of {len(sources)} texts accepted")
        print("".join(f"    REFUSED: {text}\n" for text in bad), end="")
        refused += len(bad)
    (folder / "compile.log").write_text("\n".join(log) + "\n")
    missing = [standard for standard in REQUIRED if standard not in known]
    if missing:
        print(f"no compiler here knows {' and '.join(missing)}; Xcode 26 and later fetch theirs by")
        print("    xcodebuild -downloadComponent MetalToolchain")
    if refused or missing:
        print(f"what the compiler says is in {folder}/compile.log")
    return 1 if refused or missing else 0


def _is_known(standard: str, developer: Path | None, log: list[str]) -> bool:
    """True if the compiler is there and takes an empty text in this version of the language."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "empty.metal"
        source.write_text("kernel void nothing() {}\n")
        known, said = compile_one(source, standard, developer)
    if not known:
        log.append(f"== {developer or 'chosen Xcode'}, {standard}: not known\n{said}")
    return known


def main() -> int:
    """Write the texts, and compile them on a Mac."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts().items():
        (folder / f"{name}.metal").write_text(text, "ascii")
    print(f"{folder}: {len(list(folder.glob('*.metal')))} texts written")
    if sys.platform == "darwin":
        return compile_all(folder)
    print("not a Mac: the texts are not compiled")
    return 0


if __name__ == "__main__":
    sys.exit(main())
