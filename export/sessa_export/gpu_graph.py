"""An exported model in the form in which a GPU runs it fastest, made when a session opens it.

A GPU runs a node in a few microseconds, however small it is. So the whole model is written three
times, for one token behind a past, for up to n tokens and for any other number, and one If on the
number of tokens chooses between them. Then no layer asks for that number, and what all layers need
to know of lengths and mask is computed once. Weights stay outside the If and are held once.

Letters as in `operator_body`.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx import helper, parser

from sessa_export.large_blocks import SMALL, one_block, places_of_rows
from sessa_export.operator_body import (
    DOMAIN,
    OP_TYPE,
    VERSION,
    add_function,
    feedback_function,
    root_of,
    standard_opset,
)

# The body for a processor, which repeats a solve that is not finite.
AGAIN = f"{OP_TYPE}Again"
ROW_MASKS = ("past_seen", "state_seen")
BLOCK_MASKS = ("w_T", "w_row_pads", "w_key_pads", "w_sees", "w_visible", "w_levels", "w_eye")

_HEAD = '<opset_import: ["" : {opset}, "sessa" : 1], domain: "sessa">'
_OPERANDS = """
f32 = Cast <to = 1> (f)
q32 = Cast <to = 1> (q)
k32 = Cast <to = 1> (k)
gamma32 = Cast <to = 1> (gamma)
past32 = Cast <to = 1> (past_s)
"""
# Only where K is not known: ONNX Runtime would run the node, though nothing reads K.
_KEY_WIDTH = """
K = Shape <start = 2, end = 3> (q)
"""

_ROW_MASKS = """
FeedbackRowMasks (f, key_mask) => (past_seen, state_seen) {{
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    S = Shape <start = 1, end = 2> (key_mask)
    P = Sub (S, one)
    seen = Slice (key_mask, zero, P, one)
    past_seen = Unsqueeze (seen, one)
    state_seen = Unsqueeze (seen, two)
}}
"""

# One row behind a past. A row that sees no key reads states that are all 0.
_ROW = """
FeedbackRow (f, q, k, gamma, past_s, key_mask, past_seen, state_seen) => (s) {{
{operands}
    zero = Constant <value_ints = [0]> ()
    less = Constant <value_ints = [-1]> ()
    two = Constant <value_ints = [2]> ()
    hidden = Constant <value_float = -1e38> ()
    nothing = Constant <value_float = 0.0> ()
    scaled = Div (q32, root)
    k_turned = Transpose <perm = [0, 2, 1]> (k32)
    scores = MatMul (scaled, k_turned)
    past_scores = Slice (scores, zero, less, two)
    masked = Where (past_seen, past_scores, hidden)
    weights = Softmax <axis = -1> (masked)
    states = Where (state_seen, past32, nothing)
    read = MatMul (weights, states)
    gain = Unsqueeze (gamma32, two)
    gained = Mul (gain, read)
    s32 = Add (f32, gained)
    s = CastLike (s32, f)
}}
"""

_BLOCK_MASKS = """
FeedbackBlockMasks (f, key_mask) => ({names}) {{
    w_T = Shape <start = 1, end = 2> (f)
{places}
    w_visible = LessOrEqual (w_places, w_row_places)
}}
"""

_BLOCK = """
FeedbackBlock (f, q, k, gamma, past_s, key_mask, {names}) => (s) {{
{operands}
{solve}
    s = If (w_finite) <
        then_branch = kept () => (kept_rows) {{
            kept_rows = CastLike (w_solved, f)
        }},
        else_branch = again () => (solved_again) {{
            solved_again = sessa.{again} (f, q, k, gamma, past_s, key_mask)
        }}
    >
}}
"""


def for_gpu(
    model: onnx.ModelProto,
    large_block: int,
    key_width: int | None,
    lengths: tuple[str, str] = ("input_ids", "attention_mask"),
) -> onnx.ModelProto:
    """Rewrite a model that carries the operator's body, in place, and return it.

    A model whose FeedbackSolve nodes are all in subgraphs only gets another body. `large_block` is
    n, and blocks of n rows serve any larger number of tokens; `key_width` is that of
    `feedback_function`. `lengths` are the inputs whose second axes are T and S.
    """
    nodes = [node for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, OP_TYPE)]
    if not any(function.name == OP_TYPE for function in model.functions):
        return model
    add_function(model, large_block=large_block, key_width=key_width)
    if not nodes:
        return model
    model.functions.extend(_functions(standard_opset(model), large_block, key_width))
    if all(item.domain != DOMAIN for item in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    _choose(model.graph, large_block, lengths)
    return model


def _functions(opset: int, n: int, key_width: int | None) -> Iterable[onnx.FunctionProto]:
    operands = _OPERANDS + ("" if key_width else _KEY_WIDTH) + root_of(key_width)
    again = feedback_function(opset, key_width=key_width)
    again.name = AGAIN
    texts = (
        _ROW_MASKS.format(),
        _ROW.format(operands=operands),
        _BLOCK_MASKS.format(names=", ".join(BLOCK_MASKS), places=places_of_rows(n)),
        _BLOCK.format(
            names=", ".join(BLOCK_MASKS), operands=operands, again=AGAIN, solve=one_block(n)
        ),
    )
    head = _HEAD.format(opset=opset)
    return [again, *(parser.parse_function(head + text) for text in texts)]


def _choose(graph: onnx.GraphProto, n: int, lengths: tuple[str, str]) -> None:
    """Replace the nodes of a graph by an If between its three forms."""
    shared, layers = _split_constant(graph)
    one = _form(graph, layers, "one", ("FeedbackRowMasks", "FeedbackRow", ROW_MASKS))
    many = _form(graph, layers, "many", ("FeedbackBlockMasks", "FeedbackBlock", BLOCK_MASKS))
    other = _form(graph, layers, "other", None)
    names = [output.name for output in graph.output]
    several_names = [f"several.{name}" for name in names]
    outputs = [_renamed(output, f"several.{output.name}") for output in graph.output]
    inner = helper.make_node("If", ["gpu.many"], several_names, then_branch=many, else_branch=other)
    several = helper.make_graph([inner], "several", [], outputs)
    outer = helper.make_node("If", ["gpu.one"], names, then_branch=one, else_branch=several)
    del graph.node[:]
    graph.node.extend([*shared, *_conditions(n, lengths), outer])


def _conditions(n: int, lengths: tuple[str, str]) -> list[onnx.NodeProto]:
    """Nodes that make gpu.one (T is 1 and P is not 0) and gpu.many (T from SMALL + 1 to n)."""
    text = f"""
    conditions (int64[B, T] ids, int64[B, S] mask) => (bool[1] o, bool[1] m) {{
        gpu_T = Shape <start = 1, end = 2> (ids)
        gpu_S = Shape <start = 1, end = 2> (mask)
        gpu_1 = Constant <value_ints = [1]> ()
        gpu_small = Constant <value_ints = [{SMALL}]> ()
        gpu_above = Constant <value_ints = [{n + 1}]> ()
        gpu_single = Equal (gpu_T, gpu_1)
        gpu_behind = Greater (gpu_S, gpu_T)
        gpu_over = Greater (gpu_T, gpu_small)
        gpu_under = Less (gpu_T, gpu_above)
        o = And (gpu_single, gpu_behind)
        m = And (gpu_over, gpu_under)
    }}"""
    nodes = list(parser.parse_graph(text).node)
    for node, name in zip(nodes, lengths, strict=False):
        node.input[0] = name
    nodes[-2].output[0], nodes[-1].output[0] = "gpu.one", "gpu.many"
    return nodes


def _split_constant(
    graph: onnx.GraphProto,
) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """The nodes that depend on weights alone, and the other nodes."""
    constant = {tensor.name for tensor in graph.initializer} | {""}
    shared: list[onnx.NodeProto] = []
    layers: list[onnx.NodeProto] = []
    for node in graph.node:
        is_constant = constant.issuperset(node.input) and node.op_type != "If"
        (shared if is_constant else layers).append(node)
        if is_constant:
            constant.update(node.output)
    return shared, layers


def _form(
    graph: onnx.GraphProto,
    layers: list[onnx.NodeProto],
    prefix: str,
    solver: tuple[str, str, tuple[str, ...]] | None,
) -> onnx.GraphProto:
    """A branch with the nodes of all layers, whose tensors begin with `prefix`.

    `solver` names the functions that replace the operator: one for what the layers share, one for a
    layer, and the tensors that the first gives to the second.
    """
    made = {name for node in layers for name in node.output}
    nodes: list[onnx.NodeProto] = []
    known: dict[str, list[str]] = {}  # the shared tensors for each key_mask
    for node in layers:
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        _rename(copied, made, prefix)
        if solver and (node.domain, node.op_type) == (DOMAIN, OP_TYPE):
            masks, copied.op_type, names = solver
            f, key_mask = copied.input[0], copied.input[5]
            if key_mask not in known:
                known[key_mask] = [f"{key_mask}.{name}" for name in names]
                nodes.append(helper.make_node(masks, [f, key_mask], known[key_mask], domain=DOMAIN))
            copied.input.extend(known[key_mask])
        nodes.append(copied)
    outputs = [_renamed(output, f"{prefix}.{output.name}") for output in graph.output]
    return helper.make_graph(nodes, prefix, [], outputs)


def _rename(node: onnx.NodeProto, made: set[str], prefix: str) -> None:
    """Put `prefix` before the names of a node, of its tensors in `made` and in its subgraphs."""
    node.name = f"{prefix}.{node.name}"
    for names in (node.input, node.output):
        for i, name in enumerate(names):
            names[i] = f"{prefix}.{name}" if name in made else name
    for attribute in node.attribute:
        if not attribute.g.node:
            continue
        inner = attribute.g
        own = {name for node in inner.node for name in node.output}
        for child in inner.node:
            _rename(child, made | own, prefix)
        for output in inner.output:
            output.name = f"{prefix}.{output.name}" if output.name in made | own else output.name


def _renamed(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    found = onnx.ValueInfoProto()
    found.CopyFrom(value)
    found.name = name
    return found
