"""sessa::FeedbackSolve, specified in ../README.md, as an ONNX function of standard operators."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper, parser

from sessa_export.large_blocks import SMALL, large_blocks

DOMAIN, OP_TYPE, VERSION = "sessa", "FeedbackSolve", 1
INPUTS = ("f", "q", "k", "gamma", "past_s", "key_mask")
REQUIRED = 4
# Rows solved per turn of the loop; measured best of 32, 64 and 128 on two CPU cores.
BLOCK = SMALL

# Letters: B batch, T rows, P past, D width, K key width, m rows of one block, c = 1 + P + solved.
#
# A key that a row does not see gets the score -1e38, by selection, so that NaN and infinity in it
# are not felt. Before all keys stands a sink with the score -1e30 and the state 0: a row that sees
# no key reads only the sink and keeps s = f; in any other row the sink has weight 0.
#
# Adding what the inverse changes, and not its product with the rows, keeps rows without gain bit
# for bit in every precision of the products.
#
# The branches "safe" run only where a result is not finite. They select what a weight of 0 would
# not hide: hidden states, and rows that are not finite, which must not reach the rows before them.
# Such a row is solved as zeros, gets its own values back, and makes the rows behind it NaN unless
# its key is hidden.
_BODY = """
<opset_import: ["" : {opset}], domain: "sessa">
FeedbackSolve (f, q, k, gamma, past_s, key_mask) => (s)
{{
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    nothing = Constant <value_float = 0.0> ()
    f32 = Cast <to = 1> (f)
    q32 = Cast <to = 1> (q)
    k32 = Cast <to = 1> (k)
    gamma32 = Cast <to = 1> (gamma)
    past32 = Cast <to = 1> (past_s)
    B = Shape <start = 0, end = 1> (key_mask)
    T = Shape <start = 1, end = 2> (f)
    D = Shape <start = 2, end = 3> (f)
    K = Shape <start = 2, end = 3> (q)
    P = Shape <start = 1, end = 2> (past_s)
{root}
    scaled = Div (q32, root)
    gain = Unsqueeze (gamma32, two)
    B1 = Concat <axis = 0> (B, one)
    sink = ConstantOfShape <value = float[1] {{-1e30}}> (B1)
    mask_shape = Shape (key_mask)
    floor = ConstantOfShape <value = float[1] {{-1e38}}> (mask_shape)
    S = Shape <start = 1, end = 2> (key_mask)
    but_one = Sub (S, one)
    past_seen = Slice (key_mask, zero, but_one, one)
    past_floor = Slice (floor, zero, but_one, one)
    state_seen = Unsqueeze (past_seen, two)
    unseen = ConstantOfShape <value = bool[1] {{0}}> (B1)
    row_seen2 = Concat <axis = 1> (past_seen, unseen)
    row_seen = Unsqueeze (row_seen2, one)
    row_floor2 = Concat <axis = 1> (past_floor, sink)
    row_floor = Unsqueeze (row_floor2, one)
    single = Equal (T, one)
    later = Greater (P, zero)
    step = And (single, later)
    s32 = If (step) <
        then_branch = one_row () => (row) {{
            K_1 = Constant <value_ints = [0, -1, 1]> ()
            column = Reshape (scaled, K_1)
            turned_scores = MatMul (k32, column)
            one_S = Constant <value_ints = [0, 1, -1]> ()
            row_scores = Reshape (turned_scores, one_S)
            row_masked = Where (row_seen, row_scores, row_floor)
            row_weights = Softmax <axis = -1> (row_masked)
            past_weights = Slice (row_weights, zero, but_one, two)
{read}
            row_gained = Mul (gain, row_read)
            row = Add (f32, row_gained)
        }},
        else_branch = all_rows () => (rows) {{
{rows}
        }}
    >
    s = CastLike (s32, f)
}}
"""

# The square root of K, where the body is not written for one K.
_ROOT = """
    K32 = Cast <to = 1> (K)
    root = Sqrt (K32)
"""

# What one row reads of the past. Selecting every state costs a processor as much as the read.
_READ = """
            direct_read = MatMul (past_weights, past32)
            read_zeros = Sub (direct_read, direct_read)
            read_total = ReduceSum <keepdims = 0> (read_zeros)
            read_finite = Equal (read_total, nothing)
            row_read = If (read_finite) <
                then_branch = as_read () => (same_read) {
                    same_read = Identity (direct_read)
                },
                else_branch = safe_read () => (selected_read) {
                    state_selected = Where (state_seen, past32, nothing)
                    selected_read = MatMul (past_weights, state_selected)
                }
            >
"""
# A GPU would have to wait for the answer to the question whether the read is finite.
_SELECTED_READ = """
            selected_states = Where (state_seen, past32, nothing)
            row_read = MatMul (past_weights, selected_states)
"""

# Every row, in blocks of {block} rows.
_ROWS = """
            n = Constant <value_ints = [{block}]> ()
            sink_key_shape = Concat <axis = 0> (B1, K)
            sink_key = ConstantOfShape (sink_key_shape)
            keys = Concat <axis = 1> (sink_key, k32)
            sink_state_shape = Concat <axis = 0> (B1, D)
            sink_state = ConstantOfShape (sink_state_shape)
            known = Concat <axis = 1> (sink_state, past32)
            key_floor2 = Concat <axis = 1> (sink, floor)
            key_floor = Unsqueeze (key_floor2, one)
            seen2 = Concat <axis = 1> (unseen, key_mask)
            seen = Unsqueeze (seen2, one)
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
                    floor_i = Slice (key_floor, zero, end, two)
                    seen_i = Slice (seen, zero, end, two)
                    m = Shape <start = 1, end = 2> (q_i)
                    c = Shape <start = 1, end = 2> (past)
                    m_m = Concat <axis = 0> (m, m)
                    c_m = Add (c, m)
                    wall_i = Slice (wall, zero_zero, m_m, zero_one)
                    eye_i = Slice (eye, zero_zero, m_m, zero_one)
                    pads = Concat <axis = 0> (zero, c, zero, zero)
                    level_i = Slice (level, zero_zero, m_m, zero_one)
                    causal = Pad (wall_i, pads)
                    before = Equal (causal, nothing)
                    mask = And (before, seen_i)
                    k_turned = Transpose <perm = [0, 2, 1]> (k_i)
                    scores = MatMul (q_i, k_turned)
                    masked = Where (mask, scores, floor_i)
                    weights = Softmax <axis = -1> (masked)
                    off = Slice (weights, zero, c, two)
                    own = Slice (weights, c, c_m, two)
                    read = MatMul (off, past)
                    gained = Mul (gain_i, read)
                    rhs = Add (f_i, gained)
                    N = Mul (gain_i, own)
                    rhs_zeros = Sub (rhs, rhs)
                    rhs_total = ReduceSum <keepdims = 0> (rhs_zeros)
                    rhs_finite = Equal (rhs_total, nothing)
                    s_i = If (rhs_finite) <
                        then_branch = plain () => (solved) {{
{plain_nodes}
                            change = Sub ({plain_inverse}, eye_i)
                            moved = MatMul (change, rhs)
                            solved = Add (rhs, moved)
                        }},
                        else_branch = safe () => (selected) {{
                            seen_columns = Transpose <perm = [0, 2, 1]> (seen_i)
                            past_shown = Slice (seen_columns, zero, c, one)
                            own_shown = Slice (seen_columns, c, c_m, one)
                            past_selected = Where (past_shown, past, nothing)
                            safe_read = MatMul (off, past_selected)
                            safe_gained = Mul (gain_i, safe_read)
                            safe_rhs = Add (f_i, safe_gained)
                            safe_zeros = Sub (safe_rhs, safe_rhs)
                            finite = Equal (safe_zeros, nothing)
                            finite_rhs = Where (finite, safe_rhs, nothing)
                            N_zeros = Sub (N, N)
                            N_finite = Equal (N_zeros, nothing)
                            finite_N = Where (N_finite, N, nothing)
{safe_nodes}
                            safe_change = Sub ({safe_inverse}, eye_i)
                            safe_moved = MatMul (safe_change, finite_rhs)
                            safe_solved = Add (finite_rhs, safe_moved)
                            broken = Not (finite)
                            spoils = And (broken, own_shown)
                            spoil_count = Cast <to = 1> (spoils)
                            spoils_before = CumSum <exclusive = 1> (spoil_count, one)
                            spoiled = Greater (spoils_before, nothing)
                            behind = Where (spoiled, not_a_number, safe_solved)
                            selected = Where (finite, behind, safe_rhs)
                        }}
                    >
                    grown = Concat <axis = 1> (past, s_i)
                }}
            >
            last = Add (first, T)
            rows = Slice (states, first, last, one)
"""


def _inverse(block: int, N: str, prefix: str) -> tuple[str, str]:
    """Text that builds (I - N)^-1 of a block of rows from the tensor N, and the result's name.

    Neighbouring diagonal blocks with inverses X1 and X2 merge by X2 N21 X1, for all pairs at once.
    """
    lines, X, half = [], "eye_i", 1
    while half < block:
        size, at, low, left, both, merged = (
            f"{prefix}{name}{half}" for name in ("size", "at", "low", "left", "both", "merged")
        )
        lines += [
            f"{size} = Constant <value_float = {half}.0> ()",
            f"{at} = Equal (level_i, {size})",
            f"{low} = Where ({at}, {N}, nothing)",
        ]
        if half > 1:
            lines += [f"{left} = MatMul ({X}, {low})", f"{both} = MatMul ({left}, {X})"]
        lines.append(f"{merged} = Add ({X}, {both if half > 1 else low})")
        X, half = merged, 2 * half
    return "\n".join(" " * 28 + line for line in lines), X


def _levels(block: int) -> np.ndarray:
    """Half the size of the blocks that meet in element (i, j) of a block of rows, for i > j.

    It is the highest bit in which i and j differ.
    """
    index = np.arange(block)
    differs = index[:, None] ^ index
    bits = 2 ** np.floor(np.log2(np.maximum(differs, 1)))
    return np.where(index[:, None] > index, bits, 0).astype(np.float32)


def feedback_function(
    opset: int,
    block: int = BLOCK,
    *,
    large_block: int | None = None,
    key_width: int | None = None,
) -> onnx.FunctionProto:
    """Body in standard operators of `opset`, 18 or later, for nodes that give every input.

    `large_block` (a power of two, 2 * BLOCK or more) gives the body for a GPU, which solves more
    than BLOCK rows in blocks of so many rows. `key_width` says which K all nodes have, which saves
    the nodes that read it from a shape.
    """
    plain, inverse = _inverse(block, "N", "")
    safe, safe_inverse = _inverse(block, "finite_N", "safe_")
    rows = _ROWS.format(
        block=block,
        plain_nodes=plain,
        plain_inverse=inverse,
        safe_nodes=safe,
        safe_inverse=safe_inverse,
    )
    read = _READ
    if large_block:
        rows, read = large_blocks(large_block, rows), _SELECTED_READ
    text = _BODY.format(opset=opset, root=root_of(key_width), read=read, rows=rows)
    function = parser.parse_function(text)
    constants = {"level": _levels(block), "not_a_number": np.float32(np.nan)}
    for name, value in constants.items():
        tensor = numpy_helper.from_array(np.asarray(value), name)
        function.node.insert(0, helper.make_node("Constant", [], [name], value=tensor))
    return function


def root_of(key_width: int | None) -> str:
    """Text that gives `root` the square root of K; without a `key_width` it needs K, a shape."""
    return f"    root = Constant <value_float = {key_width**0.5!r}> ()" if key_width else _ROOT


def standard_opset(model: onnx.ModelProto) -> int:
    """The version of the standard operators that a model imports."""
    return next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))


def add_function(
    model: onnx.ModelProto, *, large_block: int | None = None, key_width: int | None = None
) -> onnx.ModelProto:
    """Give the sessa::FeedbackSolve nodes of a model their body, in place, and return the model.

    A function cannot ask whether an optional input was given, so nodes that leave past_s or
    key_mask out receive an empty past and a mask of ones. Subgraphs are searched too. A body that
    is there is replaced. `large_block` gives the one for a GPU and `key_width` one for a single K
    (`feedback_function`). Raises ValueError when the model has no such node or imports standard
    operators older than 18.
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
    body = feedback_function(opset, large_block=large_block, key_width=key_width)
    model.functions.extend([*kept, body])
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
