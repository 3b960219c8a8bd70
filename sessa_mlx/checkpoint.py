"""Models from checkpoint folders and back, with the names and values of the files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from sessa_common.checkpoint.folder import check_weights, load_weights
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.config import DTYPES, SessaConfig
from sessa_common.errors import SessaError, expect
from sessa_mlx.model import SessaForCausalLM


def choose_device(name: str | None) -> str:
    """Return the device of that name, or MLX's default device (the GPU where there is one)."""
    gpu = mx.is_available(mx.gpu)
    if name is None:
        return "gpu" if gpu and mx.default_device() == mx.Device(mx.gpu) else "cpu"
    if name not in ("cpu", "gpu"):
        raise SessaError(f"device is {name!r}, expected cpu or gpu for MLX")
    if name == "gpu" and not gpu:
        raise SessaError("device 'gpu' cannot be used by MLX here (it finds no GPU)")
    return name


def load_model(
    folder: Path | str, *, dtype: str | None = None, device: str | None = None
) -> SessaForCausalLM:
    """Load the model of a checkpoint folder, in the dtype of its config unless another is given.

    device is "cpu" or "gpu"; see `choose_device`. Raises SessaError for a folder that is no
    checkpoint and a device that is not there.
    """
    _check_dtype(dtype)
    config, weights = load_weights(folder)
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
    """Make a model with the given weights, cast to `dtype` (the config's by default).

    MLX has one default device for a process; the chosen device becomes the default.
    """
    _check_dtype(dtype)
    mx.set_default_device(mx.Device(getattr(mx, choose_device(device))))
    model = SessaForCausalLM(config)
    model.set_dtype(getattr(mx, dtype or config.dtype))
    set_weights(model, weights)
    return model


def set_weights(model: SessaForCausalLM, weights: Mapping[str, np.ndarray]) -> None:
    """Copy arrays into the parameters of the same name, casting to the parameters' dtype."""
    check_weights(model.config, weights, "weights")
    parameters = dict(tree_flatten(model.parameters()))
    model.load_weights(
        [(name, to_tensor(weights[name]).astype(old.dtype)) for name, old in parameters.items()]
    )
    mx.eval(model.parameters())


def model_weights(model: SessaForCausalLM) -> dict[str, np.ndarray]:
    """Return every parameter as a NumPy array (bfloat16 by ml_dtypes) by its checkpoint name."""
    parameters = dict(tree_flatten(model.parameters()))
    return {name: to_numpy(value) for name, value in parameters.items()}


def to_tensor(array: np.ndarray) -> mx.array:
    """Return an MLX array with the same values and dtype."""
    if array.dtype == np.float64:
        return mx.array(array, dtype=mx.float64)
    return mx.array(array)


def to_numpy(tensor: mx.array) -> np.ndarray:
    """Return a NumPy array with the same values and dtype."""
    if tensor.dtype == mx.bfloat16:
        return np.array(tensor.view(mx.int16)).view(ml_dtypes.bfloat16)
    return np.array(tensor)
