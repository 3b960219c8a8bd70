"""`sessa check`: the same tokens through every runtime that is installed."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from sessa_cli.common import framework, is_installed, make_console, print_json
from sessa_common.checkpoint.folder import load_weights
from sessa_common.config import SessaConfig
from sessa_common.reference.parity import TOLERANCE, Case, Result, compare, make_cases, tolerance_of

Weights = Mapping[str, np.ndarray]
# What a runtime made of the cases, or why it was not asked.
Outcome = list[Result] | str
ABSENT = "not installed"


def check(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    exported: Annotated[
        Path | None,
        typer.Option(
            "--export", help="Folder that sessa export wrote; a temporary one if not given."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random tokens.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare PyTorch, MLX and ONNX Runtime with the float64 NumPy reference.

    Exit code 1 when a runtime disagrees; one that is not installed, or that cannot run a layer of
    the model, is only named.

    Example: sessa check runs/first
    """
    config, weights = load_weights(checkpoint)
    cases = make_cases(config, weights, seed=seed)
    found: dict[str, Outcome] = {
        "PyTorch": _twin("torch", checkpoint, cases),
        "MLX": _twin("mlx", checkpoint, cases),
        "ONNX Runtime": _onnx(exported, config, weights, cases),
    }
    ok = all(result.ok for results in found.values() for result in results_of(results))
    if json_output:
        print_json({"ok": ok, "tolerance": TOLERANCE, "runtimes": _as_json(found)})
    else:
        make_console().print(_table(found))
    if not ok:
        raise typer.Exit(1)


def results_of(outcome: Outcome) -> list[Result]:
    """The results of a runtime, none when it was not asked."""
    return [] if isinstance(outcome, str) else outcome


def _twin(backend: str, checkpoint: Path, cases: list[Case]) -> Outcome:
    if not is_installed(backend):
        return ABSENT
    # float32 whatever the checkpoint's dtype: the question is what is computed, not its rounding.
    decoder = framework(backend, "decoding").load_decoder(checkpoint, dtype="float32")
    return compare(decoder, cases)


def _onnx(
    exported: Path | None, config: SessaConfig, weights: Weights, cases: list[Case]
) -> Outcome:
    from sessa_export.exporter import Options, write_model
    from sessa_export.runtime import MODEL_FILE, load_decoder

    if exported is not None:
        decoder = load_decoder(exported)
        return compare(decoder, cases, tolerance_of(decoder))
    if not (is_installed("onnx") and is_installed("onnxruntime")):
        return ABSENT
    if "mamba2" in config.mixers:
        return "not supported (mamba2)"
    with tempfile.TemporaryDirectory(prefix="sessa-check-") as scratch:
        write_model(Path(scratch) / MODEL_FILE, config, weights, Options())
        return compare(load_decoder(scratch), cases)


def _as_json(found: dict[str, Outcome]) -> dict[str, Any]:
    return {
        name: results if isinstance(results, str) else [
            {"case": r.case, "difference": r.difference, "agreement": r.agreement, "ok": r.ok}
            for r in results
        ]
        for name, results in found.items()
    }  # fmt: skip


def _table(found: dict[str, Outcome]) -> Table:
    table = Table(title=f"against float64 NumPy; at most {TOLERANCE:.0e} of the largest logit")
    for heading in ("runtime", "tokens", "largest difference", "same greedy token", ""):
        table.add_column(heading)
    for name, results in found.items():
        if isinstance(results, str):
            table.add_row(name, results)
        for r in results_of(results):
            verdict = "ok" if r.ok else "DISAGREES"
            table.add_row(name, r.case, f"{r.difference:.1e}", f"{r.agreement:.1%}", verdict)
    return table
