"""Causal attention in O(T) memory, forward and backward, by blocks of query rows.

MLX computes the gradient of its fused attention with matrices of T x T scores on Metal and on the
CPU. Here the forward pass is the fused kernel where there is one, and the backward pass computes
the scores again, one block of rows at a time, for the keys that these rows see. On CUDA, where MLX
has a fused backward kernel (cuDNN), that one is used. For documents it takes a mask of T x T
numbers in 16 bits, which all layers share, up to MOST_MASK numbers.

Letters: B batch, T time, P past, S = P + T, H heads, G key/value heads, K width of queries and
keys, d width of values.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import mlx.core as mx

from sessa_mlx._exp import softmax
from sessa_mlx._operator import Operator

# Up to so many rows MLX takes its kernels for decoding, and T x T is small.
FEW_ROWS = 8
# Widths of Metal's fused kernel for more rows.
METAL_WIDTHS = (64, 72, 80, 96, 128, 192, 256)
# Rows of a block on the CPU and on a GPU. The scores of a block have at most MOST_SCORES numbers,
# unless LEAST_ROWS have more.
ROWS = {mx.DeviceType.cpu: 64, mx.DeviceType.gpu: 256}
LEAST_ROWS = 32
MOST_SCORES = 2**24
# The keys of a block end where its segment of the rows ends. Few segments keep the sizes of the
# buffers few, so that MLX can reuse them, and waste an eighth of the products.
SEGMENTS = 4
# Numbers of a mask for cuDNN: half a gibibyte.
MOST_MASK = 2**28


def attend(
    q: mx.array,  # (B, H, T, K)
    k: mx.array,  # (B, G, S, K)
    v: mx.array,  # (B, G, S, d)
    key_mask: mx.array | None = None,  # (B, S)
    document_starts: mx.array | None = None,  # (B, T)
) -> mx.array:
    """Softmax attention over keys j <= P + t, scale K^-1/2; (B, H, T, d) in the dtype of q.

    Every query sees itself, whatever key_mask says. Hidden keys and values must be finite. With
    document_starts, which go with neither a past nor a mask, no key before the first row of the own
    document is seen.
    """
    T, S = q.shape[2], k.shape[2]
    optional = {"key_mask": key_mask, "document_starts": document_starts}
    given = {name: array for name, array in optional.items() if array is not None}
    if document_starts is not None and key_mask is None and _takes_mask(q, v):
        return _under_mask(q, k, v, document_starts)
    if T > FEW_ROWS and (given or not _has_fused_gradient(q, v)):
        return _operator(tuple(given))(q, k, v, *given.values())[0]
    mask: mx.array | str | None = "causal" if T > 1 else None
    if given:
        mask = _visible(S - T, slice(0, T), slice(0, S), **optional)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=_scale(q), mask=mask)


def _has_fused_gradient(q: mx.array, v: mx.array) -> bool:
    """Return True where MLX's own attention has a fused backward kernel."""
    return _cudnn_takes(q, v) and q.shape[2] % 128 == 0


def _takes_mask(q: mx.array, v: mx.array) -> bool:
    """Return True where MLX's own attention has a fused backward kernel for a mask of documents."""
    fits = q.shape[0] * q.shape[2] ** 2 <= MOST_MASK
    return fits and _has_fused_gradient(q, v) and _masks_work(q.dtype)


@cache
def _masks_work(dtype: mx.Dtype) -> bool:
    """Try cuDNN with a mask that heads share: it says only when called whether it takes one."""
    shape, starts = (2, 2, 128, 64), mx.array([[0] * 128, [0] * 50 + [50] * 78])
    q, k, v, down = (mx.random.normal(shape, key=mx.random.key(i)).astype(dtype) for i in range(4))
    try:
        outputs, found = mx.vjp(lambda *x: _under_mask(x[0], x[1], x[2], starts), [q, k, v], [down])
        wanted = attention_backward(down, q, k, v, outputs[0], document_starts=starts)
        errors = [mx.abs(a - b).max() / mx.abs(b).max() for a, b in zip(found, wanted, strict=True)]
        return all(bool(error < 0.05) for error in errors)
    except RuntimeError:
        return False


def _under_mask(
    q: mx.array,  # (B, H, T, K)
    k: mx.array,  # (B, G, T, K)
    v: mx.array,  # (B, G, T, d)
    document_starts: mx.array,  # (B, T)
) -> mx.array:
    """Return the attention (B, H, T, d) by the fused kernel, with a mask added to the scores."""
    # All of it depends on document_starts, so that mx.compile keeps one mask for all layers.
    rows = mx.cumsum(mx.ones_like(document_starts), 1) - 1
    columns = rows[:, None]
    visible = (columns <= rows[..., None]) & (columns >= document_starts[..., None])
    mask = mx.where(visible[:, None], 0, -mx.inf).astype(q.dtype)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=_scale(q), mask=mask)


def _has_fused_forward(q: mx.array, v: mx.array) -> bool:
    """Return True where MLX has a fused kernel for more than FEW_ROWS rows of these widths."""
    metal = _on_gpu() and mx.metal.is_available() and q.dtype != mx.float64
    fits = q.shape[-1] == v.shape[-1] and q.shape[-1] in METAL_WIDTHS
    return (metal and fits) or _cudnn_takes(q, v)


def _cudnn_takes(q: mx.array, v: mx.array) -> bool:
    fits = all(width % 8 == 0 and width <= 128 for width in (q.shape[-1], v.shape[-1]))
    half = q.dtype in (mx.float16, mx.bfloat16)
    return _on_gpu() and mx.cuda.is_available() and fits and half


def _on_gpu() -> bool:
    return mx.default_device().type == mx.DeviceType.gpu


def _scale(q: mx.array) -> float:
    return float(q.shape[-1] ** -0.5)


@cache
def _operator(given: tuple[str, ...]) -> Operator:
    """The differentiable operator over q, k, v and the optional arrays of these names."""

    def forward(*arrays: mx.array) -> tuple[mx.array]:
        return (attention_forward(*arrays[:3], **dict(zip(given, arrays[3:], strict=True))),)

    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        q, k, v, *rest = primals
        optional = dict(zip(given, rest, strict=True))
        gradients = attention_backward(cotangents[0], q, k, v, outputs[0], **optional)
        return (*gradients, *map(mx.zeros_like, rest))

    return Operator(forward, backward)


def attention_forward(
    q: mx.array,  # (B, H, T, K)
    k: mx.array,  # (B, G, S, K)
    v: mx.array,  # (B, G, S, d)
    key_mask: mx.array | None = None,  # (B, S)
    document_starts: mx.array | None = None,  # (B, T)
) -> mx.array:
    """Return the attention (B, H, T, d), by the fused kernel on Metal and by blocks elsewhere."""
    fused = _has_fused_forward(q, v)
    if fused and key_mask is None and document_starts is None:
        return _fused(q, k, v, "causal")
    past = k.shape[2] - q.shape[2]
    out: list[mx.array] = []
    for segment, rows in _blocks(q, k):
        keys = slice(0, past + segment.stop)
        own = mx.depends(q[:, :, rows], out[-1:])
        if fused:
            visible = _visible(past, rows, keys, key_mask, document_starts)
            out.append(_fused(own, k[:, :, keys], v[:, :, keys], visible))
            continue
        weights = _weights(own, k[:, :, keys], past, rows, key_mask, document_starts)
        values = v[:, :, keys].astype(weights.dtype)
        out.append(_heads(weights @ values, q.shape[1]).astype(q.dtype))
    return mx.concatenate(out, 2)


def attention_backward(
    dout: mx.array,  # (B, H, T, d)
    q: mx.array,  # (B, H, T, K)
    k: mx.array,  # (B, G, S, K)
    v: mx.array,  # (B, G, S, d)
    out: mx.array,  # (B, H, T, d)
    key_mask: mx.array | None = None,  # (B, S)
    document_starts: mx.array | None = None,  # (B, T)
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the gradients of q, k and v, from the last block of rows to the first.

    With p the weights of a row, dp = dout v^T and r = <dout, out>, the gradient of its scores is
    p (dp - r). Sums over blocks are float32; products have operands in the dtype of q.
    """
    G, past, work = k.shape[1], k.shape[2] - q.shape[2], _work(q)
    storage = q.dtype if _on_gpu() else work
    dk, dv = mx.zeros(k.shape, work), mx.zeros(v.shape, work)
    dq: list[mx.array] = []
    finished: list[tuple[mx.array, mx.array]] = []
    segment = None
    for next_segment, rows in reversed(list(_blocks(q, k))):
        if segment is not None and next_segment != segment:
            # No row that is left sees the keys of the segment that is done.
            stop = past + next_segment.stop
            finished.insert(0, (dk[:, :, stop:], dv[:, :, stop:]))
            dk, dv = dk[:, :, :stop], dv[:, :, :stop]
        segment = next_segment
        keys = slice(0, past + segment.stop)
        own = mx.depends(q[:, :, rows], [dk, dv, *dq[:1]])
        weights = _weights(own, k[:, :, keys], past, rows, key_mask, document_starts)
        down = dout[:, :, rows]
        r = (down.astype(work) * out[:, :, rows].astype(work)).sum(-1, keepdims=True)
        down = _groups(down, G).astype(storage)
        dp = down @ v[:, :, keys].astype(storage).swapaxes(2, 3)
        dscores = (weights * (dp - _groups(r, G)) * _scale(q)).astype(storage)
        dq.insert(0, _heads(dscores @ k[:, :, keys].astype(storage), q.shape[1]).astype(q.dtype))
        dk = dk + dscores.swapaxes(2, 3) @ _groups(own, G).astype(storage)
        dv = dv + weights.astype(storage).swapaxes(2, 3) @ down
    finished.insert(0, (dk, dv))
    dk, dv = (mx.concatenate(list(parts), 2) for parts in zip(*finished, strict=True))
    return mx.concatenate(dq, 2), dk.astype(k.dtype), dv.astype(v.dtype)


def _blocks(q: mx.array, k: mx.array) -> Iterator[tuple[slice, slice]]:
    """Yield every block of query rows, after the segment of the rows that it lies in."""
    B, H, T, _ = q.shape
    most = ROWS[mx.default_device().type]
    fitting = MOST_SCORES // (B * H * k.shape[2]) // LEAST_ROWS * LEAST_ROWS
    size = max(LEAST_ROWS, min(most, fitting))
    length = -(-T // (SEGMENTS * size)) * size
    for start in range(0, T, length):
        segment = slice(start, min(start + length, T))
        for first in range(start, segment.stop, size):
            yield segment, slice(first, min(first + size, segment.stop))


def _weights(
    q: mx.array,  # (B, H, n, K)
    k: mx.array,  # (B, G, L, K)
    past: int,
    rows: slice,
    key_mask: mx.array | None,
    document_starts: mx.array | None,
) -> mx.array:
    """Return the softmax weights (B, G, H/G n, L) of query rows over the first L keys."""
    work = _work(q)
    queries = _groups(q.astype(work) * _scale(q), k.shape[1])
    scores = queries @ k.astype(work).swapaxes(2, 3)
    B, G, _, L = scores.shape
    visible = _visible(past, rows, slice(0, L), key_mask, document_starts)
    visible = visible[:, :, None]  # (B or 1, 1, 1, n, L)
    scores = mx.where(visible, scores.reshape(B, G, -1, q.shape[2], L), -mx.inf)
    return softmax(scores.reshape(B, G, -1, L))


def _visible(
    past: int,
    rows: slice,
    keys: slice,
    key_mask: mx.array | None,
    document_starts: mx.array | None,
) -> mx.array:
    """Return True (B or 1, 1, n, L) where a row sees a key: itself and visible keys before it."""
    row = mx.arange(past + rows.start, past + rows.stop)[:, None]
    column = mx.arange(keys.stop)
    visible = (column <= row)[None, None]
    if document_starts is not None:
        visible = visible & (column >= document_starts[:, None, rows, None])
    if key_mask is None:
        return visible
    return visible & (key_mask[:, None, None, : keys.stop] | (column == row))


def _fused(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str) -> mx.array:
    return mx.fast.scaled_dot_product_attention(
        q, k, v, scale=_scale(q), mask=mask, force_fused=True
    )


def _groups(x: mx.array, G: int) -> mx.array:
    """Heads (B, H, n, d) with the rows of the heads that share keys behind each other."""
    B, _, _, d = x.shape
    return x.reshape(B, G, -1, d)


def _heads(x: mx.array, H: int) -> mx.array:
    """Rows (B, G, H/G n, d) as heads (B, H, n, d)."""
    B, _, _, d = x.shape
    return x.reshape(B, H, -1, d)


def _work(q: mx.array) -> mx.Dtype:
    return mx.float64 if q.dtype == mx.float64 else mx.float32
