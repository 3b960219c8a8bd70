"""The runtime of a folder: PyTorch or MLX for a checkpoint, ONNX Runtime for an export."""

from __future__ import annotations

from pathlib import Path

from sessa_cli.common import make_console, say
from sessa_common.errors import SessaError
from sessa_common.frameworks import choose_backend, framework
from sessa_common.inference.generation import Decoder


def open_decoder(
    folder: Path, backend: str | None, device: str | None, dtype: str | None, native: bool
) -> Decoder:
    """Load the model of a folder, and say on stderr which runtime runs it."""
    from sessa_export.runtime import is_exported, load_decoder

    if not folder.is_dir():
        raise SessaError(f"{folder}: no such checkpoint folder")
    if backend == "onnx" or (backend in (None, "auto") and is_exported(folder)):
        if device not in (None, "cpu"):
            raise SessaError(f"device is {device!r}; ONNX Runtime runs on the cpu here")
        if dtype is not None:
            raise SessaError("`dtype` is for a checkpoint; an exported model has its own")
        decoder: Decoder = load_decoder(folder, native=native)
        _say(f"{folder}: an exported model, run by ONNX Runtime")
        return decoder
    if native:
        raise SessaError("`native` is for a folder that `sessa export` wrote")
    name = choose_backend(backend)
    decoder = framework(name, "decoding").load_decoder(folder, dtype=dtype, device=device)
    _say(f"{folder}: a checkpoint, run by {name}")
    return decoder


def _say(text: str) -> None:
    # stdout holds the generated text alone.
    say(make_console(json_output=True), text)
