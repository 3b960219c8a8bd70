"""One-node models of sessa::FeedbackSolve on the native library, and their operands."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper
from support.golden_cases import relative_error
from support.operands import NAMES, Arrays, draw_operands

from sessa_common.errors import SessaError
from sessa_common.reference import model as reference
from sessa_export import native

REAL = ("f", "q", "k", "gamma", "past_s")
DTYPES = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.BFLOAT16: ml_dtypes.bfloat16,
}
# Of the largest magnitude of s. The 16-bit types round s itself: 2^-11 and 2^-8.
LIMITS = {TensorProto.FLOAT: 3e-6, TensorProto.FLOAT16: 6e-4, TensorProto.BFLOAT16: 4.5e-3}
SETS = ("sse2", "avx2", "avx512", "neon", "generic")

Types = dict[str, int]


def built_library() -> Path:
    """The native library; skips the test where there is no compiler."""
    try:
        native.find_compiler()
    except SessaError as error:
        pytest.skip(str(error))
    return native.build()


def instruction_sets(library: Path) -> list[str]:
    """Return the instruction sets of the library that this processor has."""
    handle = ctypes.CDLL(str(library))
    handle.SessaUseInstructionSet.restype = ctypes.c_bool
    handle.SessaInstructionSet.restype = ctypes.c_char_p
    newest = handle.SessaInstructionSet()
    found = [name for name in SETS if handle.SessaUseInstructionSet(name.encode())]
    handle.SessaUseInstructionSet(newest)
    return found


def use_instruction_set(library: Path, name: str) -> None:
    """Make every later call of the operator in this process use one instruction set."""
    handle = ctypes.CDLL(str(library))
    handle.SessaUseInstructionSet.restype = ctypes.c_bool
    assert handle.SessaUseInstructionSet(name.encode())


def one_node(given: tuple[str, ...], types: Types | None = None) -> bytes:
    """A model that casts its float32 inputs (the mask: bool) to `types` and solves.

    Shapes are undeclared, so that ONNX Runtime leaves them to the operator. s comes out in the type
    of f, cast to float32.
    """
    types = types or {}
    infos, nodes, names = [], [], []
    for name in NAMES:
        if name not in given:
            names.append("")
            continue
        declared = TensorProto.BOOL if name == "key_mask" else TensorProto.FLOAT
        cast = name in types and types[name] != declared
        infos.append(helper.make_tensor_value_info(f"in_{name}" if cast else name, declared, None))
        if cast:
            nodes.append(helper.make_node("Cast", [f"in_{name}"], [name], to=types[name]))
        names.append(name)
    while not names[-1]:
        names.pop()
    nodes.append(helper.make_node("FeedbackSolve", names, ["s"], name="solve", domain="sessa"))
    nodes.append(helper.make_node("Cast", ["s"], ["s32"], to=TensorProto.FLOAT))
    output = helper.make_tensor_value_info("s32", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "one", infos, [output])
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("sessa", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()


@cache
def session(
    library: Path, given: tuple[str, ...], types: tuple[tuple[str, int], ...] = (), threads: int = 2
) -> onnxruntime.InferenceSession:
    """A session of `one_node` without a memory arena, so that a sanitizer sees each buffer."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4  # refusals are what many tests want; they need no log
    native.register(options, library)
    return onnxruntime.InferenceSession(one_node(given, dict(types)), options)


def solve(
    library: Path, arrays: Arrays, types: Types | None = None, threads: int = 2
) -> np.ndarray:
    """s in float32 from the native operator on operands cast to `types`."""
    types = types or {}
    given = tuple(name for name in NAMES if name in arrays)
    run = session(library, given, tuple(sorted(types.items())), threads)
    feeds = {i.name: arrays[i.name.removeprefix("in_")] for i in run.get_inputs()}
    return run.run(None, feeds)[0]


def draw(
    seed: int | list[int], mask: str | None = None, logits: float = 3.0, P: int = 0, **sizes: Any
) -> Arrays:
    """Draw operands whose largest score is `logits`; without a past, some have an empty past_s."""
    found = draw_operands(seed, mask=mask, logits=logits, P=P, **sizes)
    if P == 0 and mask in (None, "holes"):
        del found["past_s"]
    return found


def rounded(arrays: Arrays, types: Types) -> Arrays:
    """The operands as a cast to `types` leaves them, in float64."""
    found = {}
    for name, value in arrays.items():
        dtype = DTYPES.get(types.get(name, TensorProto.FLOAT), np.float32)
        found[name] = value if name == "key_mask" else value.astype(dtype).astype(np.float64)
    return found


def error(s: np.ndarray, arrays: Arrays, types: Types | None = None) -> float:
    """Largest difference from the float64 reference, over the largest magnitude of s."""
    return relative_error(s, reference.feedback_solve(**rounded(arrays, types or {})))
