"""The part of the operator's body that solves many rows in few large steps, for a GPU.

A GPU runs a node in a few microseconds, however small it is, so the number of nodes decides. Blocks
of 2048 rows need a fraction of the nodes that blocks of 64 rows need, at the price of more
arithmetic: half of a diagonal block of scores is masked out, and the last block is padded.

Letters as in `operator_body`; n rows of one block, which holds u smaller blocks of m rows.
"""

from __future__ import annotations

# Up to so many rows the body for a processor is better on a GPU too.
SMALL = 64
# Rows of the smaller blocks that are inverted; larger ones need fewer nodes and more arithmetic. On
# an H200 a prompt of 2048 tokens took 1.16 times as long with 512.
INVERTED = 256

# Sizes are read and constants are made again in every subgraph. ONNX Runtime computes with sizes on
# the processor only where it sees them come from a Shape of the same subgraph; it waits for the GPU
# at every other one.
_CONSTANTS = """
{p}zero = Constant <value_ints = [0]> ()
{p}one = Constant <value_ints = [1]> ()
{p}two = Constant <value_ints = [2]> ()
{p}n = Constant <value_ints = [{n}]> ()
"""

# Keys are padded by one in front, which no row sees, so that no tensor is empty, and behind by
# those of the rows that fill the last block. A key has its column as its place, a hidden key a
# place that no row reaches, and a row sees the keys up to its own place.
_PLACES = """
w_S = Shape <start = 1, end = 2> (key_mask)
w_P = Sub (w_S, w_T)
w_less = Constant <value_ints = [{less}]> ()
w_up = Add (w_T, w_less)
w_count = Div (w_up, w_n)
w_rows = Mul (w_count, w_n)
w_extra = Sub (w_rows, w_T)
w_row_pads = Concat <axis = 0> (w_zero, w_zero, w_zero, w_zero, w_extra, w_zero)
w_key_pads = Concat <axis = 0> (w_zero, w_one, w_zero, w_zero, w_extra, w_zero)
w_place_pads = Concat <axis = 0> (w_zero, w_zero, w_one, w_zero, w_zero, w_extra)
w_far = Constant <value_float = 3e38> ()
w_far_pad = Constant <value_float = 3e38> ()
w_S1 = Add (w_S, w_one)
w_last = Add (w_P, w_rows)
w_one_number = Constant <value_int = 1> ()
w_P_number = Squeeze (w_P)
w_S1_number = Squeeze (w_S1)
w_last_number = Squeeze (w_last)
w_columns = Range (w_one_number, w_S1_number, w_one_number)
w_columns32 = Cast <to = 1> (w_columns)
w_seen_places = Where (key_mask, w_columns32, w_far)
w_places2 = Unsqueeze (w_seen_places, w_one)
w_places = Pad (w_places2, w_place_pads, w_far_pad)
w_row_numbers = Range (w_P_number, w_last_number, w_one_number)
w_row_numbers32 = Cast <to = 1> (w_row_numbers)
w_row_places = Unsqueeze (w_row_numbers32, w_one)
w_first_place = ReduceMin (w_places, w_two)
w_sees = LessOrEqual (w_first_place, w_row_places)
"""

# The elements of an m x m matrix that each level of the inverse brings in: rows and columns that
# lie in one block of 2 size rows, and in different halves of it.
_LEVELS = """
w_m_number = Constant <value_int = {m}> ()
w_zero_number = Constant <value_int = 0> ()
w_index = Range (w_zero_number, w_m_number, w_one_number)
w_row_index = Unsqueeze (w_index, w_one)
w_sizes = Constant <value_ints = [{sizes}]> ()
w_size_axes = Constant <value_ints = [1, 2, 3]> ()
w_size = Unsqueeze (w_sizes, w_size_axes)
w_twice = Add (w_size, w_size)
w_row_half = Div (w_row_index, w_size)
w_column_half = Div (w_index, w_size)
w_row_pair = Div (w_row_index, w_twice)
w_column_pair = Div (w_index, w_twice)
w_crossed = Greater (w_row_half, w_column_half)
w_paired = Equal (w_row_pair, w_column_pair)
w_levels = And (w_crossed, w_paired)
w_own_index = Equal (w_row_index, w_index)
w_eye = Cast <to = 1> (w_own_index)
"""

# Every operand in whole blocks. A row that sees no key has no gain. The shape inference of onnx
# 1.18 to 1.20 refuses six constants as the pads, but not six parts that are joined.
_PADDED = """
w_none = Constant <value_ints = [0]> ()
w_one_state = Constant <value_ints = [1]> ()
w_state_pads = Concat <axis = 0> (w_none, w_one_state, w_none, w_none, w_none, w_none)
w_gain_axis = Constant <value_ints = [2]> ()
w_gain3 = Unsqueeze (gamma32, w_gain_axis)
w_no_gain = Constant <value_float = 0.0> ()
w_f = Pad (f32, w_row_pads)
w_q = Pad (q32, w_row_pads)
w_gain_rows = Pad (w_gain3, w_row_pads)
w_gains = Where (w_sees, w_gain_rows, w_no_gain)
w_keys = Pad (k32, w_key_pads)
w_known = Pad (past32, w_state_pads)
"""

# One block of n rows, all whose operands begin with t_, and the states before it, t_past.
_WEIGHTS = """
t_scaled = Div (t_q, root)
t_k_turned = Transpose <perm = [0, 2, 1]> (t_k)
t_scores = MatMul (t_scaled, t_k_turned)
t_hidden = Constant <value_float = -1e38> ()
t_masked = Where (t_visible, t_scores, t_hidden)
t_weights = Softmax <axis = -1> (t_masked)
t_c = Shape <start = 1, end = 2> (t_past)
t_block_rows = Constant <value_ints = [{n}]> ()
t_sizes = Concat <axis = 0> (t_c, t_block_rows)
t_off, t_own = Split <axis = 2> (t_weights, t_sizes)
t_read = MatMul (t_off, t_past)
t_gained = Mul (t_gain, t_read)
t_rhs = Add (t_f, t_gained)
t_N = Mul (t_gain, t_own)
t_cut = Constant <value_ints = [0, {u}, {m}, {u}, {m}]> ()
t_joined = Constant <value_ints = [0, 1, {uu}, {m}, {m}]> ()
t_five = Reshape (t_N, t_cut)
t_turned = Transpose <perm = [0, 1, 3, 2, 4]> (t_five)
t_blocks = Reshape (t_turned, t_joined)
t_first = Constant <value_ints = [0]> ()
t_end = Constant <value_ints = [{uu}]> ()
t_step = Constant <value_ints = [{next}]> ()
t_axis2 = Constant <value_ints = [2]> ()
t_axis4 = Constant <value_ints = [4]> ()
t_diagonal = Slice (t_blocks, t_first, t_end, t_axis2, t_step)
t_nothing = Constant <value_float = 0.0> ()
t_parts = Where (w_levels, t_diagonal, t_nothing)
"""

# With X the inverses of the diagonal blocks, s = X rhs + (X N) s, block after block. Adding what X
# changes, and not X times the rows, keeps rows without gain bit for bit.
_CHAIN = """
t_change = Sub ({X}, w_eye)
t_row_cut = Constant <value_ints = [0, 1, {u}, {m}, -1]> ()
t_rhs_blocks = Reshape (t_rhs, t_row_cut)
t_moved = MatMul (t_change, t_rhs_blocks)
t_begun = Add (t_rhs_blocks, t_moved)
t_N_rows = Reshape (t_N, t_row_cut)
t_carry = MatMul ({X}, t_N_rows)
"""

# More than n rows: the blocks one after the other.
_LOOP = """
        w_yes = Constant <value = bool {{1}}> ()
        w_turns = Squeeze (w_count)
        w_states = Loop (w_turns, w_yes, w_known) <
            body = large_block (int64 w_i, bool w_go, float[w_b, w_m, w_d] t_past)
                => (w_go_on, w_grown) {{
{constants}
                t_before = Shape <start = 1, end = 2> (t_past)
                t_known = Shape <start = 1, end = 2> (w_known)
                t_start = Sub (t_before, t_known)
                t_stop = Add (t_start, t_n)
                t_last = Add (t_before, t_n)
                t_c_number = Squeeze (t_before)
                t_none = Constant <value_int = 0> ()
                w_go_on = Greater (t_c_number, t_none)
                t_q = Slice (w_q, t_start, t_stop, t_one)
                t_f = Slice (w_f, t_start, t_stop, t_one)
                t_gain = Slice (w_gains, t_start, t_stop, t_one)
                t_row_places = Slice (w_row_places, t_start, t_stop, t_zero)
                t_k = Slice (w_keys, t_zero, t_last, t_one)
                t_places = Slice (w_places, t_zero, t_last, t_two)
                t_visible = LessOrEqual (t_places, t_row_places)
{turn}
                w_grown = Concat <axis = 1> (t_past, t_s)
            }}
        >
        w_first = Add (w_P, w_one)
        w_stop = Add (w_first, w_T)
        w_solved = Slice (w_states, w_first, w_stop, w_one)
"""

_ROWS = """
w_small = Constant <value_ints = [{small}]> ()
w_many = Greater (T, w_small)
w_tried, w_done = If (w_many) <
    then_branch = large () => (w_solved, w_finite) {{
        w_T = Shape <start = 1, end = 2> (f32)
{prepare}
{loop}
{check}
    }},
    else_branch = few () => (w_untried, w_not_done) {{
        w_untried = Identity (f32)
        w_not_done = Constant <value = bool {{0}}> ()
    }}
>
rows = If (w_done) <
    then_branch = kept () => (w_kept) {{
        w_kept = Identity (w_tried)
    }},
    else_branch = small_blocks () => (small_rows) {{
{rows}
        small_rows = Identity (rows_of_small)
    }}
>
"""

# A sum that is not finite has a term that is not, or is too large, which costs only time.
_CHECK = """
w_total = ReduceSum <keepdims = 0> (w_solved)
w_zero_total = Sub (w_total, w_total)
w_finite_zero = Constant <value_float = 0.0> ()
w_finite = Equal (w_zero_total, w_finite_zero)
"""

# Up to n rows at once: w_solved (B, T, D), in the terms of `shared_masks`.
_ONE_BLOCK = """
t_q = Identity (w_q)
t_f = Identity (w_f)
t_gain = Identity (w_gains)
t_k = Identity (w_keys)
t_past = Identity (w_known)
t_visible = Identity (w_visible)
{turn}
w_begin = Constant <value_ints = [0]> ()
w_row_axis = Constant <value_ints = [1]> ()
w_solved = Slice (t_s, w_begin, w_T, w_row_axis)
"""


def _inverse(m: int) -> tuple[list[str], str]:
    """Lines that invert I - N of every diagonal block, and the result's name (B, 1, u, m, m).

    Neighbouring blocks with inverses X1 and X2 merge by X2 N21 X1, for all pairs at once.
    """
    levels = m.bit_length() - 1
    parts = [f"t_part{i}" for i in range(levels)]
    lines = [f"{', '.join(parts)} = Split <axis = 1, num_outputs = {levels}> (t_parts)"]
    lines.append(f"t_X0 = Add (w_eye, {parts[0]})")
    for i, part in enumerate(parts[1:], 1):
        lines += [
            f"t_left{i} = MatMul (t_X{i - 1}, {part})",
            f"t_both{i} = MatMul (t_left{i}, t_X{i - 1})",
            f"t_X{i} = Add (t_X{i - 1}, t_both{i})",
        ]
    return lines, f"t_X{levels - 1}"


def _chain(u: int, m: int) -> list[str]:
    """Lines that solve the smaller blocks one after the other: t_s (B, n, D)."""
    begun, carry = ([f"t_{name}{i}" for i in range(u)] for name in ("begun", "carry"))
    lines = [
        f"{', '.join(begun)} = Split <axis = 2, num_outputs = {u}> (t_begun)",
        f"{', '.join(carry)} = Split <axis = 2, num_outputs = {u}> (t_carry)",
    ]
    known = begun[0]
    for i in range(1, u):
        lines += [
            f"t_columns{i} = Constant <value_ints = [{i * m}]> ()",
            f"t_before{i} = Slice ({carry[i]}, t_first, t_columns{i}, t_axis4)",
            f"t_added{i} = MatMul (t_before{i}, {known})",
            f"t_s{i} = Add ({begun[i]}, t_added{i})",
            f"t_known{i} = Concat <axis = 3> ({known}, t_s{i})",
        ]
        known = f"t_known{i}"
    return [
        *lines,
        f"t_all_rows = Constant <value_ints = [0, {u * m}, -1]> ()",
        f"t_s = Reshape ({known}, t_all_rows)",
    ]


def _turn(n: int, m: int) -> str:
    """Text that solves one block: t_s (B, n, D)."""
    u = n // m
    inverse, X = _inverse(m)
    sizes = {"n": n, "m": m, "u": u, "uu": u * u, "next": u + 1}
    lines = [_WEIGHTS.format(**sizes), *inverse, _CHAIN.format(X=X, **sizes), *_chain(u, m)]
    return "\n".join(lines)


def inverted_rows(n: int) -> int:
    """The rows of the smaller blocks in a block of n rows: at least two of them."""
    return min(INVERTED, n // 2)


def places_of_rows(n: int) -> str:
    """Text that says which keys each row sees and how a diagonal block is cut, from key_mask, w_T.

    It depends on lengths and mask alone, so all layers can share it.
    """
    m = inverted_rows(n)
    sizes = ", ".join(str(2**i) for i in range(m.bit_length() - 1))
    constants = _CONSTANTS.format(p="w_", n=n)
    return "\n".join([constants, _PLACES.format(less=n - 1), _LEVELS.format(m=m, sizes=sizes)])


def one_block(n: int) -> str:
    """Text that solves up to n rows at once: w_solved (B, T, D) and w_finite, a scalar bool."""
    turn = _turn(n, inverted_rows(n))
    return "\n".join([_PADDED, _ONE_BLOCK.format(turn=turn), _CHECK])


def large_blocks(n: int, rows: str) -> str:
    """Text that solves more than SMALL rows in blocks of n rows, and any other case by `rows`.

    n is a power of two and at least 2 SMALL. `rows` is the text for blocks of SMALL rows, which
    also repeats a solve that is not finite.
    """
    loop = _LOOP.format(constants=_CONSTANTS.format(p="t_", n=n), turn=_turn(n, inverted_rows(n)))
    return _ROWS.format(
        small=SMALL,
        prepare=places_of_rows(n) + _PADDED,
        loop=loop,
        check=_CHECK,
        rows=rows.replace("rows = Slice", "rows_of_small = Slice"),
    )
