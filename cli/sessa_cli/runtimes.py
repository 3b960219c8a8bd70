"""The runtime of a folder: PyTorch or MLX for a checkpoint, ONNX Runtime for an export."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from sessa_cli.common import make_console, say
from sessa_common.checkpoint.adapters import adapted_files
from sessa_common.errors import SessaError
from sessa_common.frameworks import choose_backend, framework
from sessa_common.inference.generation import Decoder
from sessa_common.inference.shortcuts import ModelHome


def find_home(
    folder: Path,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    native: bool,
    no_graphs: bool = False,
    adapter: Path | None = None,
) -> ModelHome:
    """The runtime that opens the model of a folder, which is also said on stderr.

    An `adapter` belongs to the model of that folder, not to others that the runtime opens.
    """
    from sessa_export.runtime import is_exported, load_decoder, model_files

    if not folder.is_dir():
        raise SessaError(f"{folder}: no such checkpoint folder")
    if backend == "onnx" or (backend in (None, "auto") and is_exported(folder)):
        if dtype is not None:
            raise SessaError("`dtype` is for a checkpoint; an exported model has its own")
        if no_graphs:
            raise SessaError("`no_graphs` is for a checkpoint, not for an exported model")
        if adapter is not None:
            raise SessaError("`adapter` is for a checkpoint; merge it before the export")
        where = f" on {device}" if device else ""
        say_aside(f"{folder}: an exported model, run by ONNX Runtime{where}")
        opened_by = partial(load_decoder, native=native, device=device)
        return ModelHome(folder=folder, open=opened_by, files=model_files)
    if native:
        raise SessaError("`native` is for a folder that `sessa export` wrote")
    name = choose_backend(backend)
    if no_graphs and name != "torch":
        raise SessaError(f"`no_graphs` is for CUDA graphs, which {name} does not use")
    load = partial(framework(name, "decoding").load_decoder, dtype=dtype, device=device)
    adapted = "" if adapter is None else f" with the adapter {adapter}"
    say_aside(f"{folder}: a checkpoint{adapted}, run by {name}")

    def opened(opened_folder: Path) -> Decoder:
        decoder = load(opened_folder, adapter=adapter if opened_folder == folder else None)
        if no_graphs:
            decoder.graphs = False
        return decoder

    return ModelHome(folder=folder, open=opened, files=partial(adapted_files, adapter=adapter))


def open_decoder(
    folder: Path,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    native: bool,
    no_graphs: bool = False,
    adapter: Path | None = None,
) -> Decoder:
    """Load the model of a folder, and say on stderr which runtime runs it."""
    return find_home(folder, backend, device, dtype, native, no_graphs, adapter).open(folder)


def say_aside(text: str) -> None:
    """Print a line on stderr, so that stdout holds the generated text alone."""
    say(make_console(json_output=True), text)
