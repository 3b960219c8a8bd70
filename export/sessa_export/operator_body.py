"""sessa::FeedbackSolve, specified in ../README.md, as an ONNX function of standard operators."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import helper, parser

DOMAIN, OP_TYPE, VERSION = "sessa", "FeedbackSolve", 1
INPUTS = ("f", "q", "k", "gamma", "past_s", "key_mask")
REQUIRED = 4
# Rows solved per turn of the loop; measured best of 32, 64 and 128 on two CPU cores.
BLOCK = 64

# B batch, T rows, P past, D width, K key width, m rows of one block, c = 1 + P + rows solved.
# A hidden key scores -1e38 and the sink -1e30: a row that sees no key reads the sink alone, whose
# state is 0, so it keeps s = f; in any other row both weigh exactly 0. No infinity is needed.
_BODY = """
<opset_import: ["" : {opset}], domain: "sessa">
FeedbackSolve (f, q, k, gamma, past_s, key_mask) => (s)
{{
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    seen = Constant <value_float = 0.0> ()
    hidden = Constant <value_float = -1e38> ()
    f32 = Cast <to = 1> (f)
    q32 = Cast <to = 1> (q)
    k32 = Cast <to = 1> (k)
    gamma32 = Cast <to = 1> (gamma)
    past32 = Cast <to = 1> (past_s)
    B = Shape <start = 0, end = 1> (f)
    T = Shape <start = 1, end = 2> (f)
    D = Shape <start = 2, end = 3> (f)
    K = Shape <start = 2, end = 3> (q)
    P = Shape <start = 1, end = 2> (past_s)
    K32 = Cast <to = 1> (K)
    root = Sqrt (K32)
    scaled = Div (q32, root)
    gain = Unsqueeze (gamma32, two)
    bias = Where (key_mask, seen, hidden)
    B1 = Concat <axis = 0> (B, one)
    sink = ConstantOfShape <value = float[1] {{-1e30}}> (B1)
    single = Equal (T, one)
    later = Greater (P, zero)
    step = And (single, later)
    s32 = If (step) <
        then_branch = one_row () => (row) {{
            column = Transpose <perm = [0, 2, 1]> (scaled)
            turned_scores = MatMul (k32, column)
            row_scores = Transpose <perm = [0, 2, 1]> (turned_scores)
            past_bias = Slice (bias, zero, P, one)
            row_bias2 = Concat <axis = 1> (past_bias, sink)
            row_bias = Unsqueeze (row_bias2, one)
            row_masked = Add (row_scores, row_bias)
            row_weights = Softmax <axis = -1> (row_masked)
            past_weights = Slice (row_weights, zero, P, two)
            row_read = MatMul (past_weights, past32)
            row_gained = Mul (gain, row_read)
            row = Add (f32, row_gained)
        }},
        else_branch = all_rows () => (rows) {{
            n = Constant <value_ints = [{block}]> ()
            sink_key_shape = Concat <axis = 0> (B1, K)
            sink_key = ConstantOfShape (sink_key_shape)
            keys = Concat <axis = 1> (sink_key, k32)
            sink_state_shape = Concat <axis = 0> (B1, D)
            sink_state = ConstantOfShape (sink_state_shape)
            known = Concat <axis = 1> (sink_state, past32)
            key_bias2 = Concat <axis = 1> (sink, bias)
            key_bias = Unsqueeze (key_bias2, one)
            n_n = Concat <axis = 0> (n, n)
            all_hidden = ConstantOfShape <value = float[1] {{-1e38}}> (n_n)
            wall = Trilu <upper = 1> (all_hidden)
            eye = EyeLike <dtype = 1> (wall)
            zero_zero = Constant <value_ints = [0, 0]> ()
            zero_one = Constant <value_ints = [0, 1]> ()
            n_less = Sub (n, one)
            T_up = Add (T, n_less)
            count1 = Div (T_up, n)
            count = Squeeze (count1)
            first = Add (P, one)
            yes = Constant <value = bool {{1}}> ()
            states = Loop (count, yes, known) <
                body = block (int64 i, bool go, float[b, c, d] past) => (go_on, grown) {{
                    go_on = Identity (go)
                    start = Mul (i, n)
                    stop = Add (start, n)
                    end = Add (stop, first)
                    q_i = Slice (scaled, start, stop, one)
                    f_i = Slice (f32, start, stop, one)
                    gain_i = Slice (gain, start, stop, one)
                    k_i = Slice (keys, zero, end, one)
                    bias_i = Slice (key_bias, zero, end, two)
                    m = Shape <start = 1, end = 2> (q_i)
                    c = Shape <start = 1, end = 2> (past)
                    m_m = Concat <axis = 0> (m, m)
                    c_m = Add (c, m)
                    wall_i = Slice (wall, zero_zero, m_m, zero_one)
                    eye_i = Slice (eye, zero_zero, m_m, zero_one)
                    pads = Concat <axis = 0> (zero, c, zero, zero)
                    causal = Pad (wall_i, pads)
                    mask = Add (causal, bias_i)
                    k_turned = Transpose <perm = [0, 2, 1]> (k_i)
                    scores = MatMul (q_i, k_turned)
                    masked = Add (scores, mask)
                    weights = Softmax <axis = -1> (masked)
                    off = Slice (weights, zero, c, two)
                    own = Slice (weights, c, c_m, two)
                    read = MatMul (off, past)
                    gained = Mul (gain_i, read)
                    rhs = Add (f_i, gained)
                    N1 = Mul (gain_i, own)
                    X1 = Add (eye_i, N1)
{doublings}
                    s_i = MatMul ({inverse}, rhs)
                    grown = Concat <axis = 1> (past, s_i)
                }}
            >
            last = Add (first, T)
            rows = Slice (states, first, last, one)
        }}
    >
    s = CastLike (s32, f)
}}
"""


def _doublings(block: int) -> tuple[str, str]:
    """Text that builds X = (I + N)(I + N^2)(I + N^4)... of a block, and the name of the result.

    N is strictly lower triangular, so the product ends at the power below the number of rows.
    """
    lines, power = [], 1
    while 2 * power < block:
        N, X, power = f"N{power}", f"X{power}", 2 * power
        lines += [f"N{power} = MatMul ({N}, {N})", f"step{power} = MatMul (N{power}, {X})",
                  f"X{power} = Add ({X}, step{power})"]  # fmt: skip
    return "\n".join(" " * 20 + line for line in lines), f"X{power}"


def feedback_function(opset: int, block: int = BLOCK) -> onnx.FunctionProto:
    """Body in standard operators of `opset`, 18 or later, for nodes that give every input."""
    doublings, inverse = _doublings(block)
    return parser.parse_function(
        _BODY.format(opset=opset, block=block, doublings=doublings, inverse=inverse)
    )


def standard_opset(model: onnx.ModelProto) -> int:
    """The version of the standard operators that a model imports."""
    return next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))


def add_function(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give the sessa::FeedbackSolve nodes of a model their body, in place, and return the model.

    A function cannot ask whether an optional input was given, so nodes that leave past_s or
    key_mask out receive an empty past and a mask of ones. Subgraphs are searched too. Raises
    ValueError when the model has no such node or imports standard operators older than 18.
    """
    opset = standard_opset(model)
    if opset < 18:
        raise ValueError(f"the model imports opset {opset}; sessa::FeedbackSolve needs 18 or later")
    found = 0
    for graph in _graphs(model.graph):
        for node in [n for n in graph.node if (n.domain, n.op_type) == (DOMAIN, OP_TYPE)]:
            _fill_inputs(graph, node, found)
            found += 1
    if not found:
        raise ValueError("the model has no sessa::FeedbackSolve node")
    kept = [f for f in model.functions if (f.domain, f.name) != (DOMAIN, OP_TYPE)]
    del model.functions[:]
    model.functions.extend([*kept, feedback_function(opset)])
    if all(item.domain != DOMAIN for item in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    return model


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                if inner.node:
                    yield from _graphs(inner)


def _fill_inputs(graph: onnx.GraphProto, node: onnx.NodeProto, number: int) -> None:
    """Put an empty past and a mask of ones before `node` where it leaves those inputs out."""
    given = [*node.input, *[""] * (len(INPUTS) - len(node.input))]
    if all(given):
        return
    prefix = f"{OP_TYPE}_{number}_"
    position = next(i for i, other in enumerate(graph.node) if other is node)
    nodes = []
    if not given[4]:
        given[4] = prefix + "past_s"
        nodes += _empty_past(prefix, given[0], given[4])
    if not given[5]:
        given[5] = prefix + "key_mask"
        nodes += _open_mask(prefix, given[2], given[5])
    for offset, extra in enumerate(nodes):
        graph.node.insert(position + offset, extra)
    del node.input[:]
    node.input.extend(given)


def _empty_past(prefix: str, f: str, output: str) -> list[onnx.NodeProto]:
    rows = prefix + "no_rows"
    none = helper.make_tensor("none", onnx.TensorProto.INT64, [0], [])
    return [
        helper.make_node("Constant", [], [rows], value=none),
        helper.make_node("Gather", [f, rows], [output], axis=1),
    ]


def _open_mask(prefix: str, k: str, output: str) -> list[onnx.NodeProto]:
    shape = prefix + "key_shape"
    true = helper.make_tensor("true", onnx.TensorProto.BOOL, [1], [True])
    return [
        helper.make_node("Shape", [k], [shape], start=0, end=2),
        helper.make_node("ConstantOfShape", [shape], [output], value=true),
    ]
