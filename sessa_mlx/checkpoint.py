"""Models from checkpoint folders and back, with the names and values of the files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from sessa_common.checkpoint.adapters import load_merged
from sessa_common.checkpoint.folder import check_weights, load_packed_weights, load_weights
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.checkpoint.stored_types import is_exact
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
    folder: Path | str,
    *,
    adapter: Path | str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> SessaForCausalLM:
    """Load the model of a checkpoint folder, in the dtype of its config unless another is given.

    A folder that MLX quantised stays packed in memory, except in float64, for which MLX has no
    packed product. device is "cpu" or "gpu"; see `choose_device`. `adapter` is a folder of
    `finetune`, whose changes are added to the weights, which are expanded for that. Raises
    SessaError for a folder that is no checkpoint, an adapter that does not fit and a device that is
    not there.
    """
    _check_dtype(dtype)
    if adapter is not None:
        config, weights = load_merged(folder, adapter)
        return build_model(config, weights, dtype=dtype, device=device)
    config, tensors, packed = load_packed_weights(folder)
    if not packed or (dtype or config.dtype) == "float64":
        config, tensors = load_weights(folder) if packed else (config, tensors)
        return build_model(config, tensors, dtype=dtype, device=device)
    model = _empty_model(config, dtype, device)
    nn.quantize(
        model,
        class_predicate=lambda path, module: path in packed and dataclasses.asdict(packed[path]),
    )
    _copy_weights(model, tensors, getattr(mx, dtype or config.dtype))
    return model


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
    model = _empty_model(config, dtype, device)
    set_weights(model, weights)
    return model


def _empty_model(config: SessaConfig, dtype: str | None, device: str | None) -> SessaForCausalLM:
    mx.set_default_device(mx.Device(getattr(mx, choose_device(device))))
    model = SessaForCausalLM(config)
    model.set_dtype(getattr(mx, dtype or config.dtype))
    return model


def set_weights(model: SessaForCausalLM, weights: Mapping[str, np.ndarray]) -> None:
    """Copy arrays into the parameters of the same name, casting to the parameters' dtype."""
    check_weights(model.config, weights, "weights")
    _copy_weights(model, weights, model.model.norm.weight.dtype)


def _copy_weights(
    model: SessaForCausalLM, weights: Mapping[str, np.ndarray], dtype: mx.Dtype
) -> None:
    """Copy arrays into the parameters of the same name, in the dtypes of a model of `dtype`."""
    arrays = {name: to_tensor(weights[name]) for name in dict(tree_flatten(model.parameters()))}
    model.load_weights([(name, x.astype(_dtype_in(name, x, dtype))) for name, x in arrays.items()])
    mx.eval(model.parameters())


def _dtype_in(name: str, weight: mx.array, dtype: mx.Dtype) -> mx.Dtype:
    """The dtype of a weight in a model of `dtype`."""
    if weight.dtype == mx.uint32:
        return mx.uint32
    wide = is_exact(name) and weight.dtype == mx.float32 and dtype.size < 4
    return mx.float32 if wide else dtype


def model_weights(model: SessaForCausalLM) -> dict[str, np.ndarray]:
    """Return every parameter as a NumPy array (bfloat16 by ml_dtypes) by its checkpoint name.

    Packed weights are given as the numbers that they stand for.
    """
    parameters = dict(tree_flatten(model.parameters()))
    for path, module in model.named_modules():
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            parameters[f"{path}.weight"] = mx.dequantize(
                module.weight,
                scales=parameters.pop(f"{path}.scales"),
                biases=parameters.pop(f"{path}.biases"),
                group_size=module.group_size,
                bits=module.bits,
            )
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
