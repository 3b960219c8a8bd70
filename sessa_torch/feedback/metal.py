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
) -> tuple[Tensor, Tensor]:
    """Solve (I - N) s = f; give s (B, T, D) like f and the log-sum-exp (B, T) of every score row.

    The log-sum-exp is +inf for a row that sees nothing, so that exp(score - lse) is 0 there.
    """
    B, T, D = f.shape
    P = k.shape[1] - T
    gamma = gamma.float()
    if T == 1 and past_s is not None and P:
        return _step(f, q, k, gamma, past_s, key_mask)
    storage = _storage(f, q)
    queries, keys = q.float() * q.shape[-1] ** -0.5, k.float()
    s, lse = f.new_empty(B, T, D), gamma.new_empty(B, T)
    # The states as later rows read them: zero where the key is hidden.
    states = f.new_empty(B, P + T, D, dtype=storage)
    if past_s is not None:
        states[:, :P] = visible_rows(past_s, key_mask)
    for start in range(0, T, BLOCK):
        rows = slice(start, min(start + BLOCK, T))
        old, new = P + rows.start, P + rows.stop
        gain, scores = gamma[:, rows].contiguous(), queries[:, rows] @ keys[:, :new].mT
        weights, coupling, lse[:, rows] = _weights(scores, gain, key_mask, storage)
        carried = weights[:, :, :old] @ states[:, :old] if old else None
        visible = None if key_mask is None else key_mask[:, old:new]
        solved = _block(f[:, rows].to(storage), gain, carried, coupling, visible)
        s[:, rows], states[:, old:new] = solved, visible_rows(solved, visible)
    return s, lse


def solve_backward(
    ds: Tensor,  # (B, T, D)
    q: Tensor,  # (B, T, K)
    k: Tensor,  # (B, P+T, K)
    gamma: Tensor,  # (B, T)
    s: Tensor,  # (B, T, D)
    lse: Tensor,  # (B, T)
    past_s: Tensor | None = None,  # (B, P, D)
    key_mask: Tensor | None = None,  # (B, P+T)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of f, q, k, gamma and past_s (None without a past) from ds, the gradient of s.

    One sweep from the last block row to the first; `u`, the gradient of f, is kept in float32. The
    row statistics are taken from the scores again, so lse is not read.
    """
    B, T, D = s.shape
    P = k.shape[1] - T
    storage = _storage(s, q)
    scale, gw = q.shape[-1] ** -0.5, gamma.float()
    k = visible_rows(k, key_mask)
    queries, keys, states = q.float() * scale, k.float(), s.float()
    if past_s is not None:
        states = torch.cat([past_s.float(), states], 1)
    states = visible_rows(states, key_mask)
    u = torch.cat([gw.new_zeros(B, P, D), ds.float()], 1)
    dq, dk, dgamma = (x.new_zeros(x.shape) for x in (queries, keys, gw))
    for start in reversed(range(0, T, BLOCK)):
        rows = slice(start, min(start + BLOCK, T))
        old, new = P + rows.start, P + rows.stop
        gain, scores = gw[:, rows].contiguous(), queries[:, rows] @ keys[:, :new].mT
        weights, coupling, _ = _weights(scores, gain, key_mask, storage)
        ui = _block(u[:, old:new], gain, None, coupling, None, reverse=True)
        u[:, old:new] = ui
        if old:
            u[:, :old] += weights[:, :, :old].mT @ (ui * gain[..., None]).to(storage)
        products = ui @ states[:, :new].mT
        dscores, dgamma[:, rows] = _score_grads(weights, products, gain)
        dq[:, rows] = (dscores @ k[:, :new].to(storage)) * scale
        dk[:, :new] += dscores.mT @ q[:, rows].to(storage)
    # A custom op's outputs may not share storage, as two slices of one batch element would.
    dpast_s = None if past_s is None else u[:, :P].to(past_s.dtype, copy=True).contiguous()
    df, dk = from_row(u, P, s.dtype), (dk * scale).to(k.dtype)
    return df, dq.to(q.dtype), dk, dgamma.to(gamma.dtype), dpast_s


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
    read = [q, k, past_s, _no_mask(q) if key_mask is None else key_mask]
    # A cache lies in a larger buffer; its strides go along instead of a copy.
    sizes = [P, q.shape[-1], D, *(stride for array in read for stride in array.stride())]
    _launch(name, [*read, partial, stats], sizes, (chunks, B))
    s, lse = torch.empty_like(f, memory_format=torch.contiguous_format), gamma.new_empty(B, 1)
    merge = [f.contiguous(), gamma.contiguous(), partial, stats, s, lse]
    _launch(f"merge_{STORAGE[f.dtype]}", merge, [chunks, D], (-(-D // 32), B))
    return s, lse


def _weights(
    scores: Tensor,  # (B, n, L)
    gamma: Tensor,  # (B, n)
    key_mask: Tensor | None,  # (B, P+T)
    storage: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """alpha (B, n, L) in `storage`, gamma alpha of the own block (B, n, n), log-sum-exp (B, n)."""
    B, n, L = scores.shape
    weights, coupling = scores.new_empty(B, n, L, dtype=storage), scores.new_empty(B, n, n)
    sums = scores.new_empty(B, n)
    name = f"weights_{STORAGE[storage]}_{int(key_mask is not None)}"
    mask = _no_mask(scores) if key_mask is None else key_mask[:, :L].contiguous()
    arrays = [scores, mask, gamma, weights, coupling, sums]
    _launch(name, arrays, [n, L], (n, B))
    return weights, coupling, sums


def _block(
    rhs: Tensor,  # (B, n, D)
    gamma: Tensor,  # (B, n)
    carried: Tensor | None,  # (B, n, D)
    coupling: Tensor,  # (B, n, n)
    visible: Tensor | None,  # (B, n)
    *,
    reverse: bool = False,
) -> Tensor:
    """(I - N)^-1 (rhs + gamma carried), or (I - N^T)^-1 rhs in reverse, in the dtype of rhs."""
    B, n, D = rhs.shape
    rhs = rhs.contiguous()
    x = torch.empty_like(rhs)
    given = int(carried is not None), int(visible is not None)
    name = f"block_{STORAGE[rhs.dtype]}_{int(reverse)}{given[0]}{given[1]}"
    mask = _no_mask(rhs) if visible is None else visible.contiguous()
    arrays = [rhs, gamma, rhs if carried is None else carried, coupling, mask, x]
    _launch(name, arrays, [n, D], (-(-D // COLUMNS), B))
    return x


def _score_grads(weights: Tensor, products: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the scores (B, n, L), in the dtype of weights, and of gamma (B, n)."""
    B, n, L = weights.shape
    dscores, dgamma = torch.empty_like(weights), gamma.new_empty(B, n)
    arrays = [weights, products, gamma, dscores, dgamma]
    _launch(f"score_grads_{STORAGE[weights.dtype]}", arrays, [n, L], (n, B))
    return dscores, dgamma


def _storage(f: Tensor, q: Tensor) -> torch.dtype:
    """The type of weights and states: float32 if f and q differ, as in decoding in bfloat16."""
    return f.dtype if f.dtype == q.dtype else torch.float32


def _no_mask(like: Tensor) -> Tensor:
    """A placeholder for the mask that a kernel without a mask never reads."""
    return like.new_zeros(1, dtype=torch.bool)


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
