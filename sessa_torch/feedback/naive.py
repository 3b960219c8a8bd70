"""The feedback solve by its definition, row by row: s_t = f_t + gamma_t sum_{j<t} alpha_tj s_j."""

from __future__ import annotations

import torch
from torch import Tensor

from sessa_torch.feedback.masking import visible_rows


def feedback_solve_naive(
    f: Tensor,  # (B, T, D)
    q: Tensor,  # (B, T, K)
    k: Tensor,  # (B, P+T, K)
    gamma: Tensor,  # (B, T)
    past_s: Tensor | None = None,  # (B, P, D)
    key_mask: Tensor | None = None,  # (B, P+T)
    document_starts: Tensor | None = None,  # (B, T)
) -> Tensor:
    """Solve (I - N) s = f one row at a time, differentiable by autograd; s (B, T, D) like f."""
    T, P = f.shape[1], k.shape[1] - f.shape[1]
    work = torch.promote_types(f.dtype, torch.float32)
    states = (
        past_s.to(work) if past_s is not None else f.new_zeros(f.shape[0], 0, f.shape[2]).to(work)
    )
    visible = (
        torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if key_mask is None else key_mask
    )
    # Selected, not multiplied by a weight of 0: a hidden key or state may hold NaN.
    q, k, gamma = q.to(work), visible_rows(k.to(work), key_mask), gamma.to(work)
    for t in range(T):
        row = f[:, t].to(work)
        if P + t:
            scores = torch.einsum("bk,bjk->bj", q[:, t], k[:, : P + t])
            scores = scores * q.shape[-1] ** -0.5
            seen = visible[:, : P + t]
            if document_starts is not None:
                seen = torch.arange(t, device=f.device) >= document_starts[:, t, None]
            # A finite floor keeps a row with nothing visible free of NaN, forward and backward.
            alpha = torch.softmax(scores.masked_fill(~seen, -1e30), -1) * seen
            mix = torch.einsum("bj,bjd->bd", alpha, visible_rows(states, key_mask))
            row = row + gamma[:, t, None] * mix
        states = torch.cat([states, row[:, None]], 1)
    return states[:, P:].to(f.dtype)
