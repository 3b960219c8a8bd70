"""`sessa selftest`: check this machine and print one table to paste into an issue."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console

from sessa_cli.common import FAILED, make_console, print_json, say
from sessa_common import __version__
from sessa_common.markdown import markdown_table
from sessa_common.selftest.rows import FAILURES, Row
from sessa_common.selftest.suite import machine_facts, run_checks
from sessa_common.selftest.timings import Timing, measure_times
from sessa_common.selftest.twin import Twin, open_twins

# Advice for a row that fails, by the beginning of its check.
ADVICE = {
    "float32 products": "float32 is less exact here than TF32; use another device (--device cpu).",
    "solve, kernel": "the kernels are wrong here; train and generate with --device cpu.",
    "solve": "the feedback solve is wrong here; train and generate with --device cpu.",
    "training step, compiled": "train with --no-compile.",
    "training step": "train with --precision float32 or with --device cpu.",
    "prefill": "generate and evaluate with --device cpu.",
    "decod": "generate with --device cpu.",
    "4-bit model": "use a folder that sessa convert wrote without --quantize.",
    "memory": "train with a shorter --sequence-length or a smaller --batch-size.",
}
REPORT = "Please open an issue with everything above. The other framework may work (--backend)."


def selftest(
    backend: Annotated[
        str, typer.Option("--backend", help="torch, mlx, or auto for all that are installed.")
    ] = "auto",
    device: Annotated[
        str | None, typer.Option("--device", help="torch: cpu, cuda, mps; mlx: cpu, gpu.")
    ] = None,
    timings: Annotated[bool, typer.Option(help="Also time the solve and attention.")] = True,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check the solve, training, decoding, 4 bits and memory on this machine, and time the solve.

    The table is Markdown, ready to paste into an issue. Exit code 1 if a row fails.

    Example: sessa selftest --backend mlx
    """
    console = make_console(json_output)
    twins = open_twins(backend, device)
    facts = {"sessa": __version__, **machine_facts()}
    say(console, _facts_line(facts))
    for twin in twins:
        facts |= {f"{twin.name}, {name}": value for name, value in twin.facts().items()}
        say(console, f"{twin.name} on {twin.device_name}: {_facts_line(twin.facts())}")
    rows = _print_rows(console, twins)
    failed = [row for row in rows if row.verdict in FAILURES]
    _print_advice(console, failed)
    measured = [time for twin in twins for time in measure_times(twin)] if timings else []
    if measured:
        say(console, "\nMedian milliseconds; attention is the framework's, heads of 64:\n")
        say(console, _times_table(measured))
    if json_output:
        print_json(
            {
                "machine": facts,
                "checks": [dataclasses.asdict(row) for row in rows],
                "timings": [dataclasses.asdict(timing) for timing in measured],
            }
        )
    if failed:
        raise typer.Exit(FAILED)


def _print_rows(console: Console, twins: Sequence[Twin]) -> list[Row]:
    """Make all checks; each row is printed at once, so that what a crash leaves is a table too."""
    say(console, "\n" + markdown_table([field.name for field in dataclasses.fields(Row)], []))
    rows = []
    for twin in twins:
        for row in run_checks(twin):
            say(console, _line(row))
            rows.append(row)
    return rows


def _print_advice(console: Console, failed: Sequence[Row]) -> None:
    for advice in dict.fromkeys(map(_advice, failed)):
        say(console, f"\n{advice}")
    if failed:
        say(console, f"\n{REPORT}")


def _advice(row: Row) -> str:
    text = next(text for check, text in ADVICE.items() if row.check.startswith(check))
    return f"{row.framework}, {row.check}: {text}"


def _facts_line(facts: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _line(row: Any) -> str:
    """A dataclass as a row of a Markdown table."""
    cells = [_cell(getattr(row, field.name)) for field in dataclasses.fields(row)]
    return "| " + " | ".join(cells) + " |"


def _times_table(timings: Sequence[Timing]) -> str:
    columns = [field.name.replace("_", " ") for field in dataclasses.fields(Timing)]
    return "\n".join([markdown_table(columns, []), *map(_line, timings)])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "/")
