"""safetensors files that are larger than memory: read by mapping, written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from sessa_common.checkpoint.lazy_tensors import Spec, spec_of

# Types by their names in the file's header, in the order in which the library sorts them.
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """Return every tensor of a sound file as a view of the file, which cannot be written to.

    Raises KeyError for a type that NumPy lacks.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, "r")[8 + size :] if header else np.zeros(0, np.uint8)
    found = {}
    for name, about in header.items():
        start, stop = about["data_offsets"]
        found[name] = data[start:stop].view(DTYPES[about["dtype"]]).reshape(about["shape"])
    return found


def write_tensors(
    file: BinaryIO,
    tensors: Mapping[str, np.ndarray],
    names: Iterable[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write these tensors in the bytes of the safetensors library, with one in memory at a time."""
    specs = {name: spec_of(tensors, name) for name in names}
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    place, starts = 0, {}
    for name in sorted(specs, key=lambda name: _order(name, specs[name])):
        spec, starts[name] = specs[name], place
        place += spec.nbytes
        header[name] = {
            "dtype": NAMES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": [starts[name], place],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    begin = file.tell()
    # In the order of the names, in which tensors that are computed together follow each other.
    for name, start in ((name, starts[name]) for name in specs):
        array = np.ascontiguousarray(tensors[name])
        file.seek(begin + start)
        file.write(array.reshape(-1).view(np.uint8).data)
    file.seek(begin + place)
    file.truncate()


def _order(name: str, spec: Spec) -> tuple[int, str]:
    return -RANK[spec.dtype], name
