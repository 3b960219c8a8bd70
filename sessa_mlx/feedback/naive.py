"""The feedback solve by its definition, row by row: s_t = f_t + gamma_t sum_{j<t} alpha_tj s_j."""

from __future__ import annotations

import mlx.core as mx

from sessa_mlx.feedback.masking import visible_rows


def feedback_solve_naive(
    f: mx.array,  # (B, T, D)
    q: mx.array,  # (B, T, K)
    k: mx.array,  # (B, P+T, K)
    gamma: mx.array,  # (B, T)
    past_s: mx.array | None = None,  # (B, P, D)
    key_mask: mx.array | None = None,  # (B, P+T)
    document_starts: mx.array | None = None,  # (B, T)
) -> mx.array:
    """Solve (I - N) s = f one row at a time, differentiable by mx.grad; s (B, T, D) like f."""
    T, P = f.shape[1], k.shape[1] - f.shape[1]
    work = mx.float64 if f.dtype == mx.float64 else mx.float32
    states = [] if past_s is None else [past_s.astype(work)]
    visible = mx.ones(k.shape[:2], dtype=mx.bool_) if key_mask is None else key_mask
    # Selected, not multiplied by a weight of 0: a hidden key or state may hold NaN.
    q, k, gamma = q.astype(work), visible_rows(k.astype(work), key_mask), gamma.astype(work)
    for t in range(T):
        row = f[:, t].astype(work)
        if P + t:
            scores = (k[:, : P + t] @ q[:, t, :, None])[..., 0] * q.shape[-1] ** -0.5
            seen = visible[:, : P + t]
            if document_starts is not None:
                seen = mx.arange(t) >= document_starts[:, t, None]
            # A finite floor keeps a row with nothing visible free of NaN, forward and backward.
            alpha = mx.softmax(mx.where(seen, scores, -1e30), axis=-1) * seen
            mix = (alpha[:, None] @ visible_rows(mx.concatenate(states, 1), key_mask))[:, 0]
            row = row + gamma[:, t, None] * mix
        states.append(row[:, None])
    return mx.concatenate(states, 1)[:, P:].astype(f.dtype)
