"""Time the native ONNX Runtime operator, its body in standard operators and PyTorch's blocks.

python benchmarks/ort_op.py [--rows 2048] [--past 1024] [--width 512] [--rounds 7] [--save NAME]

Prefill solves --rows rows without a past, decode one row after --past rows; B is 1 and K is D. Each
round runs every way once, so that other work on the machine slows all of them alike; ratios are
medians over the rounds. MiB is the memory that a first call adds to the process. A way that is
further than 1e-5 from the float64 reference is not timed. The row loop is the body with blocks of
one row.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from measure import machine, median_ms, peak_mib, save, table
from onnx import TensorProto, helper

from sessa_common.reference import model as reference
from sessa_export import native
from sessa_export.operator_body import BLOCK as BODY_BLOCK
from sessa_export.operator_body import INPUTS, add_function, feedback_function
from sessa_torch.feedback import feedback_solve

LIMIT = 1e-5
BLOCK = 256
Arrays = dict[str, np.ndarray]
Way = Callable[[], np.ndarray]


def operands(T: int, P: int, D: int) -> Arrays:
    rng = np.random.default_rng(0)
    shapes = {"f": (1, T, D), "q": (1, T, D), "k": (1, P + T, D), "past_s": (1, P, D)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["gamma"] = (0.999 * np.tanh(rng.normal(size=(1, T)))).astype(np.float32)
    return arrays


def operator_model(names: list[str], block: int) -> onnx.ModelProto:
    """A model with one node, without a mask; its body is a function with `block` rows a turn."""
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    output = helper.make_tensor_value_info("s", TensorProto.FLOAT, None)
    node = helper.make_node("FeedbackSolve", names, ["s"], domain="sessa")
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("sessa", 1)]
    graph = helper.make_graph([node], "one", infos, [output])
    model = add_function(helper.make_model(graph, opset_imports=imports, ir_version=10))
    del model.functions[:]
    model.functions.append(feedback_function(21, block))
    return model


def session(model: onnx.ModelProto, threads: int, *, registered: bool = False) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if registered:
        native.register(options, native.build())
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def bound(run: Any, arrays: Arrays) -> Way:
    """A call of a session whose arrays are bound once, as in a client with caches."""
    binding = run.io_binding()
    for name, value in arrays.items():
        binding.bind_cpu_input(name, value)
    binding.bind_output(run.get_outputs()[0].name, "cpu")

    def call() -> np.ndarray:
        run.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()

    return call


def make_ways(arrays: Arrays, threads: int) -> dict[str, Way]:
    given = {name: arrays[name] for name in INPUTS if name in arrays}
    model, row_loop = operator_model(list(given), BODY_BLOCK), operator_model(list(given), 1)
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}

    def blocked() -> np.ndarray:
        with torch.no_grad():
            return feedback_solve(**tensors, backend="blocked").numpy()

    return {
        "native": bound(session(model, threads, registered=True), given),
        "standard-op body": bound(session(model, threads), given),
        "row loop": bound(session(row_loop, threads), given),
        "PyTorch blocked": blocked,
    }


def products_alone(arrays: Arrays, threads: int) -> Way:
    """The two products of every block of rows, and nothing else, by ONNX Runtime's MatMul."""
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "ab"]
    output = helper.make_tensor_value_info("c", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "m", infos, [output])
    imports = [helper.make_opsetid("", 21)]
    run = session(helper.make_model(graph, opset_imports=imports, ir_version=10), threads)
    q, k, states = arrays["q"][0], arrays["k"][0], arrays["f"][0]
    calls = []
    for stop in range(BLOCK, len(q) + 1, BLOCK):
        weights = np.full((BLOCK, stop), 1 / stop, np.float32)
        turned = np.ascontiguousarray(k[:stop].T)
        calls.append(bound(run, {"a": q[stop - BLOCK : stop], "b": turned}))
        calls.append(bound(run, {"a": weights, "b": states[:stop]}))
    return lambda: [call() for call in calls][-1]


def check(ways: dict[str, Way], arrays: Arrays) -> dict[str, dict[str, str]]:
    """Measure each way's error and memory; end the program when an error is too large."""
    want = reference.feedback_solve(**arrays)
    found: dict[str, dict[str, str]] = {}
    for name, way in ways.items():
        results: list[np.ndarray] = []
        memory = peak_mib(lambda way=way, results=results: results.append(way()))
        error = np.abs(results[0] - want).max() / np.abs(want).max()
        if not error <= LIMIT:
            raise SystemExit(f"not timed: {name} is off by {error:.1e}, allowed {LIMIT:.0e}")
        found[name] = {"MiB": f"{memory:.1f}", "error": f"{error:.1e}"}
    return found


def compare(case: str, arrays: Arrays, threads: int, rounds: int) -> list[dict[str, Any]]:
    ways = make_ways(arrays, threads)
    checked = check(ways, arrays)
    if case == "prefill":
        ways["MatMul, products alone"] = products_alone(arrays, threads)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            times[name].append(median_ms(way, repeats=1, warm=0))
    rows = []
    for name, found in times.items():
        ratios = [one / own for one, own in zip(found[1:], times["native"][1:], strict=True)]
        row = {"case": case, "way": name, "ms": f"{median(found[1:]):.3f}"}
        row |= {"of native": f"{median(ratios):.2f}"}
        rows.append(row | checked.get(name, {}))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--past", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--save", help="name of the file under benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine() | {"onnxruntime": onnxruntime.__version__})
    prefill, decode = (
        operands(options.rows, 0, options.width),
        operands(1, options.past, options.width),
    )
    # A first call, because each way loads something once.
    for way in make_ways(operands(2, 0, 8), options.threads).values():
        way()
    rows = compare("prefill", prefill, options.threads, options.rounds)
    rows += compare("decode", decode, options.threads, 20 * options.rounds)
    print(table(rows))
    if options.save:
        print(save(options.save, rows))


if __name__ == "__main__":
    main()
