"""`sessa influence`: how strongly old tokens move later ones, by which law, for any checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from sessa_cli.common import choose_backend, framework, make_console, print_json, say
from sessa_common.checkpoint.folder import load_config, write_json
from sessa_common.config import SessaConfig
from sessa_common.data.corpus import check_ids
from sessa_common.data.tokenizer import check_fits, encode_texts, read_tokenizer
from sessa_common.errors import SessaError
from sessa_common.experiments.influence import (
    FIRST_LAG,
    MOST_POSITIONS,
    Drawn,
    curves_report,
    draw_influence,
    feedback_report,
    fit_laws,
    influence_curves,
    memory_report,
)
from sessa_common.json_files import read_json

SHORTEST = 16
RANDOM_TOKENS = 512
MEANING = (
    "Influence is the Frobenius norm of dy(t)/dx(tau): x the embedded tokens, y the output of the "
    "last block before the final norm; for a layer, its input and output. Laws are fitted from lag "
    f"{FIRST_LAG} on. sure: the share of resamples (of texts, tau and blocks of lags) in which the "
    "law has the lowest BIC of power law, exponential, 1/lag and flat; R² says how well it fits. "
    "Brackets: 95 % of the resampled parameter. slope: of the power law. lost: values below "
    "float32 rounding of their curve's peak, left out."
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One checkpoint with what to measure on it."""

    folder: Path
    name: str
    config: SessaConfig
    texts: list[np.ndarray]
    sources: list[int]
    layers: list[int]


def influence(
    checkpoints: Annotated[
        list[Path], typer.Argument(help="Checkpoint folders.", show_default=False)
    ],
    text: Annotated[list[str] | None, typer.Option(help="A text; repeatable.")] = None,
    text_file: Annotated[
        list[Path] | None, typer.Option(help="A UTF-8 file with a text; repeatable.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Random tokens instead. Default: 512 or the context.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Use only the first tokens of each text.")
    ] = None,
    tau: Annotated[
        str | None, typer.Option(help="Old positions, as 0,16. Default: 4 in the first quarter.")
    ] = None,
    layer: Annotated[str, typer.Option(help="all, none or the number of a layer.")] = "all",
    probes: Annotated[
        int, typer.Option(min=0, help="Gaussian probes a position; 0 for the exact norm.")
    ] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of random tokens and probes.")] = 0,
    backend: Annotated[str | None, typer.Option(help="auto, mlx or torch.")] = None,
    device: Annotated[
        str | None, typer.Option(help="torch: cpu, cuda, mps; mlx: cpu, gpu.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Picture; the numbers go beside it, as .json.")] = Path(
        "influence.png"
    ),
    json_output: Annotated[bool, typer.Option("--json", help="Print the numbers.")] = False,
) -> None:
    """Measure how the influence of a token falls with distance, and fit a law to it.

    Power law, exponential, 1/lag or none of them, with its parameter and how sure the answer is;
    for Sessa also the feedback kernel, for Mamba-2 what each head forgets. In float32.

    Example: sessa influence runs/sessa runs/mamba2 --tokens 1024 --out influence.png
    """
    backend = choose_backend(backend)
    device = framework(backend, "checkpoint").choose_device(device)
    _check_out(out)
    given = _read_texts(text or [], text_file or [], tokens)
    jobs = [
        _job(folder, name, given, tokens, length, tau, layer, seed)
        for folder, name in zip(checkpoints, _names(checkpoints), strict=True)
    ]
    console = make_console(json_output)
    reports, drawn = [], []
    for job in jobs:
        with console.status(f"{job.name}: derivatives"):
            report, picture = _measure(job, backend, device, probes, seed)
        reports.append(report)
        drawn.append(picture)
    answer = {"meaning": MEANING, "backend": backend, "probes": probes, "seed": seed,
              "checkpoints": reports}  # fmt: skip
    numbers = out.with_suffix(".json")
    write_json(numbers, answer)
    painted = draw_influence(out, drawn)
    if json_output:
        return print_json(answer)
    for table in (_fits(reports), _feedback(reports), _positions(reports), _memory(reports)):
        if table.row_count:
            console.print(table)
    say(console, MEANING)
    missing = "no picture: matplotlib is not installed"
    say(console, f"{out if painted else missing}, numbers in {numbers}")


def _check_out(out: Path) -> None:
    if out.suffix != ".png":
        raise SessaError(f"--out is {out}, expected a file name that ends in .png")
    if not out.parent.is_dir():
        raise SessaError(f"--out: there is no folder {out.parent}; make it first")
    numbers = out.with_suffix(".json")
    if numbers.exists() and "meaning" not in read_json(numbers):
        raise SessaError(f"--out: {numbers} is another file, which the numbers would replace")


def _names(folders: list[Path]) -> list[str]:
    """Folder names, with the parent's where two are equal."""
    names = [folder.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 else f"{folder.resolve().parent.name}/{name}"
        for folder, name in zip(folders, names, strict=True)
    ]


def _read_texts(texts: list[str], files: list[Path], tokens: int | None) -> list[str]:
    if tokens is not None and (texts or files):
        raise SessaError("--tokens draws random tokens; give it or texts, not both")
    try:
        return texts + [file.read_text(encoding="utf-8") for file in files]
    except UnicodeDecodeError as error:
        raise SessaError(f"--text-file: not UTF-8 text ({error})") from None


def _job(
    folder: Path, name: str, given: list[str], tokens: int | None, length: int | None,
    tau: str | None, layer: str, seed: int,
) -> Job:  # fmt: skip
    config = load_config(folder)
    if given:
        texts = _encode(folder, config, given)
    else:
        count = tokens or length or min(RANDOM_TOKENS, config.max_position_embeddings)
        texts = [np.random.default_rng(seed).integers(0, config.vocab_size, count, np.int32)]
    for i, ids in enumerate(texts):
        if length is not None and length > len(ids):
            raise SessaError(f"{folder}: text {i + 1} has {len(ids)} tokens, less than --length "
                             f"{length}; give a longer text")  # fmt: skip
        texts[i] = ids[:length]
        _check_length(len(texts[i]), config, f"{folder}: text {i + 1}")
    return Job(folder=folder, name=name, config=config, texts=texts,
               sources=_sources(tau, min(len(ids) for ids in texts)),
               layers=_layers(layer, config, folder))  # fmt: skip


def _encode(folder: Path, config: SessaConfig, given: list[str]) -> list[np.ndarray]:
    if not (folder / "tokenizer.json").is_file():
        raise SessaError(f"{folder} has no tokenizer.json to read a text with; use --tokens N")
    tokenizer = read_tokenizer(folder)
    check_fits(tokenizer, config, str(folder))
    texts = list(encode_texts(tokenizer, given))
    for ids in texts:
        check_ids(ids, config, str(folder))
    return texts


def _check_length(count: int, config: SessaConfig, what: str) -> None:
    context = config.max_position_embeddings
    if count < SHORTEST:
        raise SessaError(f"{what} has {count} tokens, expected at least {SHORTEST}")
    if count > context:
        raise SessaError(f"{what} has {count} tokens, more than the model's context of {context}; "
                         f"use --length {context}")  # fmt: skip


def _sources(tau: str | None, shortest: int) -> list[int]:
    if tau is None:
        return sorted({0, shortest // 16, shortest // 8, shortest // 4})
    try:
        sources = sorted({int(part) for part in tau.split(",")})
    except ValueError:
        raise SessaError(f"--tau is {tau!r}, expected positions as 0,16,64") from None
    last = shortest - SHORTEST // 2
    if sources[0] < 0 or sources[-1] > last:
        raise SessaError(f"--tau is {tau}, expected positions from 0 to {last}: the shortest text "
                         f"has {shortest} tokens, and {SHORTEST // 2} must follow")  # fmt: skip
    return sources


def _layers(layer: str, config: SessaConfig, folder: Path) -> list[int]:
    count = config.num_hidden_layers
    if layer in ("all", "none"):
        return list(range(count)) if layer == "all" else []
    if not (layer.isdecimal() and int(layer) < count):
        raise SessaError(f"--layer is {layer!r}, expected all, none or 0 to {count - 1} for "
                         f"{folder}")  # fmt: skip
    return [int(layer)]


def _measure(
    job: Job, backend: str, device: str, probes: int, seed: int
) -> tuple[dict[str, Any], Drawn]:
    model = framework(backend, "checkpoint").load_model(job.folder, dtype="float32", device=device)
    influence_probes = [
        framework(backend, "influence").InfluenceProbe(model, ids) for ids in job.texts
    ]
    depth, mixers = job.config.num_hidden_layers, job.config.mixers

    def measured(first: int, last: int) -> Any:
        return influence_curves(
            influence_probes, job.sources, first, last, probes=probes, seed=seed
        )

    curves = measured(0, depth)
    if not np.isfinite(curves.values).all():
        raise SessaError(f"{job.folder}: the derivatives are not finite; are the weights?")
    fit = fit_laws(curves, seed=seed)
    layers, fits = [], {}
    for i in job.layers:
        alone = measured(i, i + 1)
        fits[i] = fit_laws(alone, seed=seed)
        entry = {"layer": i, "mixer": mixers[i], **curves_report(alone, fits[i])}
        if mixers[i] == "sessa" and job.config.feedback:
            entry["feedback"] = feedback_report(influence_probes, i, job.sources, alone.lags)
        if mixers[i] == "mamba2":
            entry["memory"] = memory_report(influence_probes, i, job.sources[0])
        layers.append(entry)
    mixer = "+".join(dict.fromkeys(mixers))
    report = {"name": job.name, "mixer": mixer, "tokens": [len(ids) for ids in job.texts],
              "tau": job.sources, "end_to_end": curves_report(curves, fit),
              "layers": layers}  # fmt: skip
    return report, Drawn(name=job.name, mixer=mixer, curves=curves, fit=fit, layers=fits)


def _table(title: str, *headings: str) -> Table:
    table = Table(*headings, title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False,
                  padding=(0, 1, 0, 0))  # fmt: skip
    table.columns[0].min_width = 12
    for column in table.columns[2:]:
        column.no_wrap = True
    return table


def _fits(reports: list[dict[str, Any]]) -> Table:
    table = _table("Influence against lag, end to end and by layer", "", "falls as", "sure",
                   "slope", "R²", "points", "lost")  # fmt: skip
    for report in reports:
        spans = [(report["name"], report["end_to_end"])]
        spans += [(f"  {one['layer']} {one['mixer']}", one) for one in report["layers"]]
        for span, one in spans:
            fit = one["fit"]
            phrase, _, sure = fit["text"].removesuffix(" sure").rpartition("; ")
            power, best = fit["laws"].get("power law"), fit["laws"].get(fit["best"])
            table.add_row(span, phrase or fit["text"], sure if phrase else "no",
                          f"{-power['rate']:.2f}" if power else "-",
                          f"{best['r2']:.2f}" if best else "-",
                          str(fit["points"]), str(one["below_floor"]))  # fmt: skip
    return table


def _feedback(reports: list[dict[str, Any]]) -> Table:
    table = _table("Sessa's feedback kernel K = (I − diag(γ)α)⁻¹", "", "γ min", "mean", "max",
                   "gain", "c₂", "η", "η<1", "slope", "γ̄−1")  # fmt: skip
    table.caption = ("gain 1/(1−max|γ|) bounds K; η<1: Theorem 8 applies; γ̄−1: the slope that "
                     "uniform routing at the mean γ has")  # fmt: skip
    table.caption_justify = "left"
    for report in reports:
        for layer in report["layers"]:
            if one := layer.get("feedback"):
                gamma, slope = one["gamma"], one["slope"]
                table.add_row(
                    f"{report['name']} {layer['layer']}",
                    *(f"{gamma[key]:.3f}" for key in ("min", "mean", "max")),
                    *(f"{one[key]:.3g}" for key in ("gain_bound", "c2", "eta")),
                    "yes" if one["theorem_8"] else "no",
                    "-" if slope is None else f"{slope:.3f}", f"{one['uniform_slope']:.3f}",
                )  # fmt: skip
    return table


def _positions(reports: list[dict[str, Any]]) -> Table:
    table = _table("Last position that uniform feedback at γ̄ tells from the one before",
                   "", "bfloat16", "float16", "float32")  # fmt: skip
    for report in reports:
        for layer in report["layers"]:
            if one := layer.get("feedback"):
                coded = 0 < one["gamma"]["mean"] < 1
                beyond = f"≥ {MOST_POSITIONS}" if coded else "no code: γ̄ ≤ 0"
                found = (beyond if t is None else str(t) for t in one["positions"].values())
                table.add_row(f"{report['name']} {layer['layer']}", *found)
    return table


def _memory(reports: list[dict[str, Any]]) -> Table:
    table = _table("Mamba-2's freeze time Σ exp(A_log)·dt, from the first τ to the end", "",
                   "heads", "least", "median", "most", "slowest head fades by e in")  # fmt: skip
    for report in reports:
        for layer in report["layers"]:
            if one := layer.get("memory"):
                total = np.quantile(one["freeze_time"], (0, 0.5, 1))
                table.add_row(f"{report['name']} {layer['layer']}", str(len(one["rate"])),
                              *(f"{value:.3g}" for value in total),
                              f"{1 / min(one['rate']):.3g} tokens")  # fmt: skip
    return table
