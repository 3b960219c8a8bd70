"""The feedback solve on a GPU in framework operations: few and large ones, as on CUDA.

The sums of all score rows come first. With them the inverses of all diagonal blocks are one batch,
and a block row is left with two large products and the product with its inverse. `blocked` computes
every score once, which a CPU prefers, and inverts one block after the other.

Weights, states and score gradients have 16 bits in a model of 16 bits. Scores and u s^T are float32
products; 16-bit operands are exact in them even in TF32. Nothing of size T x T exists, and arrays
that grow with the row have a few sizes, so that MLX uses their memory again.
"""

from __future__ import annotations

import mlx.core as mx

from sessa_mlx.feedback.masking import visible_rows
from sessa_mlx.feedback.products import (
    add_product,
    diagonal_blocks,
    fused,
    identity,
    lower_halves,
    product,
    storage_type,
)

LEAF = 128  # rows of a diagonal block that products of whole matrices invert


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
    """Solve (I - N) s = f; give s (B, T, D) like f and the sums (B, T, 2) of every score row.

    The sums are a shift and the sum of exp(score - shift), which is 0 for a row that sees nothing.
    """
    (B, T, _), storage = f.shape, storage_type(f, q, precision)
    if T == 1:
        return _step(f, q, k, gamma, past_s, key_mask)
    rows = _BlockRows(q, k, key_mask, document_starts, storage)
    own_scores = rows.own_scores()
    shift, total = _row_sums(rows, own_scores)
    gain = fused(_gain)(rows.padded(gamma)[..., None], total)
    inverse = rows.inverse(own_scores, shift, gain)
    # The states as later rows read them: zero where the key is hidden or the row is not solved.
    states = mx.zeros((B, rows.count * rows.block, f.shape[2]), storage)
    if past_s is not None:
        states = mx.concatenate([visible_rows(past_s, key_mask).astype(storage), states], 1)
    f, s = rows.padded(f), []
    for i in range(rows.count):
        span, old = rows.span(i), rows.past + i * rows.block
        mixed = []
        if old:
            scores, visible = rows.scores(i, states, earlier=True)
            weights = fused(_weights, rows.scale, storage)(scores, shift[:, span], *visible)
            mixed = [product(weights, states[:, : weights.shape[-1]], storage)]
        shown = rows.shown(i)
        rhs, finite_rhs, broken = fused(_right_side)(f[:, span], gain[:, span], *shown, *mixed)
        change = product(inverse[:, i], finite_rhs, storage)
        first = broken.min(1, keepdims=True)
        solved, read = fused(_solved, f.dtype, storage)(rhs, change, first, *shown)
        s.append(solved)
        if i + 1 < rows.count:
            states[:, old : old + rows.block] = read
    return mx.concatenate(s, 1)[:, :T], mx.concatenate([shift, total], -1)[:, :T]


def solve_backward(
    ds: mx.array,  # (B, T, D)
    q: mx.array,  # (B, T, K)
    k: mx.array,  # (B, P+T, K)
    gamma: mx.array,  # (B, T)
    s: mx.array,  # (B, T, D)
    sums: mx.array,  # (B, T, 2)
    past_s: mx.array | None = None,  # (B, P, D)
    key_mask: mx.array | None = None,  # (B, P+T)
    precision: str = "auto",
    document_starts: mx.array | None = None,  # (B, T)
) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array | None]:
    """Gradients of f, q, k, gamma and past_s (None without a past) from ds, the gradient of s.

    One sweep from the last block row to the first, as in `blocked`. What a block row adds to u also
    reaches its own rows and padding, which nothing reads again.
    """
    T, storage = s.shape[1], storage_type(s, q, precision)
    rows = _BlockRows(q, visible_rows(k, key_mask), key_mask, document_starts, storage)
    shift, total = (rows.padded(x) for x in (sums[..., :1], sums[..., 1:]))
    gain = fused(_gain)(rows.padded(gamma)[..., None], total)
    inverse = rows.inverse(rows.own_scores(), shift, gain)
    states, u = (rows.padded(x).astype(mx.float32) for x in (s, ds))
    if past_s is not None:
        states = mx.concatenate([past_s.astype(mx.float32), states], 1)
        u = mx.concatenate([mx.zeros(past_s.shape), u], 1)
    states = visible_rows(states, rows.key_mask)
    dk: list[mx.array] = []  # the sum for the rows that are not done, from the first one on
    found: dict[str, list[mx.array]] = {"f": [], "q": [], "k": [], "gamma": []}
    for i in reversed(range(rows.count)):
        span, old, new = rows.span(i), rows.past + i * rows.block, rows.past + (i + 1) * rows.block
        scores, visible = rows.scores(i, [u, *dk, *found["q"][-1:]])
        weights = fused(_weights, rows.scale, storage)(scores, shift[:, span], *visible)
        L = weights.shape[-1]
        change = product(inverse[:, i].swapaxes(1, 2), u[:, old:new], storage)
        ui, pushed = fused(_reversed_rows, storage)(u[:, old:new], change, gain[:, span])
        if old:
            u = add_product(u[:, :L], weights.swapaxes(1, 2), pushed, storage)
        products = product(ui, states[:, :L].swapaxes(1, 2), storage)
        r = fused(_times)(weights, products).sum(-1, keepdims=True)
        slopes, dgamma = fused(_score_grads, rows.scale, storage)(
            weights, products, r, total[:, span], gain[:, span]
        )
        operands = slopes.swapaxes(1, 2), rows.q[:, span].astype(storage), storage
        dk = [add_product(x[:, :L], *operands) for x in dk] or [product(*operands)]
        found["f"].append(ui.astype(s.dtype))
        found["q"].append(product(slopes, rows.k[:, :L].astype(storage), storage).astype(q.dtype))
        found["k"].append(dk[0][:, old if i else 0 : new].astype(k.dtype))
        found["gamma"].append(dgamma)
    df, dq, dk_all, dgamma = (mx.concatenate(x[::-1], 1) for x in found.values())
    dpast_s = None if past_s is None else u[:, : rows.past].astype(past_s.dtype)
    dgamma = dgamma[:, :T, 0].astype(gamma.dtype)
    return df[:, :T], dq[:, :T], dk_all[:, : rows.past + T], dgamma, dpast_s


class _BlockRows:
    """Scores of block rows of n rows, for both passes.

    T is padded to whole block rows by rows that none sees.
    """

    def __init__(
        self,
        q: mx.array,
        k: mx.array,
        key_mask: mx.array | None,
        document_starts: mx.array | None,
        storage: mx.Dtype,
    ) -> None:
        T, K = q.shape[1:]
        self.past, self.scale, self.storage = k.shape[1] - T, K**-0.5, storage
        self.count = -(-T // _block_rows(T))
        self.block = -(-T // self.count)
        if self.count > 1:
            self.block = -(-self.block // 8) * 8
        self.padding = self.count * self.block - T
        self.q, self.k = self.padded(q), self.padded(k)
        self.queries, self.keys = self.q.astype(mx.float32), self.k.astype(mx.float32)
        self.key_mask = None if key_mask is None else self.padded(key_mask)
        self.starts = None if document_starts is None else self.padded(document_starts)
        self.columns = mx.arange(self.past + self.count * self.block)

    def padded(self, x: mx.array) -> mx.array:
        """x (B, T, ...) with zeros behind its rows, up to whole block rows."""
        widths = [(0, 0), (0, self.padding)] + [(0, 0)] * (x.ndim - 2)
        return mx.pad(x, widths) if self.padding else x

    def span(self, i: int) -> slice:
        """The rows of block row i, counted without the past."""
        return slice(i * self.block, (i + 1) * self.block)

    def scores(
        self, i: int, after: mx.array | list[mx.array], *, earlier: bool = False
    ) -> tuple[mx.array, list[mx.array]]:
        """Products (B, n, L) of block row i and its keys, or earlier ones; what `_visible` takes.

        Without `after` MLX would compute the scores of every block row first.
        """
        blocks = i if earlier else i + 1
        # One of the sizes 1, 2, 3, 4, 6, 8, 12, ...
        step = 2 ** max((blocks - 1).bit_length() - 2, 0) if blocks else 1
        L = min(self.past + -(-blocks // step) * step * self.block, self.columns.size)
        queries = mx.depends(self.queries[:, self.span(i)], after)
        scores = product(queries, self.keys[:, :L].swapaxes(1, 2), self.storage)
        own = self.past + i * self.block
        # A row sees the keys before it, or those before the block row.
        limit = self.columns[own : own + (1 if earlier else self.block), None]
        shown = [] if self.key_mask is None else [self.key_mask[:, None, :L]]
        if self.starts is not None:
            shown = [self.columns[:L] >= self.starts[:, self.span(i), None]]
        return scores, [self.columns[:L], limit, *shown]

    def own_scores(self) -> mx.array:
        """Scores (B, count, n, n) of the diagonal blocks, -inf where a key is not seen."""
        q, k = self._blocks(self.queries), self._blocks(self.keys[:, self.past :])
        index, shown = self.columns[: self.block], []
        if self.key_mask is not None:
            shown = [self._blocks(self.key_mask[:, self.past :])[:, :, None]]
        if self.starts is not None:
            columns = self._blocks(self.columns[None])[:, :, None]
            shown = [columns >= self._blocks(self.starts)[..., None]]
        scores = product(q, k.swapaxes(2, 3), self.storage)
        return fused(_seen_scores, self.scale)(scores, index, index[:, None], *shown)

    def inverse(self, own_scores: mx.array, shift: mx.array, gain: mx.array) -> mx.array:
        """(I - N)^-1 - I (B, count, n, n) of the diagonal blocks; see `_coupling`."""
        N = fused(_coupling)(own_scores, self._blocks(shift), self._blocks(gain))
        return _inverse(N.reshape(-1, self.block, self.block), self.storage).reshape(N.shape)

    def shown(self, i: int) -> list[mx.array]:
        """Index (n, 1) of the rows of block row i, and which of them (B, n, 1) are not hidden."""
        index = self.columns[: self.block, None]
        if self.key_mask is None:
            return [index, mx.array(True)]
        own = self.past + i * self.block
        return [index, self.key_mask[:, own : own + self.block, None]]

    def _blocks(self, x: mx.array) -> mx.array:
        return x.reshape(x.shape[0], self.count, self.block, *x.shape[2:])


def _block_rows(T: int) -> int:
    """Rows of a block row: larger ones take fewer launches and more work on the diagonal."""
    return next((n for n, least in ((1024, 8192), (512, 2048)) if least <= T), 256)


def _row_sums(rows: _BlockRows, own_scores: mx.array) -> tuple[mx.array, mx.array]:
    """A shift and the sum of exp(score - shift) of every row, both (B, T, 1)."""
    B, _, n, _ = own_scores.shape
    parts = [_sums(own_scores, rows.storage)]
    own = [x.reshape(B, -1, 1) for x in parts[0]]
    earlier: list[list[mx.array]] = [[] for _ in own]
    for i in range(rows.count):
        old = rows.past + i * n
        part = [mx.full((B, n, 1), x) for x in (-mx.inf, 0.0)[: len(own)]]
        if old:
            scores, visible = rows.scores(i, [x[-1] for x in earlier if x], earlier=True)
            part = _sums(fused(_seen_scores, rows.scale)(scores, *visible), rows.storage)
        for found, x in zip(earlier, part, strict=True):
            found.append(x)
    return fused(_joined_sums)(*own, *(mx.concatenate(x, 1) for x in earlier))


def _sums(scores: mx.array, storage: mx.Dtype) -> list[mx.array]:
    """The maximum and the sum of exp(score - maximum) of rows of scores; or their log-sum-exp.

    The rounding of the logarithm would cost float32 digits.
    """
    if storage != mx.float32:
        return [mx.logsumexp(scores, -1, keepdims=True)]
    top = scores.max(-1, keepdims=True)
    return [top, fused(_shifted)(scores, top).sum(-1, keepdims=True)]


def _step(
    f: mx.array,
    q: mx.array,
    k: mx.array,
    gamma: mx.array,
    past_s: mx.array | None,
    key_mask: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """`solve_forward` for one token, T = 1, in float32: memory takes all of its time."""
    P = k.shape[1] - 1
    if past_s is None or P == 0:
        return f, mx.zeros((f.shape[0], 1, 2))
    queries, keys = q.astype(mx.float32) * q.shape[-1] ** -0.5, k[:, :P].astype(mx.float32)
    scores = queries @ keys.swapaxes(1, 2)
    if key_mask is not None:
        scores = mx.where(key_mask[:, None, :P], scores, -mx.inf)
    top = mx.maximum(scores.max(-1, keepdims=True), mx.finfo(mx.float32).min)
    weights = fused(_shifted)(scores, top)
    total = weights.sum(-1, keepdims=True)
    mixed = weights @ visible_rows(past_s.astype(mx.float32), key_mask)
    s = fused(_stepped, f.dtype)(f, mixed, total, gamma[..., None])
    return s, mx.concatenate([top, total], -1)


def _inverse(N: mx.array, storage: mx.Dtype) -> mx.array:
    """(I - N)^-1 - I for strictly lower triangular N (M, n, n): `unit_lower_inverse`, batched."""
    n, size = N.shape[-1], 1
    while size < n:
        size *= 2
    leaf = min(size, LEAF)
    padded = mx.pad(N, [(0, 0), (0, size - n), (0, size - n)]) if size > n else N
    blocks = diagonal_blocks(padded, leaf)
    X = mx.broadcast_to(identity(leaf), blocks.shape)
    half = 1
    while half < leaf:
        low = mx.where(lower_halves(leaf, half), blocks, 0)
        X = X + product(product(X, low, storage), X, storage)
        half *= 2
    while X.shape[1] > 1:
        half = X.shape[-1]
        low = diagonal_blocks(padded, 2 * half)[..., half:, :half]
        first, second = X[:, ::2], X[:, 1::2]
        corner = product(product(second, low, storage), first, storage)
        top = mx.concatenate([first, mx.zeros_like(first)], -1)
        X = mx.concatenate([top, mx.concatenate([corner, second], -1)], -2)
    return X[:, 0, :n, :n] - identity(n)


def _visible(columns: mx.array, limit: mx.array, *shown: mx.array) -> mx.array:
    """True where a row sees a column: before its limit, shown by the mask, in its document."""
    visible = columns < limit
    return visible & shown[0] if shown else visible


def _seen_scores(scale: float, scores: mx.array, *visible: mx.array) -> mx.array:
    return mx.where(_visible(*visible), scores * scale, -mx.inf)


def _weights(
    scale: float, storage: mx.Dtype, scores: mx.array, shift: mx.array, *visible: mx.array
) -> mx.array:
    return mx.where(_visible(*visible), mx.exp(scores * scale - shift), 0).astype(storage)


def _shifted(scores: mx.array, top: mx.array) -> mx.array:
    return mx.exp(scores - mx.maximum(top, mx.finfo(mx.float32).min))


def _joined_sums(top: mx.array, *rest: mx.array) -> tuple[mx.array, mx.array]:
    """Sums of whole rows from `_sums` of their two parts: (top, top) or (top, sum, top, sum)."""
    other_top = rest[len(rest) // 2]
    shift = mx.maximum(mx.maximum(top, other_top), mx.finfo(mx.float32).min)
    total, other_total = mx.exp(top - shift), mx.exp(other_top - shift)
    if len(rest) > 1:
        total, other_total = total * rest[0], other_total * rest[2]
    return shift, total + other_total


def _finite(x: mx.array) -> mx.array:
    """False for NaN and infinity, in two operations: mx.isfinite takes ten and is not fused."""
    return mx.abs(x) <= mx.finfo(mx.float32).max


def _gain(gamma: mx.array, total: mx.array) -> mx.array:
    return gamma.astype(mx.float32) / mx.where(total == 0, 1, total)


def _coupling(scores: mx.array, shift: mx.array, gain: mx.array) -> mx.array:
    """N of the diagonal blocks; a row that is not finite, as its gain is then, is zero."""
    return mx.where(_finite(gain), mx.exp(scores - shift) * gain, 0)


def _right_side(
    f: mx.array, gain: mx.array, index: mx.array, shown: mx.array, *mixed: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """f + gain * mixed, the same with zeros for what is not finite, and the index of such a row.

    As in `blocked`, no row may spoil the rows before it. The index is large elsewhere.
    """
    rhs = f.astype(mx.float32)
    if mixed:
        rhs = rhs + gain * mixed[0]
    rhs = mx.where(_finite(gain), rhs, mx.nan)
    finite = _finite(rhs)
    return rhs, mx.where(finite, rhs, 0), mx.where(shown & ~finite, index, 1 << 30)


def _solved(
    dtype: mx.Dtype,
    storage: mx.Dtype,
    rhs: mx.array,
    change: mx.array,
    first_broken: mx.array,
    index: mx.array,
    shown: mx.array,
) -> tuple[mx.array, mx.array]:
    """s of a block row, and its states as later rows read them."""
    s = mx.where(index > first_broken, mx.nan, rhs + change)
    s = mx.where(_finite(rhs), s, rhs)
    return s.astype(dtype), mx.where(shown, s, 0).astype(storage)


def _reversed_rows(
    storage: mx.Dtype, u: mx.array, change: mx.array, gain: mx.array
) -> tuple[mx.array, mx.array]:
    """u of a block row, and gain * u as the rows before it receive it."""
    solved = u + change
    return solved, (solved * gain).astype(storage)


def _times(weights: mx.array, products: mx.array) -> mx.array:
    return weights * products


def _score_grads(
    scale: float,
    storage: mx.Dtype,
    weights: mx.array,
    products: mx.array,
    r: mx.array,
    total: mx.array,
    gain: mx.array,
) -> tuple[mx.array, mx.array]:
    """Gradients of the products q k^T of a block row and of gamma."""
    r = r / mx.where(total == 0, 1, total)
    return (weights * (products - r) * (gain * scale)).astype(storage), r


def _stepped(
    dtype: mx.Dtype, f: mx.array, mixed: mx.array, total: mx.array, gamma: mx.array
) -> mx.array:
    share = mx.where(total == 0, 0, gamma / total)
    return (f + share * mixed).astype(dtype)
