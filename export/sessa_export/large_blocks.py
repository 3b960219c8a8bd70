"""The part of the operator's body that solves many rows in few large steps, for a GPU.

A GPU runs a node in a few microseconds, however small it is, so the number of nodes decides. Blocks
of a thousand rows need a fraction of the nodes that blocks of 64 rows need, at the price of more
arithmetic: half of a diagonal block of scores is masked out, and the last block is padded.

Letters as in `operator_body`, and n rows of one block.
"""

from __future__ import annotations

# Rows of the smallest blocks that are inverted in one piece.
SMALL = 64
END = 2**31 - 1

# Sizes are read and constants are made again in every subgraph. ONNX Runtime computes with sizes on
# the processor only where it sees them come from a Shape of the same subgraph; it waits for the GPU
# at every other one.
_CONSTANTS = """
{p}zero = Constant <value_ints = [0]> ()
{p}one = Constant <value_ints = [1]> ()
{p}two = Constant <value_ints = [2]> ()
{p}n = Constant <value_ints = [{n}]> ()
{p}nothing = Constant <value_float = 0.0> ()
"""

# Everything before the loop. A key has its column as its place, a hidden key a place that no row
# reaches, and a row sees the keys up to its own place. A row that sees no key has no gain.
_PREPARE = """
w_T = Shape <start = 1, end = 2> (f32)
w_P = Shape <start = 1, end = 2> (past32)
w_S = Shape <start = 1, end = 2> (key_mask)
w_less = Constant <value_ints = [{less}]> ()
w_up = Add (w_T, w_less)
w_count = Div (w_up, w_n)
w_rows = Mul (w_count, w_n)
w_extra = Sub (w_rows, w_T)
w_row_pads = Concat <axis = 0> (w_zero, w_zero, w_zero, w_zero, w_extra, w_zero)
w_key_pads = Concat <axis = 0> (w_zero, w_one, w_zero, w_zero, w_extra, w_zero)
w_place_pads = Concat <axis = 0> (w_zero, w_zero, w_one, w_zero, w_zero, w_extra)
w_state_pads = Concat <axis = 0> (w_zero, w_one, w_zero, w_zero, w_zero, w_zero)
w_far = Constant <value_float = 3e38> ()
w_far_pad = Constant <value_float = 3e38> ()
w_f = Pad (f32, w_row_pads)
w_q = Pad (scaled, w_row_pads)
w_gain = Pad (gain, w_row_pads)
w_keys = Pad (k32, w_key_pads)
w_known = Pad (past32, w_state_pads)
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
w_gains = Where (w_sees, w_gain, w_nothing)
w_half = Constant <value_ints = [{half}, {half}]> ()
w_half_zeros = ConstantOfShape (w_half)
w_eye = EyeLike <dtype = 1> (w_half_zeros)
w_small_eye = EyeLike <dtype = 1> (level)
w_yes = Constant <value = bool {{1}}> ()
w_turns = Squeeze (w_count)
"""

_TURN = """
t_c = Shape <start = 1, end = 2> (w_past)
t_first = Shape <start = 1, end = 2> (w_known)
t_start = Sub (t_c, t_first)
t_stop = Add (t_start, t_n)
t_end = Add (t_c, t_n)
t_c_number = Squeeze (t_c)
t_none = Constant <value_int = 0> ()
w_go_on = Greater (t_c_number, t_none)
t_q = Slice (w_q, t_start, t_stop, t_one)
t_f = Slice (w_f, t_start, t_stop, t_one)
t_gain = Slice (w_gains, t_start, t_stop, t_one)
t_row_places = Slice (w_row_places, t_start, t_stop, t_zero)
t_k = Slice (w_keys, t_zero, t_end, t_one)
t_places = Slice (w_places, t_zero, t_end, t_two)
t_visible = LessOrEqual (t_places, t_row_places)
t_k_turned = Transpose <perm = [0, 2, 1]> (t_k)
t_scores = MatMul (t_q, t_k_turned)
t_hidden = Constant <value_float = -1e38> ()
t_masked = Where (t_visible, t_scores, t_hidden)
t_weights = Softmax <axis = -1> (t_masked)
t_sizes = Concat <axis = 0> (t_c, t_n)
t_off, t_own = Split <axis = 2> (t_weights, t_sizes)
t_read = MatMul (t_off, w_past)
t_gained = Mul (t_gain, t_read)
t_rhs = Add (t_f, t_gained)
t_N = Mul (t_gain, t_own)
"""

# The two halves of a block, whose inverses are X1 and X2. Adding what X changes, and not X times
# the rows, keeps rows without gain bit for bit.
_HALVES = """
t_change = Sub ({X}, w_eye)
t_number0 = Constant <value_int = 0> ()
t_number1 = Constant <value_int = 1> ()
t_change1 = Gather <axis = 1> (t_change, t_number0)
t_change2 = Gather <axis = 1> (t_change, t_number1)
t_rhs1, t_rhs2 = Split <axis = 1, num_outputs = 2> (t_rhs)
t_moved1 = MatMul (t_change1, t_rhs1)
t_s1 = Add (t_rhs1, t_moved1)
t_low_start = Constant <value_ints = [{half}, 0]> ()
t_low_stop = Constant <value_ints = [{n}, {half}]> ()
t_low_axes = Constant <value_ints = [1, 2]> ()
t_low = Slice (t_N, t_low_start, t_low_stop, t_low_axes)
t_carried = MatMul (t_low, t_s1)
t_rest2 = Add (t_rhs2, t_carried)
t_moved2 = MatMul (t_change2, t_rest2)
t_s2 = Add (t_rest2, t_moved2)
w_grown = Concat <axis = 1> (w_past, t_s1, t_s2)
"""

_ROWS = """
w_small = Constant <value_ints = [{small}]> ()
w_many = Greater (T, w_small)
w_tried, w_done = If (w_many) <
    then_branch = large () => (w_solved, w_finite) {{
{prepare}
        w_states = Loop (w_turns, w_yes, w_known) <
            body = large_block (int64 w_i, bool w_go, float[w_b, w_m, w_d] w_past)
                => (w_go_on, w_grown) {{
{turn}
            }}
        >
        w_first = Add (w_P, w_one)
        w_stop = Add (w_first, w_T)
        w_solved = Slice (w_states, w_first, w_stop, w_one)
        w_zeros = Sub (w_solved, w_solved)
        w_total = ReduceSum <keepdims = 0> (w_zeros)
        w_finite = Equal (w_total, w_nothing)
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


def _blocks(n: int, size: int) -> list[str]:
    """Lines that cut N (B, n, n) into (B, (n/size)^2, size, size), row by row of blocks."""
    u = n // size
    return [
        f"t_cut{size} = Constant <value_ints = [0, {u}, {size}, {u}, {size}]> ()",
        f"t_joined{size} = Constant <value_ints = [0, {u * u}, {size}, {size}]> ()",
        f"t_five{size} = Reshape (t_N, t_cut{size})",
        f"t_turned{size} = Transpose <perm = [0, 1, 3, 2, 4]> (t_five{size})",
        f"t_blocks{size} = Reshape (t_turned{size}, t_joined{size})",
    ]


def _every(name: str, source: str, first: int, step: int) -> list[str]:
    """Lines that take every step-th block of `source`, from `first` on."""
    return [
        f"{name}_first = Constant <value_ints = [{first}]> ()",
        f"{name}_stop = Constant <value_ints = [{END}]> ()",
        f"{name}_step = Constant <value_ints = [{step}]> ()",
        f"{name} = Slice ({source}, {name}_first, {name}_stop, t_one, {name}_step)",
    ]


def _small_inverse(n: int) -> tuple[list[str], str]:
    """Lines that invert I - N of every diagonal block of SMALL rows, (B, n/SMALL, SMALL, SMALL)."""
    lines = _blocks(n, SMALL) + _every("t_diagonal", f"t_blocks{SMALL}", 0, n // SMALL + 1)
    X, size = "w_small_eye", 1
    while size < SMALL:
        lines.append(f"t_part{size} = Where (at{size}, t_diagonal, t_nothing)")
        added = f"t_part{size}"
        if size > 1:
            lines += [f"t_left{size} = MatMul ({X}, {added})"]
            lines += [f"t_both{size} = MatMul (t_left{size}, {X})"]
            added = f"t_both{size}"
        lines.append(f"t_X{size} = Add ({X}, {added})")
        X, size = f"t_X{size}", 2 * size
    return lines, X


def _merge(n: int, size: int, X: str) -> tuple[list[str], str]:
    """Lines that merge neighbours X1 and X2 of `size` rows to the inverse of both."""
    u, given = n // size, f"t_blocks{size}"
    lines = [] if size == SMALL else _blocks(n, size)
    lines += _every(f"t_low{size}", given, u, 2 * (u + 1))
    lines += _every(f"t_one{size}", X, 0, 2) + _every(f"t_two{size}", X, 1, 2)
    return [
        *lines,
        f"t_size{size} = Constant <value_ints = [{size}]> ()",
        f"t_pads{size} = Concat <axis = 0> ({'t_zero, ' * 7}t_size{size})",
        f"t_down{size} = MatMul (t_two{size}, t_low{size})",
        f"t_across{size} = MatMul (t_down{size}, t_one{size})",
        f"t_top{size} = Pad (t_one{size}, t_pads{size})",
        f"t_bottom{size} = Concat <axis = 3> (t_across{size}, t_two{size})",
        f"t_merged{size} = Concat <axis = 2> (t_top{size}, t_bottom{size})",
    ], f"t_merged{size}"


def large_blocks(n: int, rows: str) -> str:
    """Text that solves more than SMALL rows in blocks of n rows, and any other case by `rows`.

    n is a power of two and at least 2 SMALL. `rows` is the text for blocks of SMALL rows, which
    also repeats a solve that is not finite.
    """
    lines, X = _small_inverse(n)
    size = SMALL
    while 2 * size < n:
        merged, X = _merge(n, size, X)
        lines += merged
        size *= 2
    halves = _HALVES.format(X=X, n=n, half=n // 2)
    turn = [_CONSTANTS.format(p="t_", n=n), _TURN, *lines, halves]
    constants = _CONSTANTS.format(p="w_", n=n)
    prepare = [constants, _PREPARE.format(less=n - 1, half=n // 2), *_masks()]
    rows = rows.replace("rows = Slice", "rows_of_small = Slice")
    return _ROWS.format(small=SMALL, prepare="\n".join(prepare), turn="\n".join(turn), rows=rows)


def _masks() -> list[str]:
    """Lines that say, for every level of the small inverse, which elements it brings in."""
    lines, size = [], 1
    while size < SMALL:
        lines.append(f"w_size{size} = Constant <value_float = {size}.0> ()")
        lines.append(f"at{size} = Equal (level, w_size{size})")
        size *= 2
    return lines
