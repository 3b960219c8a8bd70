"""The native operator's CUDA kernels, run on the processor: see cuda_emulation/."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto
from support.operands import Arrays
from support.ort_op_cases import DTYPES, REAL, Types

from sessa_common.errors import SessaError
from sessa_export import native

FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-x", "c++", "-Wno-unknown-pragmas")


@cache
def emulated_library() -> ctypes.CDLL:
    """The kernels compiled for the processor; skips the test where there is no compiler."""
    try:
        compiler = native.find_compiler()
    except SessaError as error:
        pytest.skip(str(error))
    emulation = Path(__file__).parent / "cuda_emulation"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernels.so"
        include = ["-I", str(emulation), "-I", str(native.source_folder())]
        source = str(emulation / "entry.cpp")
        subprocess.run([*compiler, *FLAGS, *include, source, "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def solve_emulated(arrays: Arrays, types: Types | None = None) -> np.ndarray:
    """s in float32 of the CUDA kernels on operands cast to `types`."""
    dtypes = {name: DTYPES[(types or {}).get(name, TensorProto.FLOAT)] for name in REAL}
    given = {
        name: np.ascontiguousarray(arrays[name], dtypes[name]) for name in REAL if name in arrays
    }
    (B, T, D), K = given["f"].shape, given["q"].shape[2]
    s = np.empty((B, T, D), dtypes["f"])
    sizes = np.array([B, T, given["k"].shape[1] - T, D, K], np.int64)
    pointers = [given[name].ctypes.data if name in given else None for name in REAL]
    numbers = np.array([(types or {}).get(name, TensorProto.FLOAT) for name in REAL], np.int32)
    mask = arrays.get("key_mask")
    mask = None if mask is None else np.ascontiguousarray(mask, np.uint8)
    emulated_library().solve_emulated(
        ctypes.c_void_p(sizes.ctypes.data),
        (ctypes.c_void_p * len(REAL))(*pointers),
        ctypes.c_void_p(numbers.ctypes.data),
        ctypes.c_void_p(None if mask is None else mask.ctypes.data),
        ctypes.c_void_p(s.ctypes.data),
    )
    return s.astype(np.float32)
