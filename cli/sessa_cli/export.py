"""`sessa export`: write a checkpoint as one ONNX graph, with the files that its clients read."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sessa_cli.common import Stopwatch, given_fields, make_console, print_json, say

if TYPE_CHECKING:
    from sessa_export.exporter import Report


def export(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    folder: Annotated[Path, typer.Argument(help="New folder for model.onnx and the tokenizer.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="Type of the weights: fp32, fp16, int8 or int4. Default: fp32."),
    ] = None,
    clients: Annotated[
        str | None,
        typer.Option(
            "--for", help="Clients, separated by commas: ort,cuda,genai,web,transformers-js."
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="Layout of the caches: natural, uniform (genai can rewind) or buffer."),
    ] = None,
    native: Annotated[
        bool, typer.Option("--native", help="Build the native operator and put it into the folder.")
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text to measure the cost of fewer bits on; repeatable."),
    ] = None,
    opset: Annotated[
        int | None,
        typer.Option(help="Version of the standard operators: 23, or 21 or 22 for older runtimes."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a folder that is not empty.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Export a checkpoint to ONNX and check it in ONNX Runtime before anything is written.

    Example: sessa export runs/first exported --dtype int4 --for genai,web
    """
    from sessa_export import export as export_folder
    from sessa_export.exporter import Options

    given = given_fields(context.params, Options)
    if clients is not None:
        given["clients"] = tuple(name.strip() for name in clients.split(",") if name.strip())
    watch = Stopwatch()
    report = export_folder(checkpoint, folder, force=force, **given)
    seconds = watch.seconds
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if json_output:
        print_json({"folder": str(folder), "bytes": size, "seconds": seconds, **_as_json(report)})
        return
    console = make_console()
    say(console, f"{folder}: {size / 1e6:.1f} MB in {seconds:.1f} s.")
    for line in _lines(report):
        say(console, line)


def _as_json(report: Report) -> dict:
    runs = {
        name: [asdict(result) for result in results] for name, results in report.results.items()
    }
    cost = report.cost and {**asdict(report.cost), "growth": report.cost.growth}
    worst = max(result.difference for results in report.results.values() for result in results)
    return {"difference": worst, "runs": runs, "perplexity": cost}


def _lines(report: Report) -> list[str]:
    lines = []
    for name, results in report.results.items():
        worst = max(results, key=lambda result: result.difference)
        lines.append(
            f"ONNX Runtime, {name}: the checkpoint's logits to {worst.difference:.1e} of the "
            f"largest (at most {worst.tolerance:.0e}): {', '.join(r.case for r in results)}."
        )
    if (cost := report.cost) is not None:
        lines.append(
            f"Perplexity on {cost.tokens:,} tokens of {', '.join(cost.data)}: {cost.fp32:.3f} with "
            f"float32 weights, {cost.exported:.3f} exported ({cost.growth - 1:+.2%})."
        )
    return lines
