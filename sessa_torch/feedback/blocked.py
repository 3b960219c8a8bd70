"""The feedback solve in framework operations, by blocks of rows, in O(T D) memory.

With rows split into blocks, s_i = X_i (f_i + N_ij s_j summed over j < i), X_i = (I - N_ii)^-1. One
block row of scores is held at a time; nothing of size T x T exists in either direction.

A hidden key and its state are left out by selection, since 0 times NaN or infinity is NaN. For the
same reason a row that is not finite is kept out of the products that solve the rows before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sessa_torch.feedback import _documents
from sessa_torch.feedback.masking import visible_rows
from sessa_torch.feedback.outputs import from_row, sum_type

BLOCK = 256
LEAF = 8


def solve_forward(
    f: Tensor,  # (B, T, D)
    q: Tensor,  # (B, T, K)
    k: Tensor,  # (B, P+T, K)
    gamma: Tensor,  # (B, T)
    past_s: Tensor | None = None,  # (B, P, D)
    key_mask: Tensor | None = None,  # (B, P+T)
    document_starts: Tensor | None = None,  # (B, T)
) -> tuple[Tensor, Tensor]:
    """Solve (I - N) s = f; give s (B, T, D) like f and the log-sum-exp (B, T) of every score row.

    The log-sum-exp is +inf for a row that sees nothing, so that exp(score - lse) is 0 there.
    """
    if document_starts is not None:
        return _documents.solve_forward(solve_forward, f, q, k, gamma, document_starts)
    B, T, D = f.shape
    P = k.shape[1] - T
    if T == 1 and past_s is not None and P:
        return _solve_one_row(f, q, k[:, :P], gamma, past_s, key_mask)
    work = torch.promote_types(f.dtype, torch.float32)
    q, k, gamma = q.to(work), k.to(work), gamma.to(work)
    s = torch.empty(B, T, D, dtype=f.dtype, device=f.device)
    # The states as later rows read them: zero where the key is hidden.
    states = torch.empty(B, P + T, D, dtype=work, device=f.device)
    if past_s is not None:
        states[:, :P] = visible_rows(past_s, key_mask)
    lse = torch.empty(B, T, dtype=sum_type(f.device), device=f.device)
    block = _block_rows(P + T)
    tile = states.new_empty(B * min(block, T) * (P + T))
    for start in range(0, T, block):
        rows = slice(start, min(start + block, T))
        old, new = P + rows.start, P + rows.stop
        scores = _scores(q[:, rows], k[:, :new], key_mask, tile)  # (B, n, P+stop)
        top = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(work).min)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        lse[:, rows] = torch.where(total == 0, torch.inf, total.log() + top).squeeze(-1)
        gain = gamma[:, rows, None] / total.masked_fill(total == 0, 1)
        rhs = f[:, rows].to(work)
        if old:
            rhs = torch.addcmul(rhs, weights[:, :, :old] @ states[:, :old], gain)
        visible = None if key_mask is None else key_mask[:, old:new]
        solved = _solve_causally(weights[:, :, old:], gain, rhs, visible)
        s[:, rows], states[:, old:new] = solved, visible_rows(solved, visible)
    return s, lse


def _solve_one_row(
    f: Tensor,  # (B, 1, D)
    q: Tensor,  # (B, 1, K)
    k: Tensor,  # (B, P, K)
    gamma: Tensor,  # (B, 1)
    past_s: Tensor,  # (B, P, D)
    key_mask: Tensor | None,  # (B, P+1)
) -> tuple[Tensor, Tensor]:
    """`solve_forward` of one row, which only adds known states: nothing is solved or copied."""
    work = torch.promote_types(f.dtype, torch.float32)
    q, k, gamma, past_s = (x.to(work) for x in (q, k, gamma, past_s))
    scores = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=q.shape[2] ** -0.5)  # (B, 1, P)
    if key_mask is not None:
        scores.masked_fill_(~key_mask[:, None, : k.shape[1]], -torch.inf)
    top = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(work).min)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = torch.where(total == 0, torch.inf, total.log() + top).squeeze(-1)
    gain = gamma[:, :, None] / total.masked_fill(total == 0, 1)
    s = torch.addcmul(f.to(work), weights @ visible_rows(past_s, key_mask), gain)
    return s.to(f.dtype), lse.to(sum_type(f.device))


def solve_backward(
    ds: Tensor,  # (B, T, D)
    q: Tensor,  # (B, T, K)
    k: Tensor,  # (B, P+T, K)
    gamma: Tensor,  # (B, T)
    s: Tensor,  # (B, T, D)
    lse: Tensor,  # (B, T)
    past_s: Tensor | None = None,  # (B, P, D)
    key_mask: Tensor | None = None,  # (B, P+T)
    document_starts: Tensor | None = None,  # (B, T)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of f, q, k, gamma and past_s (None without a past) from ds, the gradient of s.

    One sweep from the last block row to the first: u_i = X_i^T (ds_i + N_ti^T u_t summed over later
    blocks t) is the gradient of f; with r = rowsum(alpha * u s^T) the score gradient is
    gamma alpha (u s^T - r) and the gradient of gamma is r. As gamma scales whole rows, the narrow
    factors of the products take it.
    """
    if document_starts is not None:
        tensors = (ds, q, k, gamma, s, lse)
        return _documents.solve_backward(solve_backward, *tensors, document_starts)
    B, T, D = s.shape
    P = k.shape[1] - T
    work = torch.promote_types(s.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5
    qw, kw, gw, states = q.to(work), visible_rows(k.to(work), key_mask), gamma.to(work), s.to(work)
    if past_s is not None:
        states = torch.cat([past_s.to(work), states], 1)
    states = visible_rows(states, key_mask)
    u = torch.cat([ds.new_zeros(B, P, D, dtype=work), ds.to(work)], 1)
    dq, dk, dgamma = (x.new_zeros(x.shape) for x in (qw, kw, gw))
    block = _block_rows(P + T)
    tile, other = (u.new_empty(B * min(block, T) * (P + T)) for _ in range(2))
    for start in reversed(range(0, T, block)):
        rows = slice(start, min(start + block, T))
        old, new = P + rows.start, P + rows.stop
        weights = _scores(qw[:, rows], kw[:, :new], key_mask, tile)  # (B, n, P+stop)
        weights.sub_(lse[:, rows, None].to(work)).exp_()
        # 1 but for the rounding of lse, which far exceeds that of the weights where lse is large.
        total = weights.sum(-1, keepdim=True)
        total.masked_fill_(total == 0, 1)
        gain = gw[:, rows, None] / total
        ui = _solve_block(weights[:, :, old:] * gain, u[:, old:new], transposed=True)
        u[:, old:new] = ui
        if old:
            u[:, :old].baddbmm_(weights[:, :, :old].mT, ui * gain)
        dS = other[: weights.numel()].view_as(weights)
        torch.bmm(ui, states[:, :new].mT, out=dS).mul_(weights)
        r = dS.sum(-1, keepdim=True) / total
        dgamma[:, rows] = r.squeeze(-1)
        dS.addcmul_(weights, r, value=-1)
        gain = gain * scale
        torch.mul(dS @ kw[:, :new], gain, out=dq[:, rows])
        dk[:, :new].baddbmm_(dS.mT, qw[:, rows] * gain)
    dpast_s = None
    if past_s is not None:
        dpast_s = u[:, :P].to(past_s.dtype, copy=True).contiguous()
    return from_row(u, P, s.dtype), dq.to(q.dtype), dk.to(k.dtype), dgamma.to(gamma.dtype), dpast_s


def _block_rows(keys: int) -> int:
    """Rows of a block.

    Larger blocks make faster products, but half of each diagonal block is masked out.
    """
    return BLOCK if keys < 16 * BLOCK else 2 * BLOCK


def _scores(q: Tensor, k: Tensor, key_mask: Tensor | None, tile: Tensor) -> Tensor:
    """Scores (B, n, m) of n query rows, the last n of m keys being their own; -inf where hidden.

    They are a view of the flat workspace `tile`, whose former content does not matter.
    """
    (B, n, K), m = q.shape, k.shape[1]
    scores = tile[: B * n * m].view(B, n, m).baddbmm_(q, k.mT, beta=0, alpha=K**-0.5)
    hidden = torch.ones(n, n, dtype=torch.bool, device=q.device).triu()
    scores[:, :, m - n :].masked_fill_(hidden, -torch.inf)
    if key_mask is not None:
        scores.masked_fill_(~key_mask[:, None, :m], -torch.inf)
    return scores


def _solve_causally(
    weights: Tensor,  # (B, n, n)
    gain: Tensor,  # (B, n, 1)
    rhs: Tensor,  # (B, n, D)
    visible: Tensor | None,  # (B, n)
) -> Tensor:
    """(I - N)^-1 rhs for N = gain * weights, where no row can spoil the rows before it.

    A row that is not finite is solved as zeros; afterwards it gets its own values back, and the
    rows behind it become NaN unless its key is hidden.
    """
    known = gain.isfinite()
    # Another device would have to be waited for, so only the CPU looks at the values first.
    if rhs.device.type == "cpu" and bool(known.all()) and bool(rhs.sum().isfinite()):
        return _solve_block(weights * gain, rhs)
    rhs = torch.where(known, rhs, torch.nan)
    finite = rhs.isfinite()
    N = torch.where(known, weights * gain, 0)
    solved = _solve_block(N, torch.where(finite, rhs, 0))
    spoils = ~finite if visible is None else ~finite & visible[:, :, None]
    before = spoils.cumsum(1) - spoils.int()
    return torch.where(finite, solved.masked_fill_(before > 0, torch.nan), rhs)


def _solve_block(N: Tensor, rhs: Tensor, *, transposed: bool = False) -> Tensor:
    """(I - N)^-1 rhs, or (I - N)^-T rhs, for strictly lower triangular N (B, n, n)."""
    if rhs.device.type != "cpu":
        return _solve_by_inverse(N, rhs, transposed=transposed)
    # One call instead of twenty products. A solve from the right would read the rows as they lie in
    # memory, but it rounds more often: the error of s - f is four times larger.
    A = -N.mT if transposed else -N
    return torch.linalg.solve_triangular(A, rhs, upper=transposed, unitriangular=True)


def _solve_by_inverse(N: Tensor, rhs: Tensor, *, transposed: bool) -> Tensor:
    """The result of `_solve_block` from matrix products only."""
    # Without the diagonal of ones, small terms are summed before they are added to rhs.
    X = unit_lower_inverse(N) - torch.eye(N.shape[-1], dtype=N.dtype, device=N.device)
    return torch.baddbmm(rhs, X.mT if transposed else X, rhs)


def unit_lower_inverse(N: Tensor) -> Tensor:
    """(I - N)^-1 for strictly lower triangular N (B, n, n), from matrix products only.

    Two neighbouring diagonal blocks with inverses X1 and X2 merge by X2 N21 X1, from single rows
    up. This is as accurate as substitution for gains of any size; powers of N are not, because
    they grow and cancel where |gamma| > 1.
    """
    n, size = N.shape[-1], 1
    while size < n:
        size *= 2
    leaf = min(size, LEAF)
    padded = torch.nn.functional.pad(N, (0, size - n, 0, size - n)) if size > n else N
    blocks = _diagonal_blocks(padded, leaf)  # (B, size / leaf, leaf, leaf)
    X = torch.eye(leaf, dtype=N.dtype, device=N.device).expand_as(blocks)
    half = 1
    while half < leaf:
        # Within a leaf all pairs merge by one product of whole matrices.
        X = X + X @ torch.where(_lower_halves(leaf, half, N.device), blocks, 0) @ X
        half *= 2
    while X.shape[1] > 1:
        half = X.shape[-1]
        low = _diagonal_blocks(padded, 2 * half)[..., half:, :half]
        first, second = X[:, ::2], X[:, 1::2]
        top = torch.cat([first, torch.zeros_like(first)], -1)
        X = torch.cat([top, torch.cat([second @ low @ first, second], -1)], -2)
    return X[:, 0, :n, :n]


def _lower_halves(n: int, half: int, device: torch.device) -> Tensor:
    """True (n, n) in the lower left quarter of every diagonal block of 2 half rows."""
    index = torch.arange(n, device=device) // half
    return (index[:, None] == index + 1) & (index % 2 == 0)


def _diagonal_blocks(N: Tensor, size: int) -> Tensor:
    """The (B, count, size, size) blocks on the diagonal of N (B, count * size, count * size)."""
    B, n, _ = N.shape
    blocks = N.reshape(B, n // size, size, n // size, size)
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)
