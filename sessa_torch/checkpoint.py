"""Models from checkpoint folders and back, with the names and values of the files."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from sessa_common.checkpoint.adapters import load_merged
from sessa_common.checkpoint.folder import check_weights, load_weights
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.checkpoint.stored_types import is_exact
from sessa_common.config import DTYPES, SessaConfig
from sessa_common.errors import SessaError, expect
from sessa_common.json_files import read_json
from sessa_torch.model import SessaForCausalLM

LOG = logging.getLogger("sessa")


def choose_device(name: str | None) -> str:
    """Return the device of that name, or the first of CUDA, MPS and the CPU that is there.

    A CUDA device that is named becomes the current one. "cuda" of a process that torchrun has
    started is the device of its number on this machine.
    """
    if name is None:
        usable = (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
        name = next((device for device, there in usable if there), "cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ and (count := torch.cuda.device_count()):
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % count}"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise SessaError(f"device {name!r} cannot be used by PyTorch here ({reason})") from None
    if name.startswith("cuda:"):
        # PyTorch makes streams and CUDA graphs on the current device.
        torch.cuda.set_device(name)
    return name


def load_model(
    folder: Path | str,
    *,
    adapter: Path | str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> SessaForCausalLM:
    """Load the model of a checkpoint folder, in the dtype of its config unless another is given.

    Quantised weights are expanded, which the log says. device is a name such as "cpu", "cuda" or
    "mps"; see `choose_device`. `adapter` is a folder of `finetune`, whose changes are added to the
    weights. Raises SessaError for a folder that is no checkpoint, an adapter that does not fit and
    a device that is not there.
    """
    _check_dtype(dtype)
    config, weights = load_weights(folder) if adapter is None else load_merged(folder, adapter)
    if "quantization" in read_json(Path(folder) / "config.json"):
        LOG.warning("%s: PyTorch has no product of packed weights; they are expanded", folder)
    return build_model(config, weights, dtype=dtype, device=device)


def new_model(
    config: SessaConfig, seed: int = 0, *, dtype: str | None = None, device: str | None = None
) -> SessaForCausalLM:
    """Make a model with the initial weights that both frameworks draw from `seed`."""
    return build_model(config, initial_weights(config, seed), dtype=dtype, device=device)


def _check_dtype(dtype: str | None) -> None:
    expect(dtype is None or dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")


def build_model(
    config: SessaConfig,
    weights: Mapping[str, np.ndarray],
    *,
    dtype: str | None = None,
    device: str | None = None,
) -> SessaForCausalLM:
    """Make a model with the given weights on `device`, in `dtype` (the config's by default)."""
    _check_dtype(dtype)
    device = choose_device(device)
    with torch.device("meta"):
        model = SessaForCausalLM(config)
    model.to_empty(device=device).to(getattr(torch, dtype or config.dtype))
    for name, parameter in model.named_parameters():
        if is_exact(name) and parameter.itemsize < weights[name].itemsize:
            parameter.data = parameter.data.float()
    set_weights(model, weights)
    return model


def set_weights(model: SessaForCausalLM, weights: Mapping[str, np.ndarray]) -> None:
    """Copy arrays into the parameters of the same name, casting to the parameters' dtype."""
    check_weights(model.config, weights, "weights")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(to_tensor(weights[name]))


def model_weights(model: SessaForCausalLM) -> dict[str, np.ndarray]:
    """Return every parameter as a NumPy array (bfloat16 by ml_dtypes) by its checkpoint name."""
    return {name: to_numpy(value) for name, value in model.named_parameters()}


def to_tensor(array: np.ndarray) -> Tensor:
    """Return a CPU tensor with the same values and dtype."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.tensor(array.view(np.int16)).view(torch.bfloat16)
    return torch.tensor(array)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Return a NumPy array with the same values and dtype."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
