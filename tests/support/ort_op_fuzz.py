"""Random shapes and types for the native operator: right, or refused by the name of an input.

python tests/support/ort_op_fuzz.py [--count 2000] [--seed 0] [--sanitize]

--sanitize runs on a build with AddressSanitizer and UndefinedBehaviorSanitizer, which end the
process at the first finding (Linux).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnxruntime
from onnx import TensorProto
from support.ort_op_cases import (
    DTYPES,
    LIMITS,
    NAMES,
    REAL,
    Arrays,
    Types,
    draw,
    error,
    instruction_sets,
    solve,
    use_instruction_set,
)

from sessa_common.operator import check_shapes
from sessa_export import native

WRONG_TYPES = (TensorProto.DOUBLE, TensorProto.INT32, TensorProto.UINT8, TensorProto.INT64)
REFUSAL = re.compile(r"sessa::FeedbackSolve: input (\w+) ")
# ONNX Runtime itself checks f and key_mask against the types the operator registered.
TYPE_ERROR = re.compile(r"input parameter \((\w+)\)|type inferencing error|INVALID_GRAPH")


def random_operands(rng: np.random.Generator) -> tuple[Arrays, Types]:
    """Operands that fit one another, with a random set of optional inputs and of types."""
    B, D, K = (int(rng.integers(1, high)) for high in (4, 80, 70))
    T = int(rng.choice([1, 1, 2, 3, 7, 16, 33, 40, 70, 290]))
    P = int(rng.choice([0, 0, 1, 2, 5, 40]))
    mask = rng.choice(["none", "open", "left", "holes", "closed"])
    sizes = {"B": B, "T": T, "D": D, "K": K, "P": P}
    seed, logits = int(rng.integers(2**31)), float(rng.choice([1, 9]))
    arrays = draw(seed, None if mask == "none" else str(mask), logits, **sizes)
    kinds = list(DTYPES)
    common = int(rng.choice(kinds))
    types = dict.fromkeys(REAL, common)
    if rng.random() < 0.5:
        types["gamma"], types["past_s"] = (int(rng.choice(kinds)) for _ in range(2))
    return arrays, types


def corrupt(rng: np.random.Generator, arrays: Arrays, types: Types) -> str:
    """Make one input wrong in place: its rank, one dimension, its type, or leave it out."""
    name = str(rng.choice([name for name in NAMES if name in arrays]))
    value, kind = arrays[name], rng.choice(["rank", "size", "size", "type", "gone"])
    if kind == "rank":
        arrays[name] = value[0] if rng.random() < 0.5 else value[..., None]
    elif kind == "size":
        axis = int(rng.integers(value.ndim))
        size = int(rng.choice([0, max(0, value.shape[axis] - 1), value.shape[axis] + 1]))
        shape = (*value.shape[:axis], size, *value.shape[axis + 1 :])
        arrays[name] = np.resize(value, shape)
    elif kind == "type":
        types[name] = int(rng.choice(WRONG_TYPES))
    elif name in ("past_s", "key_mask"):
        del arrays[name]
    return f"{kind} of {name}"


def acceptable(arrays: Arrays, types: Types) -> bool:
    """Return True when the operator's rules of shapes and types allow these operands."""
    if any(types.get(name) in WRONG_TYPES for name in arrays):
        return False
    try:
        check_shapes(*(arrays.get(name) for name in NAMES))
    except ValueError:
        return False
    return types["q"] == types["k"]


def run_one(library: Path, rng: np.random.Generator) -> str:
    """One case; AssertionError with its description when the operator is wrong."""
    arrays, types = random_operands(rng)
    what = corrupt(rng, arrays, types) if rng.random() < 0.5 else "nothing"
    shapes = {name: value.shape for name, value in arrays.items()}
    case = f"{what} wrong: {shapes}, types {types}"
    try:
        s = solve(library, arrays, types, threads=int(rng.integers(1, 4)))
    except Exception as failure:  # the binding raises one class per status, all plain Exceptions
        text = str(failure)
        assert not acceptable(arrays, types), f"{case}: refused: {text}"
        named = REFUSAL.search(text)
        known = named.group(1) in NAMES if named else TYPE_ERROR.search(text)
        assert known, f"{case}: no input named: {text}"
        return "refused"
    assert acceptable(arrays, types), f"{case}: accepted"
    found, limit = error(s, arrays, types), LIMITS[types["f"]]
    assert found <= limit, f"{case}: error {found:.1e}, allowed {limit:.0e}"
    return "solved"


def run_many(library: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Run `count` cases over all instruction sets; how many were solved and how many refused."""
    sets, outcomes = instruction_sets(library), {"solved": 0, "refused": 0}
    for i in range(count):
        use_instruction_set(library, sets[i % len(sets)])
        outcomes[run_one(library, np.random.default_rng([seed, i]))] += 1
    use_instruction_set(library, sets[-1])
    return outcomes


def rerun_sanitized(arguments: list[str]) -> int:
    """This program again, in a process that has the sanitizers' runtime, on a sanitized build."""
    compiler = native.find_compiler()
    library = native.build(sanitize=True)
    runtimes = [
        subprocess.check_output([*compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    # Python keeps memory until it exits, which is no leak of the operator's.
    settings = {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, __file__, *arguments, "--library", str(library)]
    return subprocess.run(command, env={**os.environ, **settings}).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--library", type=Path)
    options = parser.parse_args()
    if options.sanitize:
        return rerun_sanitized(["--count", str(options.count), "--seed", str(options.seed)])
    library = options.library or native.build()
    outcomes = run_many(library, options.count, options.seed)
    print(f"{options.count} cases, {outcomes}, onnxruntime {onnxruntime.__version__}, {library}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
