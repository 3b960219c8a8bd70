"""`sessa info`: the contents of a checkpoint folder or a weight file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sessa_cli.common import make_console, print_json, say
from sessa_common.checkpoint.saves import verify_saves
from sessa_common.inspection import Description, describe


def info(
    path: Annotated[
        Path, typer.Argument(help="Checkpoint folder, or a .safetensors, .npz or .pt file.")
    ],
    check_hashes: Annotated[
        bool, typer.Option("--verify", help="Read every saved file and compare it with its hash.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show architecture, parameters by part, bytes, types and tokenizer.

    Example: sessa info runs/first --verify
    """
    found = describe(path)
    verified = verify_saves(path) if check_hashes else None
    if json_output:
        print_json(dataclasses.asdict(found) | {"verified": verified})
        return
    console = make_console()
    say(console, f"{path}: {found.kind}, {found.parameters['total']:,} parameters")
    console.print(_architecture(found), _parameters(found))
    stored = ", ".join(
        f"{size:,} of {dtype}" for dtype, size in found.bytes.items() if dtype != "total"
    )
    say(console, f"bytes: {found.bytes['total']:,} ({stored}) in {', '.join(found.files)}")
    if found.quantization:
        bits, group = (found.quantization.get(key, "?") for key in ("bits", "group_size"))
        say(console, f"quantised to {bits} bits in groups of {group}")
    say(console, f"tokenizer: {found.tokenizer}")
    if verified:
        say(console, f"verified: {verified} files have the hashes that were saved with them")
    elif check_hashes:
        say(console, "not verified: no hashes were saved with it")


def _architecture(found: Description) -> Table:
    table = Table("architecture", "")
    for key, value in found.architecture.items():
        if value is not None:
            several = isinstance(value, (list, tuple))
            table.add_row(key, ", ".join(value) if several else str(value))
    attends = found.architecture["layer_kinds"] != "mamba2"
    if attends and "num_attention_heads" not in found.architecture:
        table.add_row("num_attention_heads", "not settled by the weights")
    return table


def _parameters(found: Description) -> Table:
    table = Table("part", "parameters", "share")
    table.columns[1].justify = table.columns[2].justify = "right"
    for part, count in found.parameters.items():
        table.add_row(part, f"{count:,}", f"{count / found.parameters['total']:.1%}")
    return table
