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
from sessa_mlx.feedback.products import product

# The same constants as in the Metal text.
BLOCK = 256
THREADS = 128
COLUMNS = 16
CHUNK = 32

STORAGE = (mx.float32, mx.float16, mx.bfloat16)

_POSITION = """threadgroup_position_in_grid, thread_index_in_threadgroup,
    thread_index_in_simdgroup, simdgroup_index_in_threadgroup);"""
_WEIGHTS = f"""
  threadgroup float partial[2 * SIMDGROUPS];
  feedback_weights<MASKED>(scores, key_mask, gamma, weights, coupling, lse, scores_shape[1],
    scores_shape[2], partial, {_POSITION}
"""
_BLOCK = """
  threadgroup float xs[BLOCK_ROWS * X_LD];
  threadgroup float sums[TILE * X_LD];
  threadgroup float tile[TILE * TILE_LD];
  threadgroup int broken[THREADS];
  feedback_block<REVERSED, CARRIED, MASKED>(rhs, gamma, carried, coupling, key_mask, x,
    rhs_shape[1], rhs_shape[2], xs, sums, tile, broken, threadgroup_position_in_grid,
    thread_index_in_threadgroup, simdgroup_index_in_threadgroup);
"""
_SCORE_GRADS = f"""
  threadgroup float partial[SIMDGROUPS];
  feedback_score_grads(weights, products, gamma, dscores, dgamma, weights_shape[1],
    weights_shape[2], partial, {_POSITION}
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
) -> tuple[mx.array, mx.array]:
    """Solve (I - N) s = f; give s (B, T, D) like f and the log-sum-exp (B, T) of every score row.

    The log-sum-exp is +inf for a row that sees nothing, so that exp(score - lse) is 0 there.
    """
    T, dtype = f.shape[1], f.dtype
    P = k.shape[1] - T
    gamma = gamma.astype(mx.float32)
    if T == 1 and past_s is not None and P:
        return _step(f, q, k, gamma, past_s, key_mask)
    storage = _storage(f, q)
    f = f.astype(mx.float32) if storage == mx.float32 else f
    queries, keys = q.astype(mx.float32) * q.shape[-1] ** -0.5, k.astype(mx.float32)
    # The states as later rows read them: zero where the key is hidden.
    pieces = [] if past_s is None or P == 0 else [visible_rows(past_s.astype(storage), key_mask)]
    s: list[mx.array] = []
    lse: list[mx.array] = []
    for start in range(0, T, BLOCK):
        rows = slice(start, min(start + BLOCK, T))
        old, new = P + rows.start, P + rows.stop
        visible = None if key_mask is None else key_mask[:, old:new]
        # Without this dependency MLX would compute the scores of all block rows first.
        own = mx.depends(queries[:, rows], s[-1]) if s else queries[:, rows]
        scores = product(own, keys[:, :new].swapaxes(1, 2), storage)
        weights, coupling, sums = _weights(scores, gamma[:, rows], key_mask, storage)
        carried = _mix(weights, pieces, storage)
        s.append(_block(f[:, rows], gamma[:, rows], carried, coupling, visible))
        lse.append(sums)
        _append(pieces, visible_rows(s[-1].astype(storage), visible))
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
) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array | None]:
    """Gradients of f, q, k, gamma and past_s (None without a past) from ds, the gradient of s.

    One sweep from the last block row to the first; `u`, the gradient of f, is kept in float32. The
    row statistics are taken from the scores again, so lse is not read.
    """
    B, T, D = s.shape
    P = k.shape[1] - T
    storage = _storage(s, q)
    scale, gw = q.shape[-1] ** -0.5, gamma.astype(mx.float32)
    k = visible_rows(k, key_mask)
    queries, keys = q.astype(mx.float32) * scale, k.astype(mx.float32)
    states = s.astype(mx.float32)
    if past_s is not None:
        states = mx.concatenate([past_s.astype(mx.float32), states], 1)
    states = visible_rows(states, key_mask)
    # u and dk hold the sums for the rows that are not solved yet. An update in place would copy the
    # whole array, because its readers hold the buffer until the GPU is done.
    u = mx.concatenate([mx.zeros((B, P, D)), ds.astype(mx.float32)], 1)
    dk = mx.zeros(k.shape)
    solved: dict[str, list[mx.array]] = {"f": [], "q": [], "k": [], "gamma": []}
    for start in reversed(range(0, T, BLOCK)):
        rows = slice(start, min(start + BLOCK, T))
        old, new = P + rows.start, P + rows.stop
        own = mx.depends(queries[:, rows], [u, dk, *solved["q"][:1]])
        scores = product(own, keys[:, :new].swapaxes(1, 2), storage)
        weights, coupling, _ = _weights(scores, gw[:, rows], key_mask, storage)
        ui = _block(u[:, old:], gw[:, rows], None, coupling, None, reverse=True)
        u = u[:, :old]
        if old:
            pushed = (ui * gw[:, rows, None]).astype(storage)
            u = u + product(weights[:, :, :old].swapaxes(1, 2), pushed, storage)
        products = product(ui, states[:, :new].swapaxes(1, 2), storage)
        dscores, dgamma = _score_grads(weights, products, gw[:, rows])
        dq = product(dscores, k[:, :new].astype(storage), storage) * scale
        dk = dk + product(dscores.swapaxes(1, 2), q[:, rows].astype(storage), storage)
        done = {"f": ui.astype(s.dtype), "q": dq.astype(q.dtype), "gamma": dgamma}
        done["k"] = (dk[:, old:] * scale).astype(k.dtype)
        dk = dk[:, :old]
        for name, gradient in done.items():
            solved[name].insert(0, gradient)
    solved["k"].insert(0, (dk * scale).astype(k.dtype))
    df, dq, dk, dgamma = (mx.concatenate(solved[name], 1) for name in ("f", "q", "k", "gamma"))
    dpast_s = None if past_s is None else u.astype(past_s.dtype)
    return df, dq, dk, dgamma.astype(gamma.dtype), dpast_s


def _mix(weights: mx.array, pieces: list[mx.array], storage: mx.Dtype) -> mx.array | None:
    """weights (B, n, L) times the rows (B, L - n, D) that lie in pieces; None without any."""
    total, start = None, 0
    for piece in pieces:
        stop = start + piece.shape[1]
        part = product(weights[:, :, start:stop], piece, storage)
        total = part if total is None else total.astype(mx.float32) + part
        start = stop
    return total


def _append(pieces: list[mx.array], rows: mx.array) -> None:
    """Append rows and merge neighbours of equal size, so that pieces and copies stay few."""
    pieces.append(rows)
    while len(pieces) > 1 and pieces[-1].shape[1] == pieces[-2].shape[1]:
        last = pieces.pop()
        pieces[-1] = mx.concatenate([pieces[-1], last], 1)


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
        [q, k, past_s, _mask(key_mask)],
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
    gamma: mx.array,  # (B, n)
    key_mask: mx.array | None,  # (B, P+T)
    storage: mx.Dtype,
) -> list[mx.array]:
    """alpha (B, n, L) in `storage`, gamma alpha of the own block (B, n, n), log-sum-exp (B, n)."""
    B, n, L = scores.shape
    names = ("scores", "key_mask", "gamma")
    return _launch(
        _kernel("weights", names, ("weights", "coupling", "lse"), _WEIGHTS),
        [scores, _mask(key_mask, L), gamma],
        [((B, n, L), storage), ((B, n, n), mx.float32), ((B, n), mx.float32)],
        (n, B),
        MASKED=key_mask is not None,
    )


def _block(
    rhs: mx.array,  # (B, n, D)
    gamma: mx.array,  # (B, n)
    carried: mx.array | None,  # (B, n, D)
    coupling: mx.array,  # (B, n, n)
    visible: mx.array | None,  # (B, n)
    *,
    reverse: bool = False,
) -> mx.array:
    """(I - N)^-1 (rhs + gamma carried), or (I - N^T)^-1 rhs in reverse, in the dtype of rhs."""
    B, _, D = rhs.shape
    no_rows = mx.zeros((1,), rhs.dtype)
    (x,) = _launch(
        _kernel("block", ("rhs", "gamma", "carried", "coupling", "key_mask"), ("x",), _BLOCK),
        [rhs, gamma, no_rows if carried is None else carried, coupling, _mask(visible)],
        [(rhs.shape, rhs.dtype)],
        (-(-D // COLUMNS), B),
        REVERSED=reverse,
        CARRIED=carried is not None,
        MASKED=visible is not None,
    )
    return x


def _score_grads(weights: mx.array, products: mx.array, gamma: mx.array) -> list[mx.array]:
    """Gradients of the scores (B, n, L), in the dtype of weights, and of gamma (B, n)."""
    B, n, _ = weights.shape
    names = ("weights", "products", "gamma")
    return _launch(
        _kernel("score_grads", names, ("dscores", "dgamma"), _SCORE_GRADS),
        [weights, products, gamma],
        [(weights.shape, weights.dtype), ((B, n), mx.float32)],
        (n, B),
    )


def _storage(f: mx.array, q: mx.array) -> mx.Dtype:
    """The type of weights and states: float32 if f and q differ, as in decoding in bfloat16."""
    return f.dtype if f.dtype == q.dtype else mx.float32


def _mask(key_mask: mx.array | None, columns: int | None = None) -> mx.array:
    """The mask's first columns, or without a mask one element that the kernel never reads."""
    return mx.zeros((1,), mx.bool_) if key_mask is None else key_mask[:, :columns]


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
    **template: bool,
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
