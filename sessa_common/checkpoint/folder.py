"""The checkpoint folder: config.json, model*.safetensors, tokenizer.json and the rest."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from sessa_common.checkpoint.finite import require_finite_weights
from sessa_common.checkpoint.lazy_tensors import spec_of
from sessa_common.checkpoint.manifest import (
    is_plain_name,
    manifest_files,
    read_manifest,
    read_settled,
    write_manifest,
)
from sessa_common.checkpoint.quantization import (
    Packing,
    dequantize_weights,
    is_quantized,
    packings,
)
from sessa_common.checkpoint.remote_code import write_config
from sessa_common.checkpoint.run_files import ADAPTER_CONFIG
from sessa_common.checkpoint.safetensors_file import map_tensors, write_tensors
from sessa_common.config import SessaConfig, parameter_shapes
from sessa_common.errors import SessaError
from sessa_common.input_files import require_regular
from sessa_common.json_files import read_json
from sessa_common.storage import atomic_path, write_json

NUMPY_DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_SIZE = 5 * 10**9


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file for NumPy.

    Raises SessaError that names the file when it is no regular file, is damaged, or holds a type
    that NumPy lacks, such as an 8-bit float, also while its tensors are read inside the block.
    """
    require_regular(path)
    try:
        with safe_open(str(path), framework="np") as file:
            yield file
    except SessaError:
        raise
    # NumPy reports a type that it lacks as a missing attribute.
    except (SafetensorError, OSError, ValueError, AttributeError, OverflowError) as error:
        raise SessaError(f"{path}: not a readable safetensors file ({error})") from None


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of one safetensors file; raises SessaError as `open_safetensors` does."""
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Map every tensor of one safetensors file, which takes no memory; they cannot be changed.

    Raises SessaError as `open_safetensors` does.
    """
    with open_safetensors(path):
        try:
            return map_tensors(path)
        except KeyError as error:
            raise ValueError(f"type {error} is not known") from None


def write_safetensors(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    metadata: dict[str, str] | None = None,
    names: Iterable[str] | None = None,
) -> None:
    """Write tensors, or those of these names, as a safetensors file with text in its header.

    The file appears whole, and one tensor at a time is in memory. Raises SessaError when the disk
    is full.
    """
    try:
        with atomic_path(path) as scratch, scratch.open("wb") as file:
            write_tensors(file, arrays, arrays if names is None else names, metadata)
    except OSError as error:
        raise SessaError(f"{path}: cannot be written ({error.strerror})") from None


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the model of a folder; no other file is read.

    The manifest names them. In a folder of another tool they are the shards of the index, else
    model.safetensors, else one whole set of model-i-of-n.safetensors or a single file.
    """
    manifest = read_manifest(folder)
    if manifest is not None and manifest.is_sharded:
        raise SessaError(
            f"{folder}: its weights are in shards, which only training reads; write them as an "
            f"ordinary checkpoint with: sessa convert {folder} OUT"
        )
    if manifest is not None and any(map(is_weight_file, manifest.files)):
        return manifest_files(folder, manifest, is_weight_file)
    single = folder / SINGLE
    if (folder / INDEX).exists():
        files = _indexed_files(folder / INDEX)
        if single.exists() and single not in files:
            raise SessaError(f"{folder}: {SINGLE} and {INDEX} are two models; remove the old one")
        return files
    if single.is_file():
        return [single]
    return _whole_set(folder)


def is_weight_file(name: str) -> bool:
    """Return True for the name of a file that holds weights in a checkpoint folder."""
    return fnmatchcase(name, "model*.safetensors")


def is_model_file(name: str) -> bool:
    """Return True for the name of a file that holds weights or their index."""
    return is_weight_file(name) or name == INDEX


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SessaError(f"{index}: weight_map is not a table of tensors and their files")
    for name in weight_map.values():
        if not is_plain_name(name):
            raise SessaError(f"{index}: {name!r} is not the name of a file in this folder")
    names = sorted(set(weight_map.values()))
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise SessaError(f"{index}: shards missing: {', '.join(missing)}")
    return [index.parent / name for name in names]


def _whole_set(folder: Path) -> list[Path]:
    """Shards that have no index: all of 1 to n of n, or a single file."""
    files = sorted(path for path in folder.glob("model*.safetensors") if path.is_file())
    if not files:
        raise SessaError(f"{folder}: no model*.safetensors file in it")
    shards = [re.fullmatch(r"model-(\d+)-of-(\d+)\.safetensors", file.name) for file in files]
    numbers = [(int(shard[1]), int(shard[2])) for shard in shards if shard]
    whole = numbers == [(i, len(files)) for i in range(1, len(files) + 1)]
    if not whole and len(files) > 1:
        raise SessaError(
            f"{folder}: {', '.join(file.name for file in files)} are not the shards of one model, "
            f"and there is no {INDEX} that says which to read"
        )
    return files


def require_own_file(folder: Path, path: Path) -> None:
    """Raise SessaError when a path inside a folder leads out of it through a link.

    The cache of the Hugging Face hub keeps the files of a folder in "blobs" beside it; those count.
    """
    # Not resolve(), which raises for a link that leads to itself.
    home, real = (Path(os.path.realpath(place)) for place in (folder, path))
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(place) for place in homes):
        raise SessaError(f"{path}: is a link out of its folder, to {real}; it is not copied")


def load_config(folder: Path | str) -> SessaConfig:
    """Read and validate config.json of a checkpoint folder."""
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise SessaError(f"{folder}: no such checkpoint folder")
    if not path.is_file() and (Path(folder) / ADAPTER_CONFIG).is_file():
        raise SessaError(
            f"{folder}: is an adapter, which changes a model; give the folder of the model, and "
            "this one as `adapter`"
        )
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
    weights = dict(channels_first(weights))
    check_weights(config, weights, str(folder))
    require_finite_weights(weights, str(folder))
    return config, weights


def load_packed_weights(
    folder: Path | str,
) -> tuple[SessaConfig, dict[str, np.ndarray], dict[str, Packing]]:
    """Read a checkpoint folder as `load_weights` does, but leave quantised matrices packed.

    The third result says how each of these is packed, by its name without ".weight"; it is empty
    for a folder that is not quantised.
    """
    folder = Path(folder)
    config = load_config(folder)
    tensors = dict(channels_first(read_tensors(folder)))
    settings = read_json(folder / "config.json").get("quantization")
    packed = packings(tensors, settings, config.hidden_size, str(folder))
    check_weights(config, _unpacked_shapes(tensors, packed), str(folder))
    floats = {name: value for name, value in tensors.items() if value.dtype != np.uint32}
    require_finite_weights(floats, str(folder))
    return config, tensors, packed


def _unpacked_shapes(
    tensors: Mapping[str, np.ndarray], packed: Mapping[str, Packing]
) -> dict[str, np.ndarray]:
    """Stand-ins with the shapes and dtypes that the weights have without packing."""
    found = dict(tensors)
    for path, packing in packed.items():
        scales = found.pop(f"{path}.scales")
        del found[f"{path}.biases"]
        shape = len(scales), scales.shape[1] * packing.group_size
        found[f"{path}.weight"] = np.broadcast_to(np.zeros((), scales.dtype), shape)
    return found


def read_tensors(folder: Path, *, mapped: bool = False) -> dict[str, np.ndarray]:
    """Every tensor of a folder's weight files, as it is stored; SessaError for one stored twice.

    Mapped tensors stay in the files, take no memory and cannot be changed.
    """
    read_file = map_safetensors if mapped else read_safetensors

    def read() -> dict[str, np.ndarray]:
        tensors: dict[str, np.ndarray] = {}
        for file in weight_files(folder):
            found = read_file(file)
            if twice := sorted(tensors.keys() & found.keys()):
                raise SessaError(f"{file}: tensor {twice[0]} is also in another file of the model")
            tensors |= found
        return tensors

    return read_settled(folder, read)


def channels_first(weights: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Turn convolutions from MLX's layout (channels, width, 1) to ours, (channels, 1, width)."""
    if not has_convolutions(weights):
        return weights
    # The axis of length 1 tells the layouts apart; at width 1 they are the same.
    return {
        name: value.swapaxes(1, 2) if is_convolution(name, value) and value.shape[2] == 1 else value
        for name, value in weights.items()
    }


def channels_last(weights: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Turn convolutions from our layout to MLX's; the inverse of `channels_first`."""
    if not has_convolutions(weights):
        return weights
    return {
        name: value.swapaxes(1, 2) if is_convolution(name, value) else value
        for name, value in weights.items()
    }


def has_convolutions(weights: Iterable[str]) -> bool:
    """Return True when any name is that of a Mamba-2 layer's depth-wise convolution."""
    return any(name.endswith(".conv1d.weight") for name in weights)


def is_convolution(name: str, value: np.ndarray) -> bool:
    """Return True for the weight of a Mamba-2 layer's depth-wise convolution."""
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
        found = spec_of(weights, name)
        if found.shape != shape:
            raise SessaError(f"{where}: {name} has shape {found.shape}, expected {shape}")
        if found.dtype not in NUMPY_DTYPES.values():
            raise SessaError(f"{where}: {name} is {found.dtype}, expected a floating type")


def save_weights(
    folder: Path,
    config: SessaConfig,
    weights: Mapping[str, np.ndarray],
    *,
    shard_size: int = SHARD_SIZE,
    framework: str = "pt",
    extra_config: Mapping[str, Any] | None = None,
    more_files: Iterable[str] = (),
) -> None:
    """Write config.json and the tensors into a folder that nobody reads yet; the manifest is last.

    shard_size is in bytes; framework is the safetensors `format`, "pt" or "mlx"; extra_config are
    further keys for config.json; more_files are files in the folder that the manifest lists too.
    Weight files of an earlier save are removed.
    """
    names = write_weights(folder, weights, shard_size=shard_size, framework=framework)
    write_config(folder, config, extra_config)
    write_manifest(folder, [*names, *more_files])
    for path in folder.iterdir():
        if is_model_file(path.name) and path.name not in names:
            path.unlink()


def write_weights(
    folder: Path, weights: Mapping[str, np.ndarray], *, shard_size: int, framework: str
) -> list[str]:
    """Write the tensors, with an index when there are several shards; the names of the files."""
    split = split_state_dict_into_shards_factory(
        {name: spec_of(weights, name) for name in weights},
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    for file, inside in split.filename_to_tensors.items():
        write_safetensors(folder / file, weights, {"format": framework}, inside)
    names = list(split.filename_to_tensors)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX, index)
        names.append(INDEX)
    return names
