"""PyTorch pickles, opened only as plain state dicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sessa_common.errors import SessaError
from sessa_common.input_files import require_modest_archive
from sessa_torch.checkpoint import to_numpy

# Keys under which training scripts put the model beside its optimizer.
NESTED = ("state_dict", "model_state_dict", "model")


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors of a file that torch.save wrote.

    Only torch.load(weights_only=True) reads it, so nothing in the file is executed. Raises
    SessaError when it holds anything else than a state dict.
    """
    require_modest_archive(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises every kind of exception in the unpickler
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
    return {name: _to_array(value, f"{path}: {name}") for name, value in content.items()}


def _to_array(tensor: torch.Tensor, where: str) -> np.ndarray:
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_quantized:
        raise SessaError(
            f"{where} is not stored as plain numbers ({tensor.layout}, {tensor.device.type}); "
            "save a dense tensor on the CPU"
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise SessaError(f"{where} repeats numbers that are stored once; save it contiguous")
    try:
        return to_numpy(tensor)
    except (TypeError, RuntimeError) as error:
        raise SessaError(f"{where} is {tensor.dtype}, which cannot be read ({error})") from None
