"""The feedback solve with Metal kernels: one block row of scores at a time, O(T D) memory.

Products of size T^2 are matrix products of the framework; the row statistics, the solve within a
block row, the gradients of the scores and the decode step are the kernels of
sessa_common/kernels/feedback_solve.metal; docs/metal.md explains this division.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from sessa_torch.feedback import _documents
from sessa_torch.feedback.masking import visible_rows
from sessa_torch.feedback.outputs import from_row

# The same constants as in the Metal text.
BLOCK = 256
THREADS = 128
COLUMNS = 16
CHUNK = 32


STORAGE = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}


def unavailable_reason(f: Tensor, q: Tensor) -> str | None:
    """The reason why the kernels cannot run for these inputs, or None if they can."""
    if not torch.backends.mps.is_available():
        return "PyTorch has no Metal device (MPS) here"
    if f.device.type != "mps":
        return f"f is on {f.device}, the kernels run on mps"
    if not hasattr(torch.mps, "compile_shader"):
        return f"PyTorch {torch.__version__} has no torch.mps.compile_shader (2.6 and later have)"
    for name, tensor in (("f", f), ("q", q)):
        if tensor.dtype not in STORAGE:
            return f"{name} is {tensor.dtype}; the kernels store float32, float16 and bfloat16"
    return None


def solve_forward(
    f: Tensor,  # (B, T, D)
    q: Tensor,  # (B, T, K)
    k: Tensor,  # (B, P+T, K)
    gamma: Tensor,  # (B, T)
    past_s: Tensor | None = None,  # (B, P, D)
    key_mask: Tensor | None = None,  # (B, P+T)
    precision: str = "auto",
    document_starts: Tensor | None = None,  # (B, T)
) -> tuple[Tensor, Tensor]:
    """Solve (I - N) s = f; give s (B, T, D) like f and the log-sum-exp (B, T) of every score row.

    The log-sum-exp is +inf for a row that sees nothing, so that exp(score - lse) is 0 there.
    """
    if document_starts is not None:
        return _documents.solve_forward(
            solve_forward, f, q, k, gamma, document_starts, precision=precision
        )
    (B, T, D), P, dtype = f.shape, k.shape[1] - f.shape[1], f.dtype
    gamma = gamma.float().contiguous()
    if T == 1 and past_s is not None and P:
        return _step(f, q, k, gamma, past_s, key_mask)
    storage = _storage(f, q, precision)
    f = f.to(torch.float32 if storage == torch.float32 else dtype).contiguous()
    key_mask = None if key_mask is None else key_mask.contiguous()
    queries, keys = q.float() * q.shape[-1] ** -0.5, k.float()
    s, lse = f.new_empty(B, T, D), gamma.new_empty(B, T)
    # The states as later rows read them: zero where the key is hidden.
    states = f.new_empty(B, P + T, D, dtype=storage)
    if past_s is not None:
        states[:, :P] = visible_rows(past_s, key_mask)
    for start, stop in _block_rows(T):
        old, new = P + start, P + stop
        scores = queries[:, start:stop] @ keys[:, :new].mT
        weights, coupling, lse[:, start:stop] = _weights(scores, gamma, key_mask, P, start, storage)
        mixed = weights[:, :, :old] @ states[:, :old] if old else None
        for first in range(0, stop - start, BLOCK):
            rows, at = min(BLOCK, stop - start - first), old + first
            carried = [] if mixed is None else [(mixed, first)]
            if first:
                near = weights[:, first : first + rows, old:at]
                carried.append((near @ states[:, old:at], 0))
            mask = None if key_mask is None else (key_mask, at)
            rhs, gains = (f, start + first), (gamma, start + first)
            (x,) = _block(rhs, gains, (coupling, first), carried, mask, rows, storage)
            s[:, at - P : at - P + rows] = x
            visible = None if key_mask is None else key_mask[:, at : at + rows]
            states[:, at : at + rows] = visible_rows(x, visible)
    return s.to(dtype), lse


def solve_backward(
    ds: Tensor,  # (B, T, D)
    q: Tensor,  # (B, T, K)
    k: Tensor,  # (B, P+T, K)
    gamma: Tensor,  # (B, T)
    s: Tensor,  # (B, T, D)
    lse: Tensor,  # (B, T)
    past_s: Tensor | None = None,  # (B, P, D)
    key_mask: Tensor | None = None,  # (B, P+T)
    precision: str = "auto",
    document_starts: Tensor | None = None,  # (B, T)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of f, q, k, gamma and past_s (None without a past) from ds, the gradient of s.

    One sweep from the last block row to the first; `u`, the gradient of f, is kept in float32. The
    row statistics are taken from the scores again, so lse is not read.
    """
    if document_starts is not None:
        tensors = (ds, q, k, gamma, s, lse)
        return _documents.solve_backward(
            solve_backward, *tensors, document_starts, precision=precision
        )
    (B, T, D), P, K = s.shape, k.shape[1] - s.shape[1], q.shape[-1]
    storage = _storage(s, q, precision)
    gains = gamma.float().contiguous()
    visible_k, states = visible_rows(k, key_mask), s.float()
    queries, keys = q.float() * K**-0.5, visible_k.float()
    own_q, own_k = q.to(storage), visible_k.to(storage)
    mask = None if key_mask is None else key_mask.contiguous()
    if past_s is not None:
        states = torch.cat([past_s.float(), states], 1)
    states = visible_rows(states, key_mask)
    u = torch.cat([gains.new_zeros(B, P, D), ds.float()], 1)
    dq, dk, dgamma = (x.new_zeros(x.shape) for x in (queries, keys, gains))
    for start, stop in reversed(_block_rows(T)):
        old, new = P + start, P + stop
        scores = queries[:, start:stop] @ keys[:, :new].mT
        weights, coupling, _ = _weights(scores, gains, mask, P, start, storage)
        pushed = weights.new_empty(B, stop - start, D)
        for first in reversed(range(0, stop - start, BLOCK)):
            rows, at = min(BLOCK, stop - start - first), old + first
            own_gains, own = (gains, start + first), (coupling, first)
            x, scaled = _block((u, at), own_gains, own, [], None, rows, storage, reverse=True)
            u[:, at : at + rows] = x
            pushed[:, first : first + rows] = scaled
            if first:
                _add_product(u[:, old:at], weights[:, first : first + rows, old:at].mT, scaled)
        if old:
            _add_product(u[:, :old], weights[:, :, :old].mT, pushed)
        products = u[:, old:new] @ states[:, :new].mT
        dscores, dgamma[:, start:stop] = _score_grads(weights, products, gains, P, start, K)
        dq[:, start:stop] = dscores @ own_k[:, :new]
        _add_product(dk[:, :new], dscores.mT, own_q[:, start:stop])
    # A custom op's outputs may not share storage, as two slices of one batch element would.
    dpast_s = None if past_s is None else u[:, :P].to(past_s.dtype, copy=True).contiguous()
    return (
        from_row(u, P, s.dtype),
        dq.to(q.dtype),
        dk.to(k.dtype),
        dgamma.to(gamma.dtype),
        dpast_s,
    )


def _block_rows(T: int) -> list[tuple[int, int]]:
    """First and last row of every block row: one block of rows, or two in long sequences."""
    n = BLOCK if T < 16 * BLOCK else 2 * BLOCK
    return [(start, min(start + n, T)) for start in range(0, T, n)]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to the float32 `total` in place."""
    if a.dtype == total.dtype:
        total.baddbmm_(a, b)
    else:
        total += a @ b


def _step(
    f: Tensor, q: Tensor, k: Tensor, gamma: Tensor, past_s: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`solve_forward` for one token, T = 1, in one pass over the P past keys and states."""
    B, P, D = past_s.shape
    chunks = -(-P // CHUNK)
    if past_s.dtype != q.dtype:
        past_s = past_s.float()
    partial, stats = gamma.new_empty(B, chunks, D), gamma.new_empty(B, chunks, 2)
    name = f"step_{STORAGE[q.dtype]}_{STORAGE[past_s.dtype]}_{int(key_mask is not None)}"
    read = [q, k, past_s, q if key_mask is None else key_mask]
    # A cache lies in a larger buffer; its strides go along instead of a copy.
    sizes = [P, q.shape[-1], D, *(stride for array in read for stride in array.stride())]
    _launch(name, [*read, partial, stats], sizes, (chunks, B))
    s, lse = torch.empty_like(f, memory_format=torch.contiguous_format), gamma.new_empty(B, 1)
    merge = [f.contiguous(), gamma.contiguous(), partial, stats, s, lse]
    _launch(f"merge_{STORAGE[f.dtype]}", merge, [chunks, D], (-(-D // 32), B))
    return s, lse


def _weights(
    scores: Tensor,  # (B, n, L)
    gamma: Tensor,  # (B, T)
    key_mask: Tensor | None,  # (B, P+T)
    P: int,
    start: int,
    storage: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """alpha (B, n, L) in `storage`, gamma alpha within blocks (B, n, BLOCK), log-sum-exp (B, n).

    The block row begins at row `start` of gamma.
    """
    B, n, L = scores.shape
    width = min(n, BLOCK)
    weights, coupling = scores.new_empty(B, n, L, dtype=storage), scores.new_empty(B, n, width)
    sums = scores.new_empty(B, n)
    name = f"weights_{STORAGE[storage]}_{int(key_mask is not None)}"
    arrays = [scores, gamma if key_mask is None else key_mask, gamma, weights, coupling, sums]
    sizes = [n, L, P + start, width, gamma.shape[1], start, P + gamma.shape[1]]
    _launch(name, arrays, sizes, (n, B))
    return weights, coupling, sums


# A contiguous tensor (B, rows, ...) and the row from which a kernel reads it.
_Rows = tuple[Tensor, int]


def _block(
    rhs: _Rows,  # (B, ., D)
    gamma: _Rows,  # (B, .)
    coupling: _Rows,  # (B, ., n)
    carried: list[_Rows],  # at most two (B, ., D), the second one from its first row
    key_mask: _Rows | None,  # (B, .)
    rows: int,
    storage: torch.dtype,
    *,
    reverse: bool = False,
) -> list[Tensor]:
    """[(I - N)^-1 (rhs + gamma carried)], (B, rows, D) like rhs.

    In reverse [x, gamma x in `storage`] for x = (I - N^T)^-1 rhs.
    """
    B, _, D = rhs[0].shape
    # What is not given is not read; any tensor can stand for it.
    operands = [rhs, gamma, coupling, (carried or [gamma])[0], key_mask or gamma]
    sizes = [rows, D, coupling[0].shape[2]]
    for tensor, first in operands:
        sizes += [tensor.shape[1], first]
    added = carried[1][0] if len(carried) > 1 else gamma[0]
    x = rhs[0].new_empty(B, rows, D)
    outputs = [x, x.new_empty(B, rows, D, dtype=storage)] if reverse else [x]
    kinds = f"{int(reverse)}{len(carried)}{int(key_mask is not None)}"
    name = f"block_{STORAGE[x.dtype]}_{STORAGE[storage]}_{kinds}"
    arrays = [rhs[0], gamma[0], operands[3][0], added, coupling[0], operands[4][0], x]
    arrays.append(outputs[-1] if reverse else gamma[0])
    _launch(name, arrays, sizes, (-(-D // COLUMNS), B))
    return outputs


def _score_grads(
    weights: Tensor, products: Tensor, gamma: Tensor, P: int, start: int, K: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the products q k^T (B, n, L), in the dtype of weights, and of gamma (B, n)."""
    B, n, L = weights.shape
    dscores, dgamma = torch.empty_like(weights), gamma.new_empty(B, n)
    arrays = [weights, products, gamma, dscores, dgamma]
    sizes = [n, L, P + start, K, gamma.shape[1], start]
    _launch(f"score_grads_{STORAGE[weights.dtype]}", arrays, sizes, (n, B))
    return dscores, dgamma


def _storage(f: Tensor, q: Tensor, precision: str) -> torch.dtype:
    """Type of the weights and states that are multiplied; sums and s stay float32.

    A cache keeps f and the states of a model of 16 bits in float32, and q tells the type.
    """
    halves = [x.dtype for x in (f, q) if x.dtype != torch.float32]
    if precision == "bfloat16":
        return (halves or [torch.bfloat16])[0]
    return halves[0] if precision == "auto" and q.dtype in halves else torch.float32


@cache
def _library() -> Any:
    text = files("sessa_common").joinpath("kernels/feedback_solve.metal").read_text("ascii")
    return torch.mps.compile_shader(text)


def _launch(name: str, arrays: list[Tensor], sizes: list[int], groups: tuple[int, int]) -> None:
    """Run kernel feedback_`name` on groups[0] x groups[1] threadgroups.

    The kernel gets the memory of an array from its first element on, and not its strides.
    """
    kernel = getattr(_library(), f"feedback_{name}")
    kernel(*arrays, sizes, threads=[groups[0] * THREADS, groups[1]], group_size=[THREADS, 1])
