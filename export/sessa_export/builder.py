"""Nodes and tensors of an ONNX graph, added one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Weights = Mapping[str, np.ndarray]


class Builder:
    """Nodes and initializers of a graph; every method returns the name of the tensor it adds."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.scope = ""
        self.count = 0

    def add(self, op: str, *inputs: str, output: str = "", domain: str = "", **attrs: Any) -> str:
        """Append a node and name its one output after the scope, the operator and its number."""
        name = self.name(op)
        output = output or name
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, domain=domain, **attrs))
        return output

    def name(self, op: str) -> str:
        """A name that is unique among all nodes, those of subgraphs included."""
        self.count += 1
        return f"{self.scope}{op}_{self.count}"

    def either(self, condition: str, then: Callable[[], str], otherwise: Callable[[], str]) -> str:
        """Append an If whose branches are the nodes that `then` and `otherwise` add.

        Each function returns the name of its float32 result.
        """
        outer, branches = self.nodes, {}
        for key, make in (("then_branch", then), ("else_branch", otherwise)):
            self.nodes = []
            result = helper.make_tensor_value_info(make(), TensorProto.FLOAT, None)
            branches[key] = helper.make_graph(self.nodes, self.name(key), [], [result])
        self.nodes = outer
        return self.add("If", condition, **branches)

    def split(self, x: str, parts: int | Sequence[int], axis: int) -> list[str]:
        """Append a Split into so many equal parts, or into parts of these sizes."""
        name = self.name("Split")
        count = parts if isinstance(parts, int) else len(parts)
        outputs = [f"{name}.{i}" for i in range(count)]
        if isinstance(parts, int):
            node = helper.make_node("Split", [x], outputs, name, axis=axis, num_outputs=parts)
        else:
            node = helper.make_node("Split", [x, self.ints(*parts)], outputs, name, axis=axis)
        self.nodes.append(node)
        return outputs

    def weight(self, name: str, value: np.ndarray) -> str:
        """Store a tensor under its name, in float32 when it is a floating type."""
        if value.dtype.kind not in "ib":
            value = value.astype(np.float32)
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def ints(self, *values: int) -> str:
        """A one-dimensional int64 constant."""
        name = "ints_" + "_".join(map(str, values)).replace("-", "m")
        return self.weight(name, np.array(values, np.int64))

    def number(self, value: float) -> str:
        """A float32 scalar constant."""
        return self.weight(f"float_{value!r}", np.array(value, np.float32).reshape(1))

    def size(self, x: str, axis: int) -> str:
        """Length of one axis, as a one-element tensor."""
        return self.add("Shape", x, start=axis, end=axis + 1)

    def scalar(self, x: str) -> str:
        """A one-element tensor without its axis."""
        return self.add("Squeeze", x)

    def linear(self, weights: Weights, name: str, x: str) -> str:
        """x W^T + b; the weight is stored (in, out), which MatMul reads without a transpose."""
        return self.joint_linear(weights, [name], name, x)

    def joint_linear(self, weights: Weights, names: Sequence[str], joint: str, x: str) -> str:
        """The results of several `linear` of x side by side, as one product named `joint`."""
        matrices = [weights[f"{name}.weight"] for name in names]
        y = self.add("MatMul", x, self.weight(f"{joint}.weight", np.concatenate(matrices).T))
        if all(f"{name}.bias" not in weights for name in names):
            return y
        biases = [
            weights.get(f"{name}.bias", np.zeros(len(matrix), np.float32))
            for name, matrix in zip(names, matrices, strict=True)
        ]
        return self.add("Add", y, self.weight(f"{joint}.bias", np.concatenate(biases)))

    def norm(self, weights: Weights, name: str, x: str, epsilon: float) -> str:
        """LayerNorm, or RMSNorm where there is no bias, over the last axis of x."""
        scale = self.weight(f"{name}.weight", weights[f"{name}.weight"])
        if f"{name}.bias" in weights:
            bias = self.weight(f"{name}.bias", weights[f"{name}.bias"])
            return self.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)
        # Runtimes know this form and fuse it; RMSNormalization is younger than some of them.
        square = self.add("Pow", x, self.number(2.0))
        mean = self.add("ReduceMean", square, self.ints(-1), keepdims=1)
        root = self.add("Sqrt", self.add("Add", mean, self.number(epsilon)))
        return self.add("Mul", self.add("Div", x, root), scale)
