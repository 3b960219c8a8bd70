"""Checkpoint folders made ready for the programs of others that load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sessa_common.checkpoint.conversion import Report, convert, report_unchanged
from sessa_common.checkpoint.folder import channels_first, load_config, read_tensors
from sessa_common.checkpoint.quantization import is_quantized
from sessa_common.checkpoint.remote_code import CODE_KEYS, has_code_files, write_code_files
from sessa_common.checkpoint.sources import read_source
from sessa_common.errors import SessaError, expect
from sessa_common.json_files import read_json
from sessa_common.storage import lock_folder, write_json

CLIENTS = ("transformers", "mlx-lm")


def convert_for(
    client: str, source: Path | str, target: Path | str | None = None, **options: Any
) -> Report:
    """Write what `client` needs beside the weights: into the folder itself, or into a `target`.

    Options are those of `convert`; without a target no weight may change, and only `shard_size` is
    used. transformers reads convolutions in PyTorch's layout only, mlx-lm in both. A folder that is
    ready is left alone, and the report says so. Raises SessaError for a folder of another model,
    and for quantised weights that transformers cannot read.
    """
    expect(client in CLIENTS, "`client`", client, f"one of {', '.join(CLIENTS)}")
    if client == "transformers":
        if options.get("framework") not in (None, "torch"):
            raise SessaError("transformers reads PyTorch's layout; leave `framework` out")
        if options.get("bits"):
            raise SessaError("transformers cannot read weights that are quantised for MLX")
        options["framework"] = "torch"
    if target is not None:
        return convert(source, target, **options)
    kept = {"framework", "shard_size", "seed", "force"}
    if changes := sorted(name for name in options.keys() - kept if options[name] is not None):
        raise SessaError(f"`{changes[0]}` changes the model; name a new folder for it")
    folder = Path(source)
    load_config(folder)
    if client == "transformers" and not _has_layout_of_torch(folder):
        return convert(folder, folder, **{**options, "force": True})
    return _with_code_files(folder, client)


def _has_layout_of_torch(folder: Path) -> bool:
    stored = read_tensors(folder)
    if is_quantized(stored):
        raise SessaError(
            f"{folder}: is quantised for MLX; give a new folder, into which its weights are "
            "written in full"
        )
    wanted = channels_first(stored)
    return all(stored[name].shape == wanted[name].shape for name in stored)


def _with_code_files(folder: Path, client: str) -> Report:
    """Write the code files and the keys that name them, unless the folder has both."""
    source = read_source(folder)
    if has_code_files(folder):
        return report_unchanged(source, f"{folder} is ready for {client} already")
    with lock_folder(folder):
        write_code_files(folder)
        settings = read_json(folder / "config.json")
        write_json(folder / "config.json", {**settings, **CODE_KEYS})
    return report_unchanged(source, "wrote the code files, and their names into config.json")
