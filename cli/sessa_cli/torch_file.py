"""PyTorch pickles, opened only as plain state dicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sessa_cli.common import is_installed
from sessa_common.errors import SessaError
from sessa_common.input_files import require_modest_archive

SUFFIXES = {".pt", ".pth", ".bin", ".ckpt"}
# Where training scripts put the model beside its optimizer.
NESTED = ("state_dict", "model_state_dict", "model")


def read_torch_file(path: Path) -> dict[str, np.ndarray] | None:
    """The tensors of a PyTorch file, or None when the path does not name one.

    Only torch.load(weights_only=True) reads it, so nothing in the file is executed. Raises
    SessaError when it holds anything else than a state dict.
    """
    if path.suffix not in SUFFIXES or not path.is_file():
        return None
    if not is_installed("torch"):
        raise SessaError(f"{path}: reading it needs PyTorch; pip install torch")
    require_modest_archive(path)
    import torch

    from sessa_torch.checkpoint import to_numpy

    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file ends the unpickler in every kind of exception
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise SessaError(
            f"{path}: not a plain state dict, and nothing else is unpickled ({reason}); "
            "save it with torch.save(model.state_dict(), ...)"
        ) from None
    if isinstance(content, dict):
        inner = [content[key] for key in NESTED if isinstance(content.get(key), dict)]
        content = inner[0] if inner else content
    if not isinstance(content, dict) or not content:
        raise SessaError(f"{path}: holds a {type(content).__name__}, expected a state dict")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            kind = type(value).__name__
            raise SessaError(f"{path}: {name!r} is a {kind}; a state dict has only tensors")
    return {name: to_numpy(value) for name, value in content.items()}
