"""`sessa influence`: measure and fit how the influence of old tokens falls with distance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from sessa_cli.common import make_console, print_json, say
from sessa_common.errors import SessaError
from sessa_common.experiments.influence import MAX_POSITIONS
from sessa_common.experiments.influence_job import (
    RANDOM_TOKENS,
    InfluenceJob,
    distinct_names,
    new_job,
)
from sessa_common.experiments.influence_picture import draw_influence
from sessa_common.experiments.influence_report import DRAWS, MEANING, Measurement, measure
from sessa_common.extras import install
from sessa_common.frameworks import choose_backend, framework
from sessa_common.json_files import read_json
from sessa_common.storage import write_json

Reports = Sequence[dict[str, Any]]


def influence(
    checkpoints: Annotated[
        list[Path], typer.Argument(help="Checkpoint folders.", show_default=False)
    ],
    text: Annotated[list[str] | None, typer.Option(help="A text; repeatable.")] = None,
    text_file: Annotated[
        list[Path] | None, typer.Option(help="A UTF-8 file with a text; repeatable.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Number of random tokens instead. Default: {RANDOM_TOKENS} or the context."
        ),
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Use only the first tokens of each text.")
    ] = None,
    tau: Annotated[
        str | None,
        typer.Option(help="Source positions, as 0,16. Default: 4 in the first quarter."),
    ] = None,
    layer: Annotated[str, typer.Option(help="all, none or the number of a layer.")] = "all",
    probes: Annotated[
        int, typer.Option(min=0, help="Random vectors per position; 0 for the exact norm.")
    ] = DRAWS,
    seed: Annotated[int, typer.Option(min=0, help="Seed of random tokens and vectors.")] = 0,
    backend: Annotated[str | None, typer.Option(help="auto, mlx or torch.")] = None,
    device: Annotated[
        str | None, typer.Option(help="torch: cpu, cuda, mps; mlx: cpu, gpu.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Picture to write; the numbers go beside it, as .json.")
    ] = Path("influence.png"),
    json_output: Annotated[bool, typer.Option("--json", help="Print the numbers.")] = False,
) -> None:
    """Measure how the influence of a token falls with distance, and fit a law to it.

    The laws are power law, exponential and 1/lag, each with its parameter and how often it wins in
    a bootstrap. Layers with feedback get the numbers of their kernel, Mamba-2 layers what each head
    forgets. Everything is computed in float32.

    Example: sessa influence runs/sessa runs/mamba2 --tokens 1024 --out influence.png
    """
    backend = choose_backend(backend)
    device = framework(backend, "checkpoint").choose_device(device)
    _check_out(out)
    texts, sources, layers = _read_texts(text, text_file), _positions(tau), _layers(layer)
    jobs = [
        new_job(
            folder,
            name=name,
            texts=texts,
            tokens=tokens,
            length=length,
            sources=sources,
            layers=layers,
            seed=seed,
        )
        for folder, name in zip(checkpoints, distinct_names(checkpoints), strict=True)
    ]
    console = make_console(json_output)
    measurements = []
    for job in jobs:
        with console.status(f"{job.name}: derivatives"):
            measurements.append(_measure(job, backend, device, probes, seed))
    reports = [measurement.report for measurement in measurements]
    answer = {
        "meaning": MEANING,
        "backend": backend,
        "probes": probes,
        "seed": seed,
        "checkpoints": reports,
    }
    numbers = out.with_suffix(".json")
    write_json(numbers, answer)
    is_drawn = draw_influence(out, measurements)
    if json_output:
        return print_json(answer)
    tables = (_law_table(reports), _feedback_table(reports), _position_table(reports))
    for table in (*tables, _memory_table(reports)):
        if table.row_count:
            console.print(table)
    say(console, MEANING)
    picture = out if is_drawn else f"no picture, which needs matplotlib ({install('plot')})"
    say(console, f"{picture}, numbers in {numbers}")


def _measure(job: InfluenceJob, backend: str, device: str, draws: int, seed: int) -> Measurement:
    model = framework(backend, "checkpoint").load_model(job.folder, dtype="float32", device=device)
    probes = [framework(backend, "influence").InfluenceProbe(model, ids) for ids in job.texts]
    return measure(job, probes, draws=draws, seed=seed)


def _check_out(out: Path) -> None:
    if out.suffix != ".png":
        raise SessaError(f"--out is {out}, expected a file name that ends in .png")
    if not out.parent.is_dir():
        raise SessaError(f"--out: there is no folder {out.parent}; make it first")
    numbers = out.with_suffix(".json")
    if numbers.exists() and "meaning" not in read_json(numbers):
        raise SessaError(f"--out: {numbers} is another file, which the numbers would replace")


def _read_texts(texts: list[str] | None, files: list[Path] | None) -> list[str]:
    try:
        return (texts or []) + [file.read_text(encoding="utf-8") for file in files or ()]
    except UnicodeDecodeError as error:
        raise SessaError(f"--text-file: not UTF-8 text ({error})") from None


def _positions(tau: str | None) -> list[int] | None:
    if tau is None:
        return None
    try:
        return [int(part) for part in tau.split(",")]
    except ValueError:
        raise SessaError(f"--tau is {tau!r}, expected positions as 0,16,64") from None


def _layers(layer: str) -> list[int] | None:
    """Return the layers of --layer; None stands for all."""
    if layer in ("all", "none"):
        return None if layer == "all" else []
    if not layer.isdecimal():
        raise SessaError(f"--layer is {layer!r}, expected all, none or the number of a layer")
    return [int(layer)]


def _table(title: str, *headings: str) -> Table:
    table = Table(
        *headings,
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.columns[0].min_width = 12
    for column in table.columns[2:]:
        column.no_wrap = True
    return table


def _law_table(reports: Reports) -> Table:
    headings = ("", "falls as", "resamples", "slope", "R²", "points", "lost")
    table = _table("Influence against lag, end to end and by layer", *headings)
    for report in reports:
        spans = [(report["name"], report["end_to_end"])]
        spans += [(f"  {one['layer']} {one['mixer']}", one) for one in report["layers"]]
        for span, one in spans:
            fit = one["fit"]
            power, best = fit["laws"].get("power law"), fit["laws"].get(fit["best"])
            is_significant = fit["is_significant"]
            table.add_row(
                span,
                fit["text"].rpartition("; ")[0] if is_significant else fit["text"],
                f"{best['bootstrap_share']:.0%}" if is_significant else "-",
                f"{-power['rate']:.2f}" if power else "-",
                f"{best['r2']:.2f}" if best else "-",
                str(fit["points"]),
                str(one["below_floor"]),
            )
    return table


def _parts(reports: Reports, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the part "feedback" or "memory" of every layer that has it."""
    for report in reports:
        for layer in report["layers"]:
            if key in layer:
                yield f"{report['name']} {layer['layer']}", layer[key]


def _feedback_table(reports: Reports) -> Table:
    headings = ("", "γ min", "mean", "max", "gain", "c₂", "η", "η<1", "slope", "γ̄−1")
    table = _table("Feedback kernel K = (I − diag(γ)α)⁻¹", *headings)
    table.caption = (
        "gain 1/(1−max|γ|) bounds K; η<1: Theorem 8 applies; γ̄−1: the slope of uniform routing "
        "at the mean γ"
    )
    table.caption_justify = "left"
    for name, part in _parts(reports, "feedback"):
        table.add_row(
            name,
            *(f"{part['gamma'][key]:.3f}" for key in ("min", "mean", "max")),
            *(f"{part[key]:.3g}" for key in ("gain_bound", "c2", "eta")),
            "yes" if part["theorem_8"] else "no",
            "-" if part["slope"] is None else f"{part['slope']:.3f}",
            f"{part['uniform_slope']:.3f}",
        )
    return table


def _position_table(reports: Reports) -> Table:
    table = _table(
        "Last position that uniform feedback at γ̄ distinguishes from the one before",
        "",
        "bfloat16",
        "float16",
        "float32",
    )
    for name, part in _parts(reports, "feedback"):
        has_code = 0 < part["gamma"]["mean"] < 1
        absent = f"≥ {MAX_POSITIONS}" if has_code else "no code: γ̄ ≤ 0"
        table.add_row(name, *(absent if t is None else str(t) for t in part["positions"].values()))
    return table


def _memory_table(reports: Reports) -> Table:
    table = _table(
        "Mamba-2's freeze time Σ exp(A_log)·dt, from the first τ to the end",
        "",
        "heads",
        "least",
        "median",
        "most",
        "slowest head fades by e in",
    )
    for name, part in _parts(reports, "memory"):
        totals = (f"{value:.3g}" for value in np.quantile(part["freeze_time"], (0, 0.5, 1)))
        fades_in = f"{1 / min(part['rate']):.3g} tokens"
        table.add_row(name, str(len(part["rate"])), *totals, fades_in)
    return table
