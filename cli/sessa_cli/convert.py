"""`sessa convert`: weights between PyTorch, MLX, releases of others and quantised forms."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from sessa_cli.common import make_console, print_json, say
from sessa_cli.torch_file import read_torch_file
from sessa_common.checkpoint.conversion import FRAMEWORKS, Report, read_source
from sessa_common.checkpoint.conversion import convert as convert_source
from sessa_common.checkpoint.folder import SHARD_SIZE, check_new_folder
from sessa_common.config import DTYPES
from sessa_common.errors import SessaError
from sessa_common.json_files import read_json

UNITS = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1, "": 1}


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="Checkpoint folder (ours, quantised by MLX, or a Mamba-2 of transformers), or a "
            ".pt, .pth, .safetensors or .npz file: a model, a stack of release layers, or one."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="New checkpoint folder.")],
    to: Annotated[
        str | None,
        typer.Option("--to", help="torch or mlx. Default: mlx with --quantize, else torch."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=f"Cast to {', '.join(DTYPES)}.")] = None,
    quantize: Annotated[
        int | None, typer.Option(help="Bits of MLX's affine format: 4 or 8 (also 2, 3, 5, 6).")
    ] = None,
    group_size: Annotated[int, typer.Option(help="Numbers that share a scale: 32, 64, 128.")] = 64,
    shard_size: Annotated[
        str, typer.Option(help="Largest weight file, such as 500MB.")
    ] = f"{SHARD_SIZE // 10**9}GB",
    heads: Annotated[
        int | None, typer.Option(help="Attention heads, when the weights do not tell.")
    ] = None,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key/value heads; by default from the shapes.")
    ] = None,
    rope: Annotated[
        bool | None,
        typer.Option("--rope/--no-rope", help="RoPE, when the weights do not tell."),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Draw an embedding of this size when there is none.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of a drawn embedding.")] = 0,
    config: Annotated[
        Path | None, typer.Option(help="A config.json, or a few of its keys, for a weight file.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that is there.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Convert a checkpoint, read the result back and say what the comparison proved.

    A stack of layers has no embedding: --vocab-size draws one, and the model must then be trained.

    Example: sessa convert runs/first first-4bit --quantize 4
    """
    _check_options(to, dtype)
    size = parse_size(shard_size)
    check_new_folder(target, force=force)
    given: dict[str, Any] = {} if config is None else read_json(config)
    options = {"num_attention_heads": heads, "num_key_value_heads": kv_heads,
               "use_forward_rope": rope, "vocab_size": vocab_size}  # fmt: skip
    given |= {key: value for key, value in options.items() if value is not None}
    report = convert_source(
        read_source(source, read_torch_file(source), given, seed),
        target,
        framework=to or ("mlx" if quantize else "torch"),
        dtype=dtype,
        bits=quantize,
        group_size=group_size,
        shard_size=size,
        force=force,
    )
    if json_output:
        print_json({**dataclasses.asdict(report), "proof": report.proof()})
    else:
        _show(report, target)


def _check_options(to: str | None, dtype: str | None) -> None:
    if to not in (None, *FRAMEWORKS):
        raise SessaError(f"--to is {to!r}, expected {' or '.join(FRAMEWORKS)}")
    if dtype not in (None, *DTYPES):
        raise SessaError(f"--dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 1000000."""
    number = text.strip().upper().rstrip("KMGB")
    unit = text.strip().upper()[len(number) :]
    try:
        size = int(float(number) * UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise SessaError(f"--shard-size is {text!r}, expected a size such as 5GB or 500MB")
    return size


def _show(report: Report, target: Path) -> None:
    console = make_console()
    files = len([name for name in report.files if name.endswith(".safetensors")])
    say(
        console,
        f"{target}: {report.parameters:,} parameters, {report.bytes / 1e6:.2f} MB of "
        f"{report.dtype} in {files} file{'s' if files > 1 else ''}; source: {report.source}",
    )
    for note in report.notes:
        say(console, f"  {note}")
    say(console, report.proof())
