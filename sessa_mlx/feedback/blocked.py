"""The feedback solve in framework operations, by blocks of rows, in O(T D) memory.

With rows split into blocks, s_i = X_i (f_i + N_ij s_j summed over j < i), X_i = (I - N_ii)^-1. One
block row of scores is held at a time; nothing of size T x T exists in either direction. Only matrix
products and element-wise operations are used, so every MLX device runs it on its own stream.

A hidden key and its state are left out by selection, since 0 times NaN or infinity is NaN. For the
same reason a row that is not finite is kept out of the products that solve the rows before it.
"""

from __future__ import annotations

import mlx.core as mx

from sessa_mlx._exp import exp
from sessa_mlx.feedback.masking import visible_rows
from sessa_mlx.feedback.products import diagonal_blocks, identity, lower_halves

BLOCK = 256
LEAF = 8


def solve_forward(
    f: mx.array,  # (B, T, D)
    q: mx.array,  # (B, T, K)
    k: mx.array,  # (B, P+T, K)
    gamma: mx.array,  # (B, T)
    past_s: mx.array | None = None,  # (B, P, D)
    key_mask: mx.array | None = None,  # (B, P+T)
    document_starts: mx.array | None = None,  # (B, T)
) -> tuple[mx.array, mx.array]:
    """Solve (I - N) s = f; give s (B, T, D) like f and the log-sum-exp (B, T) of every score row.

    The log-sum-exp is +inf for a row that sees nothing, so that exp(score - lse) is 0 there.
    """
    B, T, D = f.shape
    P = k.shape[1] - T
    if T == 1 and past_s is not None and P:
        return _solve_one_row(f, q, k[:, :P], gamma, past_s, key_mask)
    work = mx.float64 if f.dtype == mx.float64 else mx.float32
    q, k, gamma = q.astype(work) * q.shape[-1] ** -0.5, k.astype(work), gamma.astype(work)
    # The states as later rows read them: zero where the key is hidden.
    states = mx.zeros((B, P + T, D), dtype=work)
    if past_s is not None:
        states[:, :P] = visible_rows(past_s.astype(work), key_mask)
    s, lse = [], []
    for start in range(0, T, BLOCK):
        rows = slice(start, min(start + BLOCK, T))
        old, new = P + rows.start, P + rows.stop
        # Without this order MLX computes the scores of every block row before the first solve.
        queries = mx.depends(q[:, rows], states)
        starts = None if document_starts is None else document_starts[:, rows]
        scores = _scores(queries, k[:, :new], key_mask, starts)  # (B, n, P+stop)
        top = mx.maximum(scores.max(-1, keepdims=True), mx.finfo(work).min)
        N = exp(scores - top)
        total = N.sum(-1, keepdims=True)
        lse.append(mx.where(total == 0, mx.inf, mx.log(total) + top).squeeze(-1))
        gain = gamma[:, rows, None] / mx.where(total == 0, 1, total)
        N = N * gain
        rhs = f[:, rows].astype(work)
        if old:
            rhs = rhs + N[:, :, :old] @ states[:, :old]
        visible = None if key_mask is None else key_mask[:, old:new]
        s.append(_solve_causally(N[:, :, old:], gain, rhs, visible))
        states[:, old:new] = visible_rows(s[-1], visible)
    return mx.concatenate(s, 1).astype(f.dtype), mx.concatenate(lse, 1)


def _solve_one_row(
    f: mx.array,  # (B, 1, D)
    q: mx.array,  # (B, 1, K)
    k: mx.array,  # (B, P, K)
    gamma: mx.array,  # (B, 1)
    past_s: mx.array,  # (B, P, D)
    key_mask: mx.array | None,  # (B, P+1)
) -> tuple[mx.array, mx.array]:
    """`solve_forward` of one row, which only adds known states: nothing is solved or copied."""
    work = mx.float64 if f.dtype == mx.float64 else mx.float32
    q, k, gamma, past_s = (x.astype(work) for x in (q, k, gamma, past_s))
    scores = (q * q.shape[-1] ** -0.5) @ k.swapaxes(1, 2)  # (B, 1, P)
    if key_mask is not None:
        scores = mx.where(key_mask[:, None, : k.shape[1]], scores, -mx.inf)
    top = mx.maximum(scores.max(-1, keepdims=True), mx.finfo(work).min)
    weights = exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    lse = mx.where(total == 0, mx.inf, mx.log(total) + top).squeeze(-1)
    gain = gamma[..., None] / mx.where(total == 0, 1, total)
    s = f.astype(work) + gain * (weights @ visible_rows(past_s, key_mask))
    return s.astype(f.dtype), lse


def solve_backward(
    ds: mx.array,  # (B, T, D)
    q: mx.array,  # (B, T, K)
    k: mx.array,  # (B, P+T, K)
    gamma: mx.array,  # (B, T)
    s: mx.array,  # (B, T, D)
    lse: mx.array,  # (B, T)
    past_s: mx.array | None = None,  # (B, P, D)
    key_mask: mx.array | None = None,  # (B, P+T)
    document_starts: mx.array | None = None,  # (B, T)
) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array | None]:
    """Gradients of f, q, k, gamma and past_s (None without a past) from ds, the gradient of s.

    One sweep from the last block row to the first: u_i = X_i^T (ds_i + N_ti^T u_t summed over later
    blocks t) is the gradient of f; with r = rowsum(alpha * u s^T) the score gradient is
    gamma alpha (u s^T - r) and the gradient of gamma is r.
    """
    B, T, D = s.shape
    P = k.shape[1] - T
    work = mx.float64 if s.dtype == mx.float64 else mx.float32
    scale = q.shape[-1] ** -0.5
    qw, kw = q.astype(work) * scale, visible_rows(k.astype(work), key_mask)
    gw, states = gamma.astype(work), s.astype(work)
    if past_s is not None:
        states = mx.concatenate([past_s.astype(work), states], 1)
    states = visible_rows(states, key_mask)
    u = mx.concatenate([mx.zeros((B, P, D), dtype=work), ds.astype(work)], 1)
    dq, dk, dgamma = mx.zeros_like(qw), mx.zeros_like(kw), mx.zeros_like(gw)
    for start in reversed(range(0, T, BLOCK)):
        rows = slice(start, min(start + BLOCK, T))
        old, new = P + rows.start, P + rows.stop
        queries = mx.depends(qw[:, rows], [u, dq, dk, dgamma])
        starts = None if document_starts is None else document_starts[:, rows]
        scores = _scores(queries, kw[:, :new], key_mask, starts)
        alpha = exp(scores - lse[:, rows, None].astype(work))
        # 1 but for the rounding of lse, which far exceeds that of alpha where lse is large.
        total = alpha.sum(-1, keepdims=True)
        alpha = alpha / mx.where(total == 0, 1, total)
        N = alpha * gw[:, rows, None]
        ui = _solve_block(N[:, :, old:], u[:, old:new], transposed=True)
        u[:, old:new] = ui
        if old:
            u[:, :old] += N[:, :, :old].swapaxes(1, 2) @ ui
        dP = ui @ states[:, :new].swapaxes(1, 2)
        r = (alpha * dP).sum(-1)
        dgamma[:, rows] = r
        dS = (dP - r[..., None]) * N
        dq[:, rows] = (dS @ kw[:, :new]) * scale
        dk[:, :new] += dS.swapaxes(1, 2) @ qw[:, rows]
    dpast_s = None if past_s is None else u[:, :P].astype(past_s.dtype)
    df = u[:, P:].astype(s.dtype)
    return df, dq.astype(q.dtype), dk.astype(k.dtype), dgamma.astype(gamma.dtype), dpast_s


def _scores(
    q: mx.array, k: mx.array, key_mask: mx.array | None, starts: mx.array | None
) -> mx.array:
    """Scores (B, n, m) of n query rows, the last n of m keys being their own; -inf where hidden."""
    n, m = q.shape[1], k.shape[1]
    visible = mx.arange(m - n, m)[:, None] > mx.arange(m)
    if key_mask is not None:
        visible = visible & key_mask[:, None, :m]
    if starts is not None:
        visible = visible & (mx.arange(m) >= starts[..., None])
    return mx.where(visible, q @ k.swapaxes(1, 2), -mx.inf)


def _solve_causally(
    N: mx.array,  # (B, n, n)
    gain: mx.array,  # (B, n, 1)
    rhs: mx.array,  # (B, n, D)
    visible: mx.array | None,  # (B, n)
) -> mx.array:
    """(I - N)^-1 rhs, where no row can spoil the rows before it.

    A row of N is finite if and only if its gain is. A row that is not finite is solved as zeros;
    afterwards it gets its own values back, and the rows behind it become NaN unless its key is
    hidden.
    """
    known = mx.isfinite(gain)
    rhs = mx.where(known, rhs, mx.nan)
    finite = mx.isfinite(rhs)
    solved = _solve_block(mx.where(known, N, 0), mx.where(finite, rhs, 0))
    spoils = ~finite if visible is None else ~finite & visible[:, :, None]
    before = mx.cumsum(spoils.astype(mx.int32), axis=1, inclusive=False)
    return mx.where(finite, mx.where(before > 0, mx.nan, solved), rhs)


def _solve_block(N: mx.array, rhs: mx.array, *, transposed: bool = False) -> mx.array:
    """(I - N)^-1 rhs, or (I - N)^-T rhs, for strictly lower triangular N (B, n, n)."""
    # Without the diagonal of ones, and not by addmm: small terms are summed before rhs is added.
    X = unit_lower_inverse(N) - identity(N.shape[-1], N.dtype)
    return rhs + (X.swapaxes(1, 2) if transposed else X) @ rhs


def unit_lower_inverse(N: mx.array) -> mx.array:
    """(I - N)^-1 for strictly lower triangular N (B, n, n), from matrix products only.

    Two neighbouring diagonal blocks with inverses X1 and X2 merge by X2 N21 X1, from single rows
    up. This is as accurate as substitution for gains of any size; powers of N are not, because
    they grow and cancel where |gamma| > 1.
    """
    n, size = N.shape[-1], 1
    while size < n:
        size *= 2
    leaf = min(size, LEAF)
    padded = mx.pad(N, [(0, 0), (0, size - n), (0, size - n)]) if size > n else N
    blocks = diagonal_blocks(padded, leaf)  # (B, size / leaf, leaf, leaf)
    X = mx.broadcast_to(identity(leaf, N.dtype), blocks.shape)
    half = 1
    while half < leaf:
        # Within a leaf all pairs merge by one product of whole matrices.
        X = X + X @ mx.where(lower_halves(leaf, half), blocks, 0) @ X
        half *= 2
    while X.shape[1] > 1:
        half = X.shape[-1]
        low = diagonal_blocks(padded, 2 * half)[..., half:, :half]
        first, second = X[:, ::2], X[:, 1::2]
        top = mx.concatenate([first, mx.zeros_like(first)], -1)
        X = mx.concatenate([top, mx.concatenate([second @ low @ first, second], -1)], -2)
    return X[:, 0, :n, :n]
