"""The feedback solve with Metal kernels: one block row of scores at a time, O(T D) memory.

Products of size T^2 are matrix products of the framework; the row statistics, the solve within a
block row, the gradients of the scores and the decode step are the kernels of
sessa_common/kernels/feedback_solve.metal; docs/metal.md explains this division.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

import mlx.core as mx

from sessa_mlx.feedback.masking import visible_rows
from sessa_mlx.feedback.products import add_product, fused, product, storage_type

# The same constants as in the Metal text.
BLOCK = 256
THREADS = 128
COLUMNS = 16
CHUNK = 32

STORAGE = (mx.float32, mx.float16, mx.bfloat16)

# Sizes of score rows: few, so that MLX finds the memory of earlier ones again.
SIZES = 8
# States and sums over rows lie in about four pieces, for the same reason, of at least these rows.
STATE_ROWS, SUM_ROWS = 2048, 1024

_POSITION = """threadgroup_position_in_grid, thread_index_in_threadgroup,
    thread_index_in_simdgroup, simdgroup_index_in_threadgroup);"""
_WEIGHTS = f"""
  threadgroup float partial[2 * SIMDGROUPS];
  feedback_weights<MASKED, DOCUMENTS>(scores, key_mask, gamma, sizes, weights, coupling, lse,
    partial, {_POSITION}
"""
_BLOCK = """
  threadgroup float xs[BLOCK_ROWS * X_LD];
  threadgroup float sums[TILE * X_LD];
  threadgroup float tile[TILE * TILE_LD];
  threadgroup int broken[THREADS];
  feedback_block<REVERSED, CARRIED, MASKED>(rhs, gamma, carried, added, coupling, key_mask, sizes,
    x, SCALED, xs, sums, tile, broken, threadgroup_position_in_grid, thread_index_in_threadgroup,
    simdgroup_index_in_threadgroup);
"""
_SCORE_GRADS = f"""
  threadgroup float partial[SIMDGROUPS];
  feedback_score_grads(weights, products, gamma, sizes, dscores, dgamma, partial, {_POSITION}
"""
_STEP = f"""
  threadgroup float shared[CHUNK];
  feedback_step<MASKED>(q, keys, past_s, key_mask, q_strides, keys_strides, past_s_strides,
    key_mask_strides, partial, stats, past_s_shape[1], q_shape[2], past_s_shape[2], shared,
    {_POSITION}
"""
_MERGE = f"""
  threadgroup float shared[2 * SIMDGROUPS + THREADS];
  feedback_merge(f, gamma, partial, stats, s, lse, partial_shape[1], partial_shape[2], shared,
    {_POSITION}
"""


def unavailable_reason(f: mx.array, q: mx.array) -> str | None:
    """The reason why the kernels cannot run for these inputs, or None if they can."""
    if not mx.metal.is_available():
        return "MLX has no Metal device here"
    if mx.default_device().type != mx.DeviceType.gpu:
        return "the default device is the CPU; mx.set_default_device(mx.gpu) selects the GPU"
    for name, array in (("f", f), ("q", q)):
        if array.dtype not in STORAGE:
            return f"{name} is {array.dtype}; the kernels store float32, float16 and bfloat16"
    return None


def solve_forward(
    f: mx.array,  # (B, T, D)
    q: mx.array,  # (B, T, K)
    k: mx.array,  # (B, P+T, K)
    gamma: mx.array,  # (B, T)
    past_s: mx.array | None = None,  # (B, P, D)
    key_mask: mx.array | None = None,  # (B, P+T)
    precision: str = "auto",
    document_starts: mx.array | None = None,  # (B, T)
) -> tuple[mx.array, mx.array]:
    """Solve (I - N) s = f; give s (B, T, D) like f and the log-sum-exp (B, T) of every score row.

    The log-sum-exp is +inf for a row that sees nothing, so that exp(score - lse) is 0 there.
    """
    T, P, dtype = f.shape[1], k.shape[1] - f.shape[1], f.dtype
    gamma = gamma.astype(mx.float32)
    if T == 1 and past_s is not None and P:
        return _step(f, q, k, gamma, past_s, key_mask)
    storage = storage_type(f, q, precision)
    f = f.astype(mx.float32) if storage == mx.float32 else f
    queries, keys = q.astype(mx.float32) * q.shape[-1] ** -0.5, k.astype(mx.float32)
    # The states as later rows read them: zero where the key is hidden.
    states = _States(T)
    if past_s is not None and P:
        states.append(visible_rows(past_s.astype(storage), key_mask))
        states.close()
    s: list[mx.array] = []
    lse: list[mx.array] = []
    for start, stop in _block_rows(T):
        # Without this dependency MLX would compute the scores of all block rows first.
        own = mx.depends(queries[:, start:stop], s[-1:])
        L = _columns(P + stop, P, T)
        scores = product(own, keys[:, :L].swapaxes(1, 2), storage)
        weights, coupling, sums = _weights(
            scores, gamma, key_mask, document_starts, P, start, storage
        )
        mixed = states.mix(weights, storage)
        solved: list[mx.array] = []
        for first in range(0, stop - start, BLOCK):
            rows, at = min(BLOCK, stop - start - first), P + start
            carried = [] if mixed is None else [(mixed, first)]
            if first:
                near = weights[:, first : first + rows, at : at + first]
                carried.append((product(near, _joined(solved), storage), 0))
            mask = None if key_mask is None else (key_mask, at + first)
            rhs, gains = (f, start + first), (gamma, start + first)
            (x,) = _block(rhs, gains, (coupling, first), carried, mask, rows)
            s.append(x)
            solved.append(_shown(x, mask, storage))
        lse.append(sums)
        states.append(*solved)
    return mx.concatenate(s, 1).astype(dtype), mx.concatenate(lse, 1)


def solve_backward(
    ds: mx.array,  # (B, T, D)
    q: mx.array,  # (B, T, K)
    k: mx.array,  # (B, P+T, K)
    gamma: mx.array,  # (B, T)
    s: mx.array,  # (B, T, D)
    lse: mx.array,  # (B, T)
    past_s: mx.array | None = None,  # (B, P, D)
    key_mask: mx.array | None = None,  # (B, P+T)
    precision: str = "auto",
    document_starts: mx.array | None = None,  # (B, T)
) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array | None]:
    """Gradients of f, q, k, gamma and past_s (None without a past) from ds, the gradient of s.

    One sweep from the last block row to the first; `u`, the gradient of f, is kept in float32. The
    row statistics are taken from the scores again, so lse is not read.
    """
    T, P = s.shape[1], k.shape[1] - s.shape[1]
    storage = storage_type(s, q, precision)
    gains, K = gamma.astype(mx.float32), q.shape[-1]
    visible_k, states = visible_rows(k, key_mask), s.astype(mx.float32)
    queries, keys = q.astype(mx.float32) * K**-0.5, visible_k.astype(mx.float32)
    own_q, own_k = q.astype(storage), visible_k.astype(storage)
    if past_s is not None:
        states = mx.concatenate([past_s.astype(mx.float32), states], 1)
    states = visible_rows(states, key_mask)
    u, dk = _Sums(P, T), _Sums(P, T)
    u.start(ds)
    found: dict[str, list[mx.array]] = {"f": [], "q": [], "k": [], "gamma": []}
    for start, stop in reversed(_block_rows(T)):
        at, n = P + start, stop - start
        own = mx.depends(queries[:, start:stop], [*u.arrays(), *dk.arrays(), *found["q"][:1]])
        L = _columns(P + stop, P, T)
        scores = product(own, keys[:, :L].swapaxes(1, 2), storage)
        weights, coupling, _ = _weights(scores, gains, key_mask, document_starts, P, start, storage)
        waiting = u.rows_from(at)
        solved: list[mx.array] = []
        pushed: list[mx.array] = []
        for first in reversed(range(0, n, BLOCK)):
            rows = min(BLOCK, n - first)
            rhs, own_gains = (waiting[0], waiting[1] + first), (gains, start + first)
            x, scaled = _block(rhs, own_gains, (coupling, first), [], None, rows, scaled=storage)
            solved.insert(0, x)
            pushed.insert(0, scaled)
            if first:
                near = weights[:, first : first + rows, at : at + first].swapaxes(1, 2)
                earlier = waiting[0][:, waiting[1] : waiting[1] + first]
                waiting = add_product(earlier, near, scaled, storage), 0
        ui = _joined(solved)
        u.add(weights, _joined(pushed), at, storage)
        products = product(ui, states[:, :L].swapaxes(1, 2), storage)
        dscores, dgamma = _score_grads(weights, products, gains, P, start, K)
        dq = product(dscores, own_k[:, :L], storage)
        dk.add(dscores, own_q[:, start:stop], P + stop, storage)
        found["k"].insert(0, dk.take_from(at).astype(k.dtype))
        for name, x in (("f", ui.astype(s.dtype)), ("q", dq.astype(q.dtype)), ("gamma", dgamma)):
            found[name].insert(0, x)
    found["k"][:0] = [x.astype(k.dtype) for x in dk.arrays()]
    df, dq, dk_all, dgamma = (mx.concatenate(x, 1) for x in found.values())
    dpast_s = None if past_s is None else _joined([*u.arrays(), past_s[:, :0]]).astype(past_s.dtype)
    return df, dq, dk_all, dgamma.astype(gamma.dtype), dpast_s


def _block_rows(T: int) -> list[tuple[int, int]]:
    """First and last row of every block row: one block of rows, or two in long sequences."""
    n = BLOCK if T < 16 * BLOCK else 2 * BLOCK
    return [(start, min(start + n, T)) for start in range(0, T, n)]


def _columns(needed: int, P: int, T: int) -> int:
    """Columns of scores, at least `needed`, that a block row computes: one of about SIZES."""
    stops = [P + stop for _, stop in _block_rows(T)]
    step = -(-len(stops) // SIZES)
    return next(stop for stop in [*stops[step - 1 :: step], P + T] if stop >= needed)


def _piece_rows(T: int, least: int) -> int:
    """Rows of a piece: whole block rows, a fourth of T or more, and not fewer than `least`."""
    n = _block_rows(T)[0][1]
    return -(-max(T // 4, least) // n) * n


def _joined(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, 1)


class _States:
    """Solved rows (B, n, D) in pieces. The last piece grows until it is full, by copies."""

    def __init__(self, T: int) -> None:
        self.full = _piece_rows(T, STATE_ROWS)
        self.pieces: list[mx.array] = []
        self.room = 0

    def append(self, *rows: mx.array) -> None:
        """Append the rows of a block row."""
        count = sum(x.shape[1] for x in rows)
        last = [] if self.room < count else [self.pieces.pop()]
        self.room = (self.room if last else self.full) - count
        self.pieces.append(_joined([*last, *rows]))

    def close(self) -> None:
        """Begin a new piece with the next rows."""
        self.room = 0

    def mix(self, weights: mx.array, storage: mx.Dtype) -> mx.array | None:
        """weights (B, n, L) times the rows in all pieces; None without any."""
        total, start = None, 0
        for piece in self.pieces:
            stop = start + piece.shape[1]
            part = weights[:, :, start:stop], piece, storage
            total = product(*part) if total is None else add_product(total, *part)
            start = stop
        return total


class _Sums:
    """Float32 sums over later rows for every row (B, P+T, D), in pieces, from the last row down.

    Updates are not in place: while an operation reads a buffer, MLX would copy all of it.
    """

    def __init__(self, P: int, T: int) -> None:
        step = _piece_rows(T, SUM_ROWS)
        self.starts = [0] * (P > 0) + [P + start for start in range(0, T, step)]
        self.parts: list[mx.array | None] = [None] * len(self.starts)
        self.P, self.T = P, T

    def start(self, values: mx.array) -> None:
        """Begin with values (B, T, D) in all rows but those of the past."""
        for i, start in enumerate(self.starts):
            if start >= self.P:
                stop = [*self.starts, self.P + self.T][i + 1]
                part = values[:, start - self.P : stop - self.P]
                self.parts[i] = part.astype(mx.float32)

    def arrays(self) -> list[mx.array]:
        """The parts that hold anything."""
        return [x for x in self.parts if x is not None]

    def rows_from(self, row: int) -> tuple[mx.array, int]:
        """The array with the sum of `row` and its place in it."""
        i = self._part(row)
        part = self.parts[i]
        assert part is not None
        return part, row - self.starts[i]

    def add(self, weights: mx.array, rows: mx.array, stop: int, storage: mx.Dtype) -> None:
        """Add weights^T (L, n) times rows (B, n, D) to the rows before `stop`; drop the others."""
        for i, start in enumerate(self.starts):
            end = min([*self.starts, stop][i + 1], stop)
            if end <= start:
                self.parts[i] = None
                continue
            operands = weights[:, :, start:end].swapaxes(1, 2), rows, storage
            part = self.parts[i]
            if part is None:
                self.parts[i] = product(*operands)
            else:
                self.parts[i] = add_product(part[:, : end - start], *operands)

    def take_from(self, row: int) -> mx.array:
        """Remove the sums of the rows from `row` on, all in one part, and return them."""
        part, place = self.rows_from(row)
        self.parts[self._part(row)] = part[:, :place] if place else None
        return part[:, place:]

    def _part(self, row: int) -> int:
        return max(i for i, start in enumerate(self.starts) if start <= row)


def _step(
    f: mx.array,
    q: mx.array,
    k: mx.array,
    gamma: mx.array,
    past_s: mx.array,
    key_mask: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """`solve_forward` for one token, T = 1, in one pass over the P past keys and states."""
    B, P, D = past_s.shape
    chunks = -(-P // CHUNK)
    partial, stats = _launch(
        _kernel("step", ("q", "keys", "past_s", "key_mask"), ("partial", "stats"), _STEP, False),
        [q, k, past_s, q if key_mask is None else key_mask],
        [((B, chunks, D), mx.float32), ((B, chunks, 2), mx.float32)],
        (chunks, B),
        MASKED=key_mask is not None,
    )
    s, lse = _launch(
        _kernel("merge", ("f", "gamma", "partial", "stats"), ("s", "lse"), _MERGE),
        [f, gamma, partial, stats],
        [((B, 1, D), f.dtype), ((B, 1), mx.float32)],
        (-(-D // 32), B),
    )
    return s, lse


def _weights(
    scores: mx.array,  # (B, n, L)
    gamma: mx.array,  # (B, T)
    key_mask: mx.array | None,  # (B, P+T)
    document_starts: mx.array | None,  # (B, T), with neither a mask nor a past
    P: int,
    start: int,
    storage: mx.Dtype,
) -> list[mx.array]:
    """alpha (B, n, L) in `storage`, gamma alpha within blocks (B, n, BLOCK), log-sum-exp (B, n).

    The block row begins at row `start` of gamma.
    """
    B, n, L = scores.shape
    width = min(n, BLOCK)
    names = ("scores", "key_mask", "gamma", "sizes")
    shown = gamma if key_mask is None else key_mask
    if document_starts is not None:
        shown = document_starts.astype(mx.int32)
    sizes = [n, L, P + start, width, gamma.shape[1], start, P + gamma.shape[1]]
    return _launch(
        _kernel("weights", names, ("weights", "coupling", "lse"), _WEIGHTS),
        [scores, shown, gamma, mx.array(sizes)],
        [((B, n, L), storage), ((B, n, width), mx.float32), ((B, n), mx.float32)],
        (n, B),
        MASKED=key_mask is not None,
        DOCUMENTS=document_starts is not None,
    )


# An array (B, rows, ...) and the row from which a kernel reads it.
_Rows = tuple[mx.array, int]


def _block(
    rhs: _Rows,  # (B, ., D)
    gamma: _Rows,  # (B, .)
    coupling: _Rows,  # (B, ., n)
    carried: list[_Rows],  # at most two (B, ., D), the second one from its first row
    key_mask: _Rows | None,  # (B, .)
    rows: int,
    *,
    scaled: mx.Dtype | None = None,
) -> list[mx.array]:
    """[(I - N)^-1 (rhs + gamma carried)], (B, rows, D) like rhs.

    With the type `scaled` [x, gamma x in that type] for x = (I - N^T)^-1 rhs.
    """
    B, _, D = rhs[0].shape
    # What is not given is not read; any array can stand for it.
    operands = [rhs, gamma, coupling, (carried or [gamma])[0], key_mask or gamma]
    sizes = [rows, D, coupling[0].shape[2]]
    for array, first in operands:
        sizes += [array.shape[1], first]
    added = carried[1][0] if len(carried) > 1 else gamma[0]
    arrays = [rhs[0], gamma[0], operands[3][0], added, coupling[0], operands[4][0], mx.array(sizes)]
    names = ("rhs", "gamma", "carried", "added", "coupling", "key_mask", "sizes")
    outputs = ("x",) if scaled is None else ("x", "scaled")
    shape = (B, rows, D)
    types = [rhs[0].dtype] if scaled is None else [rhs[0].dtype, scaled]
    return _launch(
        _kernel("block", names, outputs, _BLOCK.replace("SCALED", outputs[-1])),
        arrays,
        [(shape, dtype) for dtype in types],
        (-(-D // COLUMNS), B),
        REVERSED=scaled is not None,
        CARRIED=len(carried),
        MASKED=key_mask is not None,
    )


def _shown(x: mx.array, mask: _Rows | None, storage: mx.Dtype) -> mx.array:
    """x (B, n, D) in `storage`, zero in the rows that the mask hides from its row on."""
    if mask is None:
        return x.astype(storage)
    seen = mask[0][:, mask[1] : mask[1] + x.shape[1], None]
    return fused(_selected, storage)(seen, x)


def _selected(storage: mx.Dtype, seen: mx.array, x: mx.array) -> mx.array:
    return mx.where(seen, x, 0).astype(storage)


def _score_grads(
    weights: mx.array, products: mx.array, gamma: mx.array, P: int, start: int, K: int
) -> list[mx.array]:
    """Gradients of the products q k^T (B, n, L), in the dtype of weights, and of gamma (B, n)."""
    B, n, L = weights.shape
    names = ("weights", "products", "gamma", "sizes")
    sizes = [n, L, P + start, K, gamma.shape[1], start]
    return _launch(
        _kernel("score_grads", names, ("dscores", "dgamma"), _SCORE_GRADS),
        [weights, products, gamma, mx.array(sizes)],
        [(weights.shape, weights.dtype), ((B, n), mx.float32)],
        (n, B),
    )


@cache
def _kernel(
    name: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    body: str,
    copy_strided: bool = True,
) -> Callable[..., list[mx.array]]:
    text = files("sessa_common").joinpath("kernels/feedback_solve.metal").read_text("ascii")
    build: Any = mx.fast.metal_kernel  # its stub says object
    return build(
        name=f"sessa_{name}",
        input_names=inputs,
        output_names=outputs,
        source=body,
        header="#define SESSA_FUNCTIONS_ONLY\n" + text,
        ensure_row_contiguous=copy_strided,
    )


def _launch(
    kernel: Callable[..., list[mx.array]],
    inputs: list[mx.array],
    outputs: list[tuple[Any, mx.Dtype]],
    groups: tuple[int, int],
    **template: bool | int,
) -> list[mx.array]:
    """Run `kernel` on groups[0] x groups[1] threadgroups."""
    return kernel(
        inputs=inputs,
        template=list(template.items()),
        grid=(groups[0] * THREADS, groups[1], 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
    )
