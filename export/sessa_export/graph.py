"""One ONNX graph of a language model, from its configuration and its weights.

Letters: B batch, T new tokens, P past tokens, S = P + T, D width, H query heads, G key/value heads,
d head width, K width of the feedback's keys, V vocabulary. The layers are those of
`sessa_common.reference.model`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError
from sessa_export.builder import Builder, Weights
from sessa_export.cache_layout import (
    LAYOUTS,
    feedback_width,
    kv_layers,
    pair_numbers,
    require_supported,
    row_width,
)
from sessa_export.graph_attention import (
    Shared,
    attention,
    extend,
    heads_of,
    join_heads,
    shared_tensors,
)
from sessa_export.operator_body import DOMAIN, OP_TYPE, VERSION, add_function
from sessa_export.sessions import CONFIG_KEY

OPSETS = (21, 22, 23)
# The first set with Attention and RotaryEmbedding; graphs of earlier sets use plain operators.
FUSED_OPSET = 23
IR_VERSION = 10
# A protobuf message ends at 2 GiB; the graph itself needs a little of that.
EXTERNAL_DATA_BYTES = 2 * 10**9


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
    shared = shared_tensors(g, config, layout, opset >= FUSED_OPSET)
    embedding = g.weight("model.embed_tokens.weight", weights["model.embed_tokens.weight"])
    x = g.add("Gather", embedding, "input_ids")
    for i in range(config.num_hidden_layers):
        x = _layer(g, config, weights, i, x, shared)
    g.scope = ""
    x = g.norm(weights, "model.norm", x, config.layer_norm_eps)
    if config.tie_word_embeddings:
        head = g.add("Transpose", embedding, perm=[1, 0])
    else:
        head = g.weight("lm_head.weight", weights["lm_head.weight"].T)
    g.add("MatMul", x, head, output="logits")
    return _finish(g, config, opset, layout, large_block)


def _layer(
    g: Builder, config: SessaConfig, weights: Weights, i: int, x: str, shared: Shared
) -> str:
    prefix, g.scope = f"model.layers.{i}.", f"layers.{i}."
    normed = g.norm(weights, prefix + "ln", x, config.layer_norm_eps)
    if config.kinds[i].block == "standard":
        x = g.add("Add", x, _mix(g, config, weights, i, normed, shared))
        return _mlp(g, config, weights, prefix, x)
    a, gate = g.split(g.linear(weights, prefix + "W_in", normed), 2, -1)
    s = _mix(g, config, weights, i, g.add("Gelu", a, approximate="none"), shared)
    return g.add("Add", x, g.linear(weights, prefix + "W_out", g.add("Mul", s, gate)))


def _mix(g: Builder, config: SessaConfig, weights: Weights, i: int, x: str, shared: Shared) -> str:
    """The mixer of layer i: x (B, T, D) -> s (B, T, D), which is f without feedback."""
    prefix, kind = f"model.layers.{i}.mixer.", config.kinds[i]
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    widths = [heads * config.head_dim]
    names = [prefix + name for name in ("q_proj", "k_proj", "v_proj")]
    if kind.feeds_back:
        widths += [config.feedback_key_dim] * 2
        names.append(prefix + "proj_fb")
    # One product for all that reads x, because few large nodes suit a GPU.
    rows = g.joint_linear(weights, names, prefix + "in_proj", x)
    if not kind.feeds_back:
        return attention(g, config, weights, i, rows, shared)
    rows, q, k = g.split(rows, widths, -1)
    f = attention(g, config, weights, i, rows, shared)
    return _feedback(g, config, weights, i, x, (f, q, k), shared)


def _mlp(g: Builder, config: SessaConfig, weights: Weights, prefix: str, x: str) -> str:
    """The second half of a standard block: x (B, T, D) -> (B, T, D)."""
    normed = g.norm(weights, prefix + "ln_mlp", x, config.layer_norm_eps)
    a = g.linear(weights, prefix + "mlp.up_proj", normed)
    if config.mlp_type == "swiglu":
        gate = g.linear(weights, prefix + "mlp.gate_proj", normed)
        a = g.add("Mul", g.add("Mul", gate, g.add("Sigmoid", gate)), a)
    else:
        a = g.add("Gelu", a, approximate="none")
    return g.add("Add", x, g.linear(weights, prefix + "mlp.down_proj", a))


def _feedback(
    g: Builder,
    config: SessaConfig,
    weights: Weights,
    i: int,
    x: str,
    operands: tuple[str, str, str],
    shared: Shared,
) -> str:
    """Feedback solve: x (B, T, D) and f, q and k of the new rows -> s (B, T, D)."""
    prefix, (f, q, k_new) = f"model.layers.{i}.mixer.", operands
    gain = g.add("Squeeze", g.linear(weights, prefix + "gamma_ctx", x), g.ints(2))
    gain = g.add("Add", gain, g.weight(prefix + "gamma_bias", weights[prefix + "gamma_bias"]))
    gamma = g.add("Mul", g.add("Tanh", gain), g.number(config.gamma_max))
    past = [f"past_key_values.{j}.value" for j in shared.pairs[i][1:]]
    past_s = _rows(g, config, past, "value", shared)

    def solve(k: str) -> str:
        return g.add(OP_TYPE, f, q, k, gamma, past_s, shared.key_mask, domain=DOMAIN)

    if shared.single:
        s = _buffered_solve(g, i, k_new, solve, shared)
    else:
        keys = _append_rows(g, config, i, "key", k_new, shared)
        s = solve(_rows(g, config, keys, "key", shared))
        _append_rows(g, config, i, "value", s, shared)
    return s


def _buffered_solve(
    g: Builder, i: int, k_new: str, solve: Callable[[str], str], shared: Shared
) -> str:
    """The operator on a buffer of keys (B, C + 1, K).

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


def _append_rows(
    g: Builder, config: SessaConfig, i: int, part: str, new: str, shared: Shared
) -> list[str]:
    """Append rows (B, T, width) to the feedback pairs of layer i and return their present tensors.

    Zeros fill the last pair where the width is not that of whole pairs.
    """
    numbers = shared.pairs[i][1:]
    if missing := row_width(config, shared.layout, part) - feedback_width(config, part):
        new = g.add("Pad", new, g.ints(0, 0, 0, 0, 0, missing))
    split = heads_of(g, new, shared.row_heads)
    pieces = [split] if len(numbers) == 1 else g.split(split, len(numbers), 1)
    return [extend(g, j, part, piece) for j, piece in zip(numbers, pieces, strict=True)]


def _rows(g: Builder, config: SessaConfig, cached: list[str], part: str, shared: Shared) -> str:
    """The rows (B, S, width) that the cached tensors of one layer's feedback pairs hold."""
    whole = cached[0] if len(cached) == 1 else g.add("Concat", *cached, axis=1)
    width, full = feedback_width(config, part), row_width(config, shared.layout, part)
    rows = join_heads(g, whole, shared.row_heads, full)
    return rows if full == width else g.add("Slice", rows, g.ints(0), g.ints(width), g.ints(2))


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
    for j, pair in enumerate(kv_layers(config, layout)):
        for part, width in (("key", pair.key_width), ("value", pair.value_width)):
            spare = layout == "buffer" and j in feedback and part == "key"
            past = "past_sequence_length_plus_1" if spare else P
            inputs.append(info(f"past_key_values.{j}.{part}", real, [B, pair.heads, past, width]))
            outputs.append(info(f"{kind}.{j}.{part}", real, [B, pair.heads, rows, width]))
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
    return add_function(model, large_block=large_block, key_width=config.feedback_key_dim)


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
