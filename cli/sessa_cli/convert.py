"""`sessa convert`: convert weights between PyTorch, MLX, other releases and quantised forms."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from sessa_cli.common import make_console, print_json, say
from sessa_common.checkpoint.clients import CLIENTS, convert_for
from sessa_common.checkpoint.conversion import Report
from sessa_common.checkpoint.conversion import convert as convert_source
from sessa_common.checkpoint.folder import SHARD_SIZE
from sessa_common.config import DTYPES
from sessa_common.errors import SessaError


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="Checkpoint folder (of this project, quantised by MLX, or Llama, "
            "Mistral, Qwen2, Qwen3 or Mamba-2 of transformers), hf:owner/name on the Hugging Face "
            "hub, or a .pt, .pth, .safetensors or .npz file of a model or of layers."
        ),
    ],
    target: Annotated[
        Path | None,
        typer.Argument(help="New checkpoint folder. With --for it may be left out."),
    ] = None,
    client: Annotated[
        str | None,
        typer.Option(
            "--for",
            help=f"Write what {' or '.join(CLIENTS)} needs; without TARGET into SOURCE itself, "
            "where no weight changes.",
        ),
    ] = None,
    framework: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="Framework: torch, mlx, or llama for a folder of transformers. Default: mlx with "
            "--quantize, else torch.",
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=f"Cast to {', '.join(DTYPES)}.")] = None,
    bits: Annotated[
        int | None,
        typer.Option("--quantize", help="Bits of MLX's affine format: 4 or 8 (also 2, 3, 5, 6)."),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Numbers that share a scale: 32, 64 (default) or 128.")
    ] = None,
    shard_size: Annotated[
        str, typer.Option(help="Largest weight file, such as 500MB.")
    ] = f"{SHARD_SIZE // 10**9}GB",
    num_attention_heads: Annotated[
        int | None,
        typer.Option(
            "--num-attention-heads",
            "--heads",
            help="Number of attention heads, which the weights of a layer do not settle.",
        ),
    ] = None,
    num_key_value_heads: Annotated[
        int | None,
        typer.Option(
            "--num-key-value-heads",
            "--kv-heads",
            help="Number of key/value heads; by default from the shapes.",
        ),
    ] = None,
    use_forward_rope: Annotated[
        bool | None,
        typer.Option(
            "--rope/--no-rope",
            help="Rotary positions in the forward attention, which weights do not settle.",
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(help="Vocabulary of a drawn embedding, for weights that have none."),
    ] = None,
    feedback: Annotated[
        str | None,
        typer.Option(
            help="Add feedback with a gain of 0, which changes no answer, to these layers: all, "
            "every:2, or numbers from 0 such as 3,7."
        ),
    ] = None,
    feedback_key_dim: Annotated[
        int | None,
        typer.Option(help="Width of the keys of the added feedback. Default: hidden_size."),
    ] = None,
    merge: Annotated[
        Path | None,
        typer.Option(help="Folder of an adapter that becomes part of the weights."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of a drawn embedding or feedback.")] = 0,
    config: Annotated[
        Path | None, typer.Option(help="A config.json, or a few of its keys, for a weight file.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a folder that is not empty.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Convert a checkpoint, read the result back and compare it with the source.

    A stack of layers has no embedding: --vocab-size draws one, and the model must then be trained.

    Example: sessa convert runs/first first-4bit --quantize 4
    """
    fields: dict[str, Any] = {
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "use_forward_rope": use_forward_rope,
        "vocab_size": vocab_size,
        "feedback_key_dim": feedback_key_dim,
    }
    options: dict[str, Any] = dict(
        framework=framework,
        dtype=dtype,
        bits=bits,
        group_size=group_size,
        shard_size=shard_size,
        config=config,
        feedback=feedback,
        merge=merge,
        seed=seed,
        force=force,
        **{name: value for name, value in fields.items() if value is not None},
    )
    if client is not None:
        report = convert_for(client, source, target, **options)
    elif target is not None:
        report = convert_source(source, target, **options)
    else:
        raise SessaError("`target` is missing; name the new checkpoint folder, or give `client`")
    if json_output:
        print_json({**dataclasses.asdict(report), "proof": report.proof()})
    else:
        _show(report, target or source)


def _show(report: Report, target: Path) -> None:
    console = make_console()
    files = len([name for name in report.files if name.endswith(".safetensors")])
    where = f" in {files} file{'s' if files > 1 else ''}" if files else ""
    say(
        console,
        f"{target}: {report.parameters:,} parameters, {report.bytes / 1e6:.2f} MB of "
        f"{report.dtype}{where}; source: {report.source}",
    )
    for note in report.notes:
        say(console, f"  {note}")
    say(console, report.proof())
