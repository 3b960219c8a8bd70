"""ONNX models of one FeedbackSolve node, for the tests of the operator's body."""

from __future__ import annotations

import onnx
import onnxruntime
from onnx import TensorProto, helper
from support.operands import NAMES

from sessa_export.gpu_graph import for_gpu
from sessa_export.operator_body import add_function


def operator_model(
    opset: int = 21,
    inputs: tuple[str, ...] = NAMES,
    real: int = TensorProto.FLOAT,
    large_block: int | None = None,
) -> onnx.ModelProto:
    """A model of one FeedbackSolve node; inputs named "" are left out.

    `large_block` gives it the form for a GPU.
    """
    shapes = {"f": "BTD", "q": "BTK", "k": "BSK", "gamma": "BT", "past_s": "BPD", "key_mask": "BS"}
    info = [
        helper.make_tensor_value_info(
            name, TensorProto.BOOL if name == "key_mask" else real, list(shapes[name])
        )
        for name in inputs
        if name
    ]
    node = helper.make_node("FeedbackSolve", inputs, ["s"], domain="sessa")
    out = helper.make_tensor_value_info("s", real, ["B", "T", "D"])
    imports = [helper.make_opsetid("", opset)]
    graph = helper.make_graph([node], "one", info, [out])
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    add_function(model)
    return for_gpu(model, large_block, None, ("f", "key_mask")) if large_block else model


def session_of(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString())
