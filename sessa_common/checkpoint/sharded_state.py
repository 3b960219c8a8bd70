"""Training states in shards: every process of a run has written the parts of tensors it held.

A shard is a safetensors file of PyTorch's distributed checkpoint, whose header says where each part
begins. The manifest names the shards of a save, and training_state.json its step and its data.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import numpy as np

from sessa_common.checkpoint.folder import map_safetensors, open_safetensors
from sessa_common.checkpoint.lazy_tensors import LazyTensors, Spec
from sessa_common.checkpoint.manifest import manifest_files, read_manifest
from sessa_common.errors import SessaError
from sessa_common.json_files import parse_json

# The table of PyTorch in the header of a shard: {tensor: {"saved_offsets": [row, column]}}.
PARTS, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
WEIGHTS = "weights."


def is_sharded(folder: Path) -> bool:
    """Return True for a run folder, or a save of it, whose training state is in shards."""
    manifest = read_manifest(folder)
    return manifest is not None and manifest.is_sharded


def is_shard(name: str) -> bool:
    """Return True for the name of a file that holds a shard."""
    return fnmatchcase(name, "shard-*.safetensors")


def read_sharded_state(folder: Path) -> LazyTensors:
    """Return the tensors of a state in shards, or rows of them, joined from parts when read.

    Raises SessaError that names a shard that is missing or damaged, or a tensor without all parts.
    """
    manifest = read_manifest(folder)
    assert manifest is not None
    parts: dict[str, list[tuple[int, np.ndarray]]] = {}
    for path in manifest_files(folder, manifest, is_shard):
        starts = _first_rows(path)
        for name, part in map_safetensors(path).items():
            if part.size:
                parts.setdefault(name, []).append((starts[name], part))
    tensors = LazyTensors()
    for name, found in parts.items():
        found.sort(key=lambda item: item[0])
        whole = _whole_spec(found, f"{folder}: {name}")
        tensors.defer(name, whole, partial(_join, found), partial(_join_rows, found))
    return tensors


def sharded_weights(folder: Path) -> LazyTensors:
    """Return the float32 weights of a state in shards, by their names in a checkpoint."""
    state, weights = read_sharded_state(folder), LazyTensors()
    for name in state:
        if name.startswith(WEIGHTS):
            weights.link(name.removeprefix(WEIGHTS), state, name)
    return weights


def _first_rows(path: Path) -> Mapping[str, int]:
    """Return the number of the first row of every part in a shard."""
    with open_safetensors(path) as file:
        stored = (file.metadata() or {}).get(PARTS, "")
        names = list(file.keys())
    try:
        offsets = {name: list(parse_json(stored)[name][OFFSETS]) for name in names}
    except (KeyError, TypeError, ValueError) as error:
        raise SessaError(f"{path}: does not say where its parts begin ({error!r})") from None
    if odd := [name for name in names if any(offsets[name][1:])]:
        raise SessaError(f"{path}: {odd[0]} is cut by another axis than its first, expected rows")
    return {name: int(offsets[name][0]) if offsets[name] else 0 for name in names}


def _whole_spec(parts: list[tuple[int, np.ndarray]], where: str) -> Spec:
    """Return shape and type of a tensor; SessaError unless its parts follow each other."""
    first, rows = parts[0][1], 0
    for start, part in parts:
        if start != rows or part.shape[1:] != first.shape[1:]:
            raise SessaError(f"{where} has no part that begins at row {rows}; a shard is missing")
        rows += len(part) if part.ndim else 0
    return Spec((rows, *first.shape[1:]) if first.ndim else (), first.dtype)


def _join(parts: list[tuple[int, np.ndarray]]) -> np.ndarray:
    arrays = [part for _, part in parts]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _join_rows(parts: list[tuple[int, np.ndarray]], rows: slice) -> np.ndarray:
    """Rows of a tensor, from the parts that hold some of them."""
    own = [
        (start, part[max(rows.start - start, 0) : rows.stop - start])
        for start, part in parts
        if start < rows.stop and rows.start < start + len(part)
    ]
    return _join(own) if own else parts[0][1][:0]
