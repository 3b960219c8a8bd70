"""The checkpoint folder: config.json, model*.safetensors, tokenizer.json and the rest."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sessa_common.checkpoint.finite import require_finite_weights
from sessa_common.checkpoint.quantization import dequantize_weights, is_quantized
from sessa_common.config import SessaConfig, parameter_shapes
from sessa_common.errors import SessaError
from sessa_common.json_files import read_json

NUMPY_DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
INDEX = "model.safetensors.index.json"
SHARD_SIZE = 5 * 10**9


def check_new_folder(path: Path | str, *, force: bool = False) -> None:
    """Raise SessaError when `path` exists and is not an empty folder, unless `force`."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise SessaError(f"{path}: exists and is not a folder")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise SessaError(f"{path}: the folder is not empty; choose another or add --force")


@contextmanager
def new_folder(path: Path | str, *, force: bool = False) -> Iterator[Path]:
    """Yield a scratch folder that becomes `path` if the block ends well and vanishes if not.

    Raises SessaError before anything is written when `path` exists and is not an empty folder,
    unless `force`.
    """
    path = Path(os.path.abspath(path))
    check_new_folder(path, force=force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        scratch.chmod(0o755)
    except OSError as error:
        raise SessaError(f"{path}: cannot be created ({error.strerror})") from None
    try:
        yield scratch
        if path.is_dir():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.replace(path, old / path.name)
            os.replace(scratch, path)
            shutil.rmtree(old)
        else:
            os.replace(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside the target and rename, so that a reader never sees half a file."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of one safetensors file; a damaged file is a SessaError that names it."""
    try:
        with safe_open(str(path), framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise SessaError(f"{path}: not a readable safetensors file ({error})") from None


def write_safetensors(
    path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors beside the target and rename, so that a reader never sees half a file."""
    scratch = path.with_name(path.name + ".tmp")
    whole = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in arrays.items()}
    save_file(whole, scratch, metadata=metadata)
    # The library makes files that only their owner may read.
    umask = os.umask(0)
    os.umask(umask)
    scratch.chmod(0o666 & ~umask)
    os.replace(scratch, path)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: the shards of its index, or every model*.safetensors."""
    index = folder / INDEX
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise SessaError(f"{index}: shards missing: {', '.join(missing) or 'none are listed'}")
        return [folder / name for name in names]
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise SessaError(f"{folder}: no model*.safetensors file in it")
    return files


def load_config(folder: Path | str) -> SessaConfig:
    """Read and validate config.json of a checkpoint folder."""
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise SessaError(f"{folder}: no such checkpoint folder")
    return SessaConfig.from_dict(read_json(path), str(path))


def load_weights(folder: Path | str) -> tuple[SessaConfig, dict[str, np.ndarray]]:
    """Read configuration and tensors of a checkpoint folder; names and shapes are checked.

    A folder that MLX quantised is dequantised, in the type of its scales; convolutions come as
    (channels, 1, width), whatever their layout in the file.
    """
    folder = Path(folder)
    config = load_config(folder)
    weights = read_tensors(folder)
    if is_quantized(weights):
        settings = read_json(folder / "config.json").get("quantization")
        weights = dequantize_weights(weights, settings, config.hidden_size, str(folder))
    weights = channels_first(weights)
    check_weights(config, weights, str(folder))
    require_finite_weights(weights, str(folder))
    return config, weights


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder's weight files, as it is stored."""
    tensors: dict[str, np.ndarray] = {}
    for file in weight_files(folder):
        tensors |= read_safetensors(file)
    return tensors


def channels_first(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Turn convolutions from MLX's layout (channels, width, 1) to ours, (channels, 1, width)."""
    # The axis of length 1 tells the layouts apart; at width 1 they are the same.
    return {
        name: value.swapaxes(1, 2) if is_convolution(name, value) and value.shape[2] == 1 else value
        for name, value in weights.items()
    }


def channels_last(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Turn convolutions from our layout to MLX's; the inverse of `channels_first`."""
    return {
        name: value.swapaxes(1, 2) if is_convolution(name, value) else value
        for name, value in weights.items()
    }


def is_convolution(name: str, value: np.ndarray) -> bool:
    """Whether a tensor is the weight of a Mamba-2 layer's depth-wise convolution."""
    return name.endswith(".conv1d.weight") and value.ndim == 3


def check_weights(config: SessaConfig, weights: Mapping[str, np.ndarray], where: str) -> None:
    """Raise SessaError unless `weights` has exactly the tensors that `config` asks for."""
    expected = parameter_shapes(config)
    missing, extra = (
        sorted(expected.keys() - weights.keys()),
        sorted(weights.keys() - expected.keys()),
    )
    if missing:
        raise SessaError(f"{where}: tensor {missing[0]} is missing ({len(missing)} in all)")
    if extra:
        raise SessaError(
            f"{where}: tensor {extra[0]} is not part of this model ({len(extra)} in all)"
        )
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise SessaError(
                f"{where}: {name} has shape {tuple(weights[name].shape)}, expected {shape}"
            )
        if weights[name].dtype not in NUMPY_DTYPES.values():
            raise SessaError(f"{where}: {name} is {weights[name].dtype}, expected a floating type")


def save_weights(
    folder: Path,
    config: SessaConfig,
    weights: Mapping[str, np.ndarray],
    *,
    shard_size: int = SHARD_SIZE,
    framework: str = "pt",
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and the tensors into an existing folder, with a sharded index when large.

    shard_size is in bytes; framework is the safetensors `format`, "pt" or "mlx"; extra_config are
    further keys for config.json.
    """
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, value in weights.items():
        if shards[-1] and size + value.nbytes > shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [
            f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
    for file, shard in zip(names, shards, strict=True):
        write_safetensors(folder / file, shard, {"format": framework})
    if len(shards) > 1:
        weight_map = {
            name: file for file, shard in zip(names, shards, strict=True) for name in shard
        }
        total = sum(value.nbytes for value in weights.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", {**config.to_dict(), **(extra_config or {})})
