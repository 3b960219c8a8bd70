"""`sessa build-op`: compile the native ONNX Runtime operator for this machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from sessa_cli.common import Stopwatch, make_console, print_json, say
from sessa_common.storage import atomic_path


def build_op(
    output: Annotated[
        Path | None, typer.Option(help="File or folder to copy the library to.")
    ] = None,
    cuda: Annotated[
        bool,
        typer.Option("--cuda", help="Add the CUDA kernels, for ONNX Runtime's CUDA provider."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Compile even when the library exists.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compile the native operator for ONNX Runtime on this machine and keep it in a cache.

    A C++17 compiler is needed: CXX, else c++, g++ or clang++; for --cuda also nvcc, of CUDA_HOME or
    in PATH. Exported models also run without the operator, but slower.

    Example: sessa build-op
    """
    from sessa_export.native import build

    watch = Stopwatch()
    path = build(cuda=cuda, force=force)
    seconds = watch.seconds
    if output is not None:
        path = _copy(path, output)
    if json_output:
        print_json({"library": str(path), "seconds": round(seconds, 2)})
    else:
        say(make_console(), f"{path} ({seconds:.1f} s)")


def _copy(library: Path, output: Path) -> Path:
    target = output / library.name if output.is_dir() else output
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as scratch:
        shutil.copyfile(library, scratch)
    return target
