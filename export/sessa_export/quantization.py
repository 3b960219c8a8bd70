"""Smaller weights for an exported model: float16 storage, int8 and int4 by ONNX Runtime's tools."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError
from sessa_export.sessions import DTYPE_KEY

DTYPES = ("fp32", "fp16", "int8", "int4")
INT4_BLOCK = 32
# Smaller tensors (biases, norms, constants) stay in float32.
SMALLEST_HALF = 1024
LARGEST_HALF = float(np.finfo(np.float16).max)


def prepare(
    config: SessaConfig, weights: Mapping[str, np.ndarray], dtype: str
) -> tuple[SessaConfig, Mapping[str, np.ndarray]]:
    """The model to build for a dtype: the quantisers need a head of its own, not a transposed view.

    Raises SessaError for a dtype that is not in DTYPES.
    """
    if dtype not in DTYPES:
        raise SessaError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if dtype in ("fp32", "fp16") or not config.tie_word_embeddings:
        return config, weights
    head = {"lm_head.weight": weights["model.embed_tokens.weight"]}
    return replace(config, tie_word_embeddings=False), {**weights, **head}


def shrink(model: onnx.ModelProto, dtype: str) -> onnx.ModelProto:
    """The model with its weights stored in `dtype`; activations and caches stay float32."""
    if dtype == "int8":
        model = _int8(model)
    elif dtype == "int4":
        model = _int4(model)
    if dtype != "fp32":
        _store_half(model)
    model.metadata_props.add(key=DTYPE_KEY, value=dtype)
    return model


def _store_half(model: onnx.ModelProto) -> None:
    """Store large float32 tensors in float16 behind a Cast, which runtimes fold when they load."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < SMALLEST_HALF:
            continue
        name, half = tensor.name, tensor.name + ".float16"
        value = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(_to_half(value, name), half))
        casts.append(helper.make_node("Cast", [half], [name], name=f"{name}.cast", to=1))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _to_half(value: np.ndarray, name: str) -> np.ndarray:
    largest = float(np.abs(value).max())
    if not largest <= LARGEST_HALF:
        raise SessaError(f"{name} holds {largest:.3g}, which float16 cannot; use `dtype` fp32")
    return value.astype(np.float16)


def _linear_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of the products with a learned matrix of more than one column."""
    learned = {
        tensor.name: tensor.dims
        for tensor in model.graph.initializer
        if tensor.name.endswith(".weight")
    }
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul" and learned.get(node.input[1], [1])[-1] > 1
    ]


def _int8(model: onnx.ModelProto) -> onnx.ModelProto:
    """Dynamic quantisation: a scale for each output column, activations as they come."""
    with _quiet(), tempfile.TemporaryDirectory(prefix="sessa-int8-") as scratch:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        file = Path(scratch) / "model.onnx"
        quantize_dynamic(
            model,
            file,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=_linear_nodes(model),
            # u8 x s8 products saturate on x86 processors without VNNI; u8 x u8 is exact everywhere.
            weight_type=QuantType.QUInt8,
            per_channel=True,
            use_external_data_format=True,
        )
        model = onnx.load(file)
    _sort_nodes(model.graph)
    return model


def _sort_nodes(graph: onnx.GraphProto) -> None:
    """Put nodes behind what they read; the tool forgets what their subgraphs read."""
    makers = {name: node for node in graph.node for name in node.output}
    ordered: dict[str, onnx.NodeProto] = {}

    def place(node: onnx.NodeProto) -> None:
        for name in _read_names(node):
            maker = makers.get(name)
            if maker is not None and maker.output[0] not in ordered:
                place(maker)
        ordered.setdefault(node.output[0], node)

    for node in graph.node:
        place(node)
    nodes = list(ordered.values())
    del graph.node[:]
    graph.node.extend(nodes)


def _read_names(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _read_names(inner)


def _int4(model: onnx.ModelProto) -> onnx.ModelProto:
    """Blocks of 32 weights share a scale and a zero point (com.microsoft MatMulNBits)."""
    linear = set(_linear_nodes(model))
    with _quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            model,
            block_size=INT4_BLOCK,
            is_symmetric=False,
            accuracy_level=4,  # ONNX Runtime multiplies in int8
            nodes_to_exclude=[node.name for node in model.graph.node if node.name not in linear],
        )
        quantizer.process()
        return quantizer.model.model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tools from writing a line for every node, and from setting up logging for us."""
    root = logging.getLogger()
    handlers, level, disabled = root.handlers[:], root.level, root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)
