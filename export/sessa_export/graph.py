"""One ONNX graph of a language model, from its configuration and its weights.

Letters: B batch, T new tokens, P past tokens, S = P + T, D width, H query heads, G key/value heads,
d = D/H, V vocabulary. The layers are those of `sessa_common.reference.model`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError
from sessa_export.cache_layout import LAYOUTS, kv_layers, pair_numbers, require_supported
from sessa_export.operator_body import DOMAIN, OP_TYPE, VERSION, add_function
from sessa_export.sessions import CONFIG_KEY

OPSETS = (21, 22, 23)
# The first set with Attention and RotaryEmbedding; graphs of earlier sets use plain operators.
FUSED_OPSET = 23
IR_VERSION = 10
# The score of a hidden key is lowered by this: finite, so that a row without a visible key is not
# NaN, and so large that no finite score makes up for it.
HIDDEN = np.finfo(np.float32).min
# A protobuf message ends at 2 GiB; the graph itself needs a little of that.
EXTERNAL_DATA_BYTES = 2 * 10**9

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

    def split(self, x: str, parts: int, axis: int) -> list[str]:
        """Append a Split into equal parts."""
        name = self.name("Split")
        outputs = [f"{name}.{i}" for i in range(parts)]
        node = helper.make_node("Split", [x], outputs, name=name, axis=axis, num_outputs=parts)
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


class Shared(NamedTuple):
    """Tensors that every layer reads."""

    bias: str  # (B, 1, T, S) 0 or HIDDEN
    key_mask: str  # (B, S) bool
    rotation: tuple[str, str] | None  # cosines and sines, as `_rotation` says
    fused: bool  # whether there are Attention and RotaryEmbedding
    past: str  # [P]
    total: str  # [S]
    single: str  # whether T is 1, in the buffer layout; else empty
    pairs: list[range]  # numbers of the cached pairs of each layer
    row_heads: int  # heads that hold a row of feedback keys or states together


def build_model(
    config: SessaConfig,
    weights: Weights,
    *,
    opset: int = 23,
    layout: str = "natural",
    large_block: int | None = None,
) -> onnx.ModelProto:
    """The whole model in float32: ids, mask and past caches in, logits and present caches out.

    input_ids (B, T) and attention_mask (B, S) are int64, zero for padding; past_key_values.{j}.key
    and .value are (B, heads, P, width) as in `kv_layers`, and P may be 0; logits are (B, T, V);
    present.{j}.* hold S tokens. In the buffer layout the past is a buffer whose unused rows are
    masked, feedback keys have one more row that no query sees, and new.{j}.* (B, heads, T, width)
    replace present.{j}.*. `large_block` gives the operator its body for a GPU
    (`operator_body.feedback_function`). Raises SessaError for a Mamba-2 layer, an opset that is not
    in OPSETS and a layout that is not in LAYOUTS.
    """
    require_supported(config)
    if opset not in OPSETS:
        raise SessaError(f"opset is {opset}, expected one of {', '.join(map(str, OPSETS))}")
    if layout not in LAYOUTS:
        raise SessaError(f"layout is {layout!r}, expected one of {', '.join(LAYOUTS)}")
    g = Builder()
    shared = _shared(g, config, layout, opset >= FUSED_OPSET)
    embedding = g.weight("model.embed_tokens.weight", weights["model.embed_tokens.weight"])
    x = g.add("Gather", embedding, "input_ids")
    for i in range(config.num_hidden_layers):
        x = _layer(g, config, weights, i, x, shared)
    g.scope = ""
    x = _layer_norm(g, config, weights, "model.norm", x)
    if config.tie_word_embeddings:
        head = g.add("Transpose", embedding, perm=[1, 0])
    else:
        head = g.weight("lm_head.weight", weights["lm_head.weight"].T)
    g.add("MatMul", x, head, output="logits")
    return _finish(g, config, opset, layout, large_block)


def _shared(g: Builder, config: SessaConfig, layout: str, fused: bool) -> Shared:
    past, total = g.size("past_key_values.0.key", 2), g.size("attention_mask", 1)
    key_mask = g.add("Cast", "attention_mask", to=TensorProto.BOOL)
    columns = g.add("Range", _scalar(g, g.ints(0)), _scalar(g, total), _scalar(g, g.ints(1)))
    rows = g.add("Slice", columns, past, total)
    causal = g.add("LessOrEqual", columns, g.add("Unsqueeze", rows, g.ints(1)))  # (T, S)
    seen = g.add("And", causal, g.add("Unsqueeze", key_mask, g.ints(1, 2)))  # (B, 1, T, S)
    bias = g.add("Where", seen, g.number(0.0), g.number(float(HIDDEN)))
    rotation = _rotation(g, config, past, total, fused) if config.use_forward_rope else None
    new = _scalar(g, g.size("input_ids", 1))
    single = g.add("Equal", new, _scalar(g, g.ints(1))) if layout == "buffer" else ""
    row_heads = config.num_attention_heads if layout == "uniform" else 1
    pairs = pair_numbers(config, layout)
    return Shared(bias, key_mask, rotation, fused, past, total, single, pairs, row_heads)


def _scalar(g: Builder, x: str) -> str:
    return g.add("Squeeze", x)


def _rotation(
    g: Builder, config: SessaConfig, past: str, total: str, fused: bool
) -> tuple[str, str]:
    """Cosines and sines of RoPE: (B, T, d/2) for RotaryEmbedding, else (B, 1, T, d), twice each.

    A token's position is the number of real tokens before it.
    """
    count = g.add("CumSum", "attention_mask", _scalar(g, g.ints(1)))
    position = g.add("Max", g.add("Sub", count, g.ints(1)), g.ints(0))
    position = g.add("Slice", position, past, total, g.ints(1))
    axes = g.ints(2) if fused else g.ints(1, 3)
    position = g.add("Cast", g.add("Unsqueeze", position, axes), to=TensorProto.FLOAT)
    d = config.head_dim
    frequency = config.rope_theta ** (-np.arange(0, d, 2, dtype=np.float64) / d)
    frequency = frequency if fused else np.repeat(frequency, 2)
    angle = g.add("Mul", position, g.weight("rope_frequency", frequency))
    return g.add("Cos", angle), g.add("Sin", angle)


def _rotate(g: Builder, config: SessaConfig, x: str, shared: Shared) -> str:
    """RoPE of interleaved pairs; x (B, heads, T, d).

    Without RotaryEmbedding the rotated pair (-x1, x0) is a product with a constant matrix, because
    Split and Concat of single columns are slower in ONNX Runtime.
    """
    if shared.rotation is None:
        return x
    cosines, sines = shared.rotation
    if shared.fused:
        return g.add("RotaryEmbedding", x, cosines, sines, interleaved=1)
    turn = np.kron(np.eye(config.head_dim // 2), np.array([[0.0, 1.0], [-1.0, 0.0]]))
    turned = g.add("MatMul", x, g.weight("rope_turn", turn))
    return g.add("Add", g.add("Mul", x, cosines), g.add("Mul", turned, sines))


def _layer_norm(g: Builder, config: SessaConfig, weights: Weights, name: str, x: str) -> str:
    scale, bias = (g.weight(key, weights[key]) for key in (f"{name}.weight", f"{name}.bias"))
    return g.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=config.layer_norm_eps)


def _linear(g: Builder, weights: Weights, name: str, x: str) -> str:
    """x W^T + b; the weight is stored (in, out), which MatMul reads without a transpose."""
    y = g.add("MatMul", x, g.weight(f"{name}.weight", weights[f"{name}.weight"].T))
    if f"{name}.bias" not in weights:
        return y
    return g.add("Add", y, g.weight(f"{name}.bias", weights[f"{name}.bias"]))


def _layer(
    g: Builder, config: SessaConfig, weights: Weights, i: int, x: str, shared: Shared
) -> str:
    prefix, g.scope = f"model.layers.{i}.", f"layers.{i}."
    normed = _layer_norm(g, config, weights, prefix + "ln", x)
    if config.kinds[i].block == "standard":
        x = g.add("Add", x, _mix(g, config, weights, i, normed, shared))
        return _mlp(g, config, weights, prefix, x)
    a, gate = g.split(_linear(g, weights, prefix + "W_in", normed), 2, -1)
    s = _mix(g, config, weights, i, g.add("Gelu", a, approximate="none"), shared)
    return g.add("Add", x, _linear(g, weights, prefix + "W_out", g.add("Mul", s, gate)))


def _mix(g: Builder, config: SessaConfig, weights: Weights, i: int, x: str, shared: Shared) -> str:
    """The mixer of layer i: x (B, T, D) -> s (B, T, D), which is f without feedback."""
    f = _attention(g, config, weights, i, x, shared)
    if not config.kinds[i].feeds_back:
        return f
    return _feedback(g, config, weights, i, x, f, shared)


def _mlp(g: Builder, config: SessaConfig, weights: Weights, prefix: str, x: str) -> str:
    """The second half of a standard block: x (B, T, D) -> (B, T, D)."""
    normed = _layer_norm(g, config, weights, prefix + "ln_mlp", x)
    a = g.add("Gelu", _linear(g, weights, prefix + "mlp.up_proj", normed), approximate="none")
    return g.add("Add", x, _linear(g, weights, prefix + "mlp.down_proj", a))


def _heads(g: Builder, x: str, heads: int) -> str:
    """(B, T, heads * width) -> (B, heads, T, width)."""
    if heads == 1:
        return g.add("Unsqueeze", x, g.ints(1))
    return g.add("Transpose", g.add("Reshape", x, g.ints(0, 0, heads, -1)), perm=[0, 2, 1, 3])


def _join(g: Builder, config: SessaConfig, x: str, heads: int) -> str:
    """(B, heads, T, D / heads) -> (B, T, D); T may be 0."""
    if heads == 1:
        return g.add("Squeeze", x, g.ints(1))
    turned = g.add("Transpose", x, perm=[0, 2, 1, 3])
    return g.add("Reshape", turned, g.ints(0, 0, config.hidden_size))


def _extend(g: Builder, j: int, part: str, new: str) -> str:
    """Append (B, heads, T, width) to the cached tensor `part` of pair j."""
    past = f"past_key_values.{j}.{part}"
    return g.add("Concat", past, new, axis=2, output=f"present.{j}.{part}")


def _attention(
    g: Builder, config: SessaConfig, weights: Weights, i: int, x: str, shared: Shared
) -> str:
    """Forward attention: x (B, T, D) -> f (B, T, D)."""
    H, G = config.num_attention_heads, config.num_key_value_heads
    prefix, j = f"model.layers.{i}.mixer.", shared.pairs[i][0]
    q = _heads(g, _linear(g, weights, prefix + "q_proj", x), H)
    k = _heads(g, _linear(g, weights, prefix + "k_proj", x), G)
    v = _heads(g, _linear(g, weights, prefix + "v_proj", x), G)
    q, k = (_rotate(g, config, z, shared) for z in (q, k))
    if shared.single:
        read = _buffered_read(g, config, j, q, k, v, shared)
    else:
        k, v = _extend(g, j, "key", k), _extend(g, j, "value", v)
        read = _softmax_read(g, config, q, k, v, shared)
        read = _finite_read(g, config, read, q, lambda: (k, v), shared)
    f = _join(g, config, read, H)
    # The release has no out_proj with one head.
    has_projection = f"{prefix}out_proj.weight" in weights
    return _linear(g, weights, prefix + "out_proj", f) if has_projection else f


def _softmax_read(g: Builder, config: SessaConfig, q: str, k: str, v: str, shared: Shared) -> str:
    """q (B, H, T, d), k and v (B, G, S, d) -> (B, H, T, d)."""
    H, G, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if shared.fused:
        return g.add("Attention", q, k, v, shared.bias, scale=d**-0.5)

    def regroup(x: str, heads: int, width: int | None = None) -> str:
        # The H/G query heads of one key head are stacked along the rows, so no key is repeated.
        if G == H:
            return x
        last = g.ints(width) if width else shared.total
        return g.add("Reshape", x, g.add("Concat", g.ints(0, heads, -1), last, axis=0))

    q = regroup(g.add("Mul", q, g.number(d**-0.5)), G, d)
    scores = g.add("MatMul", q, g.add("Transpose", k, perm=[0, 1, 3, 2]))
    scores = g.add("Add", regroup(scores, H), shared.bias)
    probabilities = regroup(g.add("Softmax", scores, axis=-1), G)
    return regroup(g.add("MatMul", probabilities, v), H, d)


def _finite_read(
    g: Builder,
    config: SessaConfig,
    read: str,
    q: str,
    keys_and_values: Callable[[], tuple[str, str]],
    shared: Shared,
) -> str:
    """The result of `_softmax_read`, read again where hidden keys or values made it NaN.

    A weight of 0 does not hide NaN or infinity, and selecting the visible rows of every cache would
    cost more than the read itself.
    """

    def again() -> str:
        seen = g.add("Unsqueeze", shared.key_mask, g.ints(1, 3))  # (B, 1, S, 1)
        k, v = (g.add("Where", seen, x, g.number(0.0)) for x in keys_and_values())
        return _softmax_read(g, config, q, k, v, shared)

    zeros = g.add("ReduceSum", g.add("Sub", read, read), keepdims=0)
    is_finite = g.add("Equal", zeros, _scalar(g, g.number(0.0)))
    return g.either(is_finite, lambda: g.add("Identity", read), again)


def _buffered_read(
    g: Builder, config: SessaConfig, j: int, q: str, k: str, v: str, shared: Shared
) -> str:
    """`_softmax_read` of past and new rows; a single token reads the buffers where they are."""
    H, G, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    past_k, past_v = f"past_key_values.{j}.key", f"past_key_values.{j}.value"
    for part, new in (("key", k), ("value", v)):
        g.add("Identity", new, output=f"new.{j}.{part}")

    def keys_and_values() -> tuple[str, str]:
        keys, values = (g.add("Concat", *pair, axis=2) for pair in ((past_k, k), (past_v, v)))
        return keys, values

    def several() -> str:
        return _softmax_read(g, config, q, *keys_and_values(), shared)

    def single() -> str:
        rows = g.add("Reshape", g.add("Mul", q, g.number(d**-0.5)), g.ints(0, G, -1, d))
        turned = (g.add("Transpose", x, perm=[0, 1, 3, 2]) for x in (past_k, k))
        scores = g.add("Concat", *(g.add("MatMul", rows, x) for x in turned), axis=-1)
        p = g.add("Softmax", g.add("Add", scores, shared.bias), axis=-1)  # (B, G, H/G, C + 1)
        past = g.add("Slice", p, g.ints(0), shared.past, g.ints(3))
        own = g.add("Slice", p, shared.past, shared.total, g.ints(3))
        read = g.add("Add", g.add("MatMul", past, past_v), g.add("MatMul", own, v))
        return g.add("Reshape", read, g.ints(0, H, -1, d))

    read = g.either(shared.single, single, several)
    return _finite_read(g, config, read, q, keys_and_values, shared)


def _feedback(
    g: Builder, config: SessaConfig, weights: Weights, i: int, x: str, f: str, shared: Shared
) -> str:
    """Feedback solve: x, f (B, T, D) -> s (B, T, D)."""
    prefix = f"model.layers.{i}.mixer."
    q, k_new = g.split(_linear(g, weights, prefix + "proj_fb", x), 2, -1)
    gain = g.add("Squeeze", _linear(g, weights, prefix + "gamma_ctx", x), g.ints(2))
    gain = g.add("Add", gain, g.weight(prefix + "gamma_bias", weights[prefix + "gamma_bias"]))
    gamma = g.add("Mul", g.add("Tanh", gain), g.number(config.gamma_max))
    past = [f"past_key_values.{j}.value" for j in shared.pairs[i][1:]]
    past_s = _rows(g, config, past, shared)

    def solve(k: str) -> str:
        return g.add(OP_TYPE, f, q, k, gamma, past_s, shared.key_mask, domain=DOMAIN)

    if shared.single:
        s = _buffered_solve(g, i, k_new, solve, shared)
    else:
        s = solve(_rows(g, config, _append_rows(g, i, "key", k_new, shared), shared))
        _append_rows(g, i, "value", s, shared)
    return s


def _buffered_solve(
    g: Builder, i: int, k_new: str, solve: Callable[[str], str], shared: Shared
) -> str:
    """The operator on a buffer of keys (B, C + 1, D).

    A single token never sees its own key, so the buffer with its spare row can serve as past and
    new keys together.
    """
    (j,) = shared.pairs[i][1:]
    buffer = g.add("Squeeze", f"past_key_values.{j}.key", g.ints(1))

    def several() -> str:
        past = g.add("Slice", buffer, g.ints(0), shared.past, g.ints(1))
        return solve(g.add("Concat", past, k_new, axis=1))

    s = g.either(shared.single, lambda: solve(buffer), several)
    for part, new in (("key", k_new), ("value", s)):
        g.add("Unsqueeze", new, g.ints(1), output=f"new.{j}.{part}")
    return s


def _append_rows(g: Builder, i: int, part: str, new: str, shared: Shared) -> list[str]:
    """Append rows (B, T, D) to the feedback pairs of layer i and return their present tensors."""
    numbers, split = shared.pairs[i][1:], _heads(g, new, shared.row_heads)
    pieces = [split] if len(numbers) == 1 else g.split(split, len(numbers), 1)
    return [_extend(g, j, part, piece) for j, piece in zip(numbers, pieces, strict=True)]


def _rows(g: Builder, config: SessaConfig, cached: list[str], shared: Shared) -> str:
    """The rows (B, S, D) that the cached tensors of one layer's feedback pairs hold."""
    whole = cached[0] if len(cached) == 1 else g.add("Concat", *cached, axis=1)
    return _join(g, config, whole, shared.row_heads)


def _finish(
    g: Builder, config: SessaConfig, opset: int, layout: str, large_block: int | None
) -> onnx.ModelProto:
    integer, real = TensorProto.INT64, TensorProto.FLOAT
    B, T, P, S = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
    info = helper.make_tensor_value_info
    inputs = [info("input_ids", integer, [B, T]), info("attention_mask", integer, [B, S])]
    outputs = [info("logits", real, [B, T, config.vocab_size])]
    kind, rows = ("new", T) if layout == "buffer" else ("present", S)
    feedback = {j for numbers in pair_numbers(config, layout) for j in numbers[1:]}
    for j, (heads, width) in enumerate(kv_layers(config, layout)):
        for part in ("key", "value"):
            spare = layout == "buffer" and j in feedback and part == "key"
            past = "past_sequence_length_plus_1" if spare else P
            inputs.append(info(f"past_key_values.{j}.{part}", real, [B, heads, past, width]))
            outputs.append(info(f"{kind}.{j}.{part}", real, [B, heads, rows, width]))
    graph = helper.make_graph(g.nodes, "sessa", inputs, outputs, list(g.initializers.values()))
    imports = [helper.make_opsetid("", opset)]
    if feedback:
        imports.append(helper.make_opsetid(DOMAIN, VERSION))
    model = helper.make_model(
        graph, opset_imports=imports, ir_version=IR_VERSION, producer_name="sessa-toolchain"
    )
    helper.set_model_props(model, {CONFIG_KEY: json.dumps(config.to_dict())})
    if not feedback:
        return model
    return add_function(model, large_block=large_block, key_width=config.hidden_size)


def save_model(
    model: onnx.ModelProto, path: Path, *, external_data_bytes: int = EXTERNAL_DATA_BYTES
) -> None:
    """Write a model; weights of more than `external_data_bytes` go to `<name>_data` beside it."""
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    external = size > external_data_bytes
    onnx.save_model(
        model,
        str(path),
        save_as_external_data=external,
        all_tensors_to_one_file=True,
        location=path.name + "_data",
    )
    onnx.checker.check_model(str(path), full_check=True)
