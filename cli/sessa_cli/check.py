"""`sessa check`: compare every installed runtime with the reference."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sessa_cli.common import FAILED, make_console, print_json
from sessa_common.reference.parity import TOLERANCE

if TYPE_CHECKING:
    from sessa_export.runtime_check import RuntimeCheck


def check(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    exported: Annotated[
        Path | None,
        typer.Option(
            "--export", help="Folder that sessa export wrote; a temporary one if not given."
        ),
    ] = None,
    onnx_device: Annotated[
        str | None,
        typer.Option(help="Device that ONNX Runtime runs on, such as cuda. Default: cpu."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random tokens.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare PyTorch, MLX and ONNX Runtime with the float64 NumPy reference.

    Exit code 1 when a runtime disagrees. A runtime that is not installed, or that cannot run a
    layer of the model, is skipped and named.

    Example: sessa check runs/first
    """
    # MLX reads this at its first product. Without it a float32 model runs in TF32 on an M5, and its
    # logits differ by more than is allowed here.
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    from sessa_export import check as check_runtimes

    found = check_runtimes(checkpoint, exported, seed=seed, onnx_device=onnx_device)
    ok = all(runtime.ok for runtime in found)
    if json_output:
        runtimes = {runtime.runtime: _as_json(runtime) for runtime in found}
        print_json({"ok": ok, "tolerance": TOLERANCE, "runtimes": runtimes})
    else:
        make_console().print(_table(found))
    if not ok:
        raise typer.Exit(FAILED)


def _as_json(runtime: RuntimeCheck) -> Any:
    if runtime.skipped:
        return runtime.skipped
    return [
        {"case": r.case, "difference": r.difference, "agreement": r.agreement, "ok": r.ok}
        for r in runtime.results
    ]


def _table(found: list[RuntimeCheck]) -> Table:
    table = Table(title=f"against float64 NumPy; at most {TOLERANCE:.0e} of the largest logit")
    for heading in ("runtime", "tokens", "largest difference", "same greedy token", ""):
        table.add_column(heading)
    for runtime in found:
        if runtime.skipped:
            table.add_row(runtime.runtime, runtime.skipped)
        for r in runtime.results:
            verdict = "ok" if r.ok else "DISAGREES"
            row = (r.case, f"{r.difference:.1e}", f"{r.agreement:.1%}", verdict)
            table.add_row(runtime.runtime, *row)
    return table
