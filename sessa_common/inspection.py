"""Contents of a checkpoint folder or a weight file: architecture, parameters, bytes, types."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sessa_common.checkpoint.folder import (
    NUMPY_DTYPES,
    channels_first,
    check_weights,
    load_config,
    open_safetensors,
    weight_files,
)
from sessa_common.checkpoint.import_weights import infer_config, map_names, read_arrays
from sessa_common.checkpoint.quantization import is_quantized
from sessa_common.config import FOREIGN_KEYS, parameter_shapes
from sessa_common.data.tokenizer import read_tokenizer, vocabulary_size
from sessa_common.errors import SessaError
from sessa_common.json_files import read_json

PARTS = {
    "embedding": r"model\.embed_tokens\..*",
    "attention": r".*\.mixer\.(?:[qkv]_proj|out_proj)\..*",
    "feedback": r".*\.mixer\.(?:proj_fb\..*|gamma_.*)",
    "gate": r".*\.W_(?:in|out)\..*",
    "mlp": r".*\.mlp\..*",
    "norms": r".*\.(?:ln|ln_mlp|norm|q_norm|k_norm)\..*",
    "head": r"lm_head\..*",
}
STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "U32": "uint32"}


@dataclass(frozen=True, kw_only=True)
class Description:
    """Facts about a checkpoint; architecture has the keys of config.json that are known."""

    kind: str
    architecture: dict[str, Any]
    parameters: dict[str, int]  # by part, and "total"
    bytes: dict[str, int]  # by stored type, and "total"
    files: list[str]
    quantization: dict[str, Any] | None = None
    tokenizer: str = "none"


def describe(path: Path) -> Description:
    """Describe a checkpoint folder from its headers, or a weight file from its tensors.

    Raises SessaError for a path that is not a Sessa checkpoint or lacks a tensor.
    """
    if path.is_dir():
        return _describe_folder(path)
    if not path.is_file():
        raise SessaError(f"{path}: no such file or folder")
    tensors = read_arrays(path)
    found = map_names(tensors, {}, str(path))
    return Description(
        kind=f"{path.suffix} file{' (quantised)' if is_quantized(tensors) else ''}",
        architecture=infer_config(found, str(path)),
        parameters=_count({name: value.shape for name, value in found.weights.items()}),
        bytes=_sum_bytes(tensors),
        files=[path.name],
    )


def _describe_folder(folder: Path) -> Description:
    config = load_config(folder)
    files = weight_files(folder)
    stored = {name: value for file in files for name, value in read_headers(file).items()}
    quantized = is_quantized(stored)
    if not quantized:
        check_weights(config, channels_first(stored), str(folder))
    elif missing := sorted(parameter_shapes(config).keys() - stored.keys()):
        raise SessaError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} in all)")
    return Description(
        kind="MLX-quantised folder" if quantized else "checkpoint folder",
        architecture={k: v for k, v in config.to_dict().items() if k not in FOREIGN_KEYS},
        parameters=_count(parameter_shapes(config)),
        bytes=_sum_bytes(stored),
        files=[file.name for file in files],
        quantization=read_json(folder / "config.json").get("quantization"),
        tokenizer=_describe_tokenizer(folder, config.vocab_size),
    )


def read_headers(file: Path) -> dict[str, np.ndarray]:
    """Arrays of the shape and type of every tensor of a safetensors file, without its data."""
    types = {**NUMPY_DTYPES, "uint32": np.dtype(np.uint32), "uint8": np.dtype(np.uint8)}
    found = {}
    with open_safetensors(file) as opened:
        for name in opened.keys():  # noqa: SIM118
            tensor = opened.get_slice(name)
            one = np.zeros((), types[STORED.get(tensor.get_dtype(), "uint8")])
            found[name] = np.broadcast_to(one, tensor.get_shape())
    return found


def _count(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, shape in shapes.items():
        counts[_part_of(name, shapes)] += math.prod(shape)
    return {**counts, "total": sum(counts.values())}


def _part_of(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    layer, inside, _ = name.partition(".mixer.")
    if inside and f"{layer}.mixer.A_log" in shapes:
        return "state space"
    return next((part for part, form in PARTS.items() if re.fullmatch(form, name)), "mixer")


def _sum_bytes(tensors: Mapping[str, np.ndarray]) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for value in tensors.values():
        sizes[str(value.dtype)] += value.nbytes
    return {**sizes, "total": sum(sizes.values())}


def _describe_tokenizer(folder: Path, vocab_size: int) -> str:
    if not (folder / "tokenizer.json").is_file():
        return "none"
    needed = vocabulary_size(tokenizer := read_tokenizer(folder))
    fits = "fits" if needed <= vocab_size else f"DOES NOT FIT the {vocab_size} rows of"
    return f"{type(tokenizer.model).__name__}, {needed} tokens ({fits} the embedding)"
