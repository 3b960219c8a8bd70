"""Checkpoint folders made ready for the programs of others that load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sessa_common.checkpoint.conversion import Report, convert, report_unchanged
from sessa_common.checkpoint.folder import channels_first, load_config, read_tensors
from sessa_common.checkpoint.quantization import is_quantized
from sessa_common.checkpoint.remote_code import has_code_files
from sessa_common.checkpoint.sources import read_source
from sessa_common.errors import SessaError, expect

# Each client with the framework in whose layout it reads weights.
CLIENTS = {"transformers": "torch"}


def convert_for(
    client: str, source: Path | str, target: Path | str | None = None, **options: Any
) -> Report:
    """Write what `client` needs beside the weights: into the folder itself, or into a `target`.

    Options are those of `convert`; without a target no weight may change, and only `shard_size` is
    used.
    A folder that is ready is left alone, and the report says so. Raises SessaError for a folder of
    another model, and for a quantised one without a target.
    """
    expect(client in CLIENTS, "`client`", client, f"one of {', '.join(CLIENTS)}")
    if options.get("framework") not in (None, CLIENTS[client]):
        raise SessaError(
            f"{client} reads weights in the layout of {CLIENTS[client]}; leave `framework` out"
        )
    if options.get("bits"):
        raise SessaError(f"{client} cannot read weights that are quantised for MLX")
    options["framework"] = CLIENTS[client]
    if target is not None:
        return convert(source, target, **options)
    kept = {"framework", "shard_size", "seed", "force"}
    if changes := sorted(name for name in options.keys() - kept if options[name] is not None):
        raise SessaError(f"`{changes[0]}` changes the model; name a new folder for it")
    folder = Path(source)
    load_config(folder)
    stored = read_tensors(folder)
    if is_quantized(stored):
        raise SessaError(
            f"{folder}: is quantised for MLX; give a new folder, into which its weights are "
            "written in full"
        )
    as_read = channels_first(stored)
    ready = all(stored[name].shape == as_read[name].shape for name in stored)
    if ready and has_code_files(folder):
        return report_unchanged(read_source(folder), f"{folder} is ready for {client} already")
    return convert(folder, folder, **{**options, "force": True})
