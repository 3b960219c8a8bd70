"""The Mamba-2 mixer: a state space with scalar decays, in chunks to train, in steps to decode.

Letters: B batch, T time, D width, H heads of width P, N state size, Q chunk, n chunks, W width of
the convolution; x, dt, A, b, c as in state-spaces/mamba (b and c are shared by all heads).
"""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from sessa_common.config import SessaConfig
from sessa_mlx.cache import Mamba2LayerCache

CHUNK = 64


def ssd_step(
    x: mx.array,  # (B, 1, H, P)
    dt: mx.array,  # (B, 1, H)
    A: mx.array,  # (H,)
    b: mx.array,  # (B, 1, N)
    c: mx.array,  # (B, 1, N)
    state: mx.array,  # (B, H, P, N)
) -> tuple[mx.array, mx.array]:
    """One row of h = exp(dt A) h + dt x b^T, y = h c: y (B, 1, H, P) and the next state."""
    inputs = (x * dt[..., None])[:, 0, :, :, None] * b[:, :, None, :]
    state = mx.exp(dt[:, 0] * A)[..., None, None] * state + inputs
    return (state * c[:, :, None, :]).sum(-1)[:, None], state


def ssd_chunked(
    x: mx.array,  # (B, T, H, P)
    dt: mx.array,  # (B, T, H)
    A: mx.array,  # (H,)
    b: mx.array,  # (B, T, N)
    c: mx.array,  # (B, T, N)
    state: mx.array | None = None,  # (B, H, P, N)
    document_starts: mx.array | None = None,  # (B, T)
) -> tuple[mx.array, mx.array]:
    """T rows of the recurrence of `ssd_step` as matrix products: y (B, T, H, P), the last state.

    dt and A must be float32 at least: decays and states are computed in their dtype, the large
    products in the dtype of x. Section 6 of arXiv 2405.21060. Memory is O(T Q) up to T = Q^3, where
    the (T/Q)^2 decays between chunks become more numerous. At document_starts the state begins
    anew.
    """
    T, H, P = x.shape[1:]
    Q = min(CHUNK, T)
    documents = None if document_starts is None else _Documents(document_starts, Q)
    x, dt, b, c = (_chunks(rows, Q) for rows in (x, dt, b, c))
    # A decay below exp(-40) is zero to float64 precision; the bound keeps sums of logs accurate.
    logs = mx.cumsum(mx.maximum(dt * A, -40), axis=2)  # (B, n, Q, H)
    inputs = (x * dt[..., None]).astype(x.dtype)  # (B, n, Q, H, P)
    pairs = c @ b.swapaxes(2, 3)  # (B, n, Q, Q)
    if documents is not None:
        pairs = pairs * documents.pairs
    decays = _decays(logs.swapaxes(2, 3)).astype(x.dtype)
    weights = pairs[:, :, None] * decays  # (B, n, H, Q, Q)
    inside = (weights @ inputs.swapaxes(2, 3)).swapaxes(2, 3)  # (B, n, Q, H, P)
    kept = mx.exp(logs[:, :, -1:] - logs)[..., None]
    if documents is not None:
        kept = kept * documents.kept
    local = b.swapaxes(2, 3) @ (inputs * kept).astype(x.dtype).flatten(3)  # (B, n, N, H P)
    between = None if documents is None else documents.between
    states = _carry(mx.unflatten(local, -1, (H, P)), logs[:, :, -1], state, between)
    before = mx.unflatten(c @ states[:, :-1].astype(x.dtype).flatten(3), -1, (H, P))
    if documents is not None:
        before = before * documents.before
    y = inside + before * mx.exp(logs)[..., None]
    return y.flatten(1, 2)[:, :T], states[:, -1].transpose(0, 2, 3, 1)


def _chunks(rows: mx.array, Q: int) -> mx.array:
    """(B, T, ...) -> (B, n, Q, ...); padding rows have dt = 0, so they change no state."""
    missing = -rows.shape[1] % Q
    if missing:
        rows = mx.pad(rows, [(0, 0), (0, missing)] + [(0, 0)] * (rows.ndim - 2))
    return mx.unflatten(rows, 1, (-1, Q))


def _decays(logs: mx.array) -> mx.array:
    """exp(logs[i] - logs[j]) for j <= i, else 0: (..., Q) -> (..., Q, Q)."""
    Q = logs.shape[-1]
    future = mx.triu(mx.full((Q, Q), -mx.inf, dtype=logs.dtype), 1)
    # Mask before exp, which would overflow above the diagonal and make the gradient NaN.
    return mx.exp(logs[..., :, None] - logs[..., None, :] + future)


class _Documents:
    """Factors that are 1 within a document and 0 between two, for chunks of Q rows.

    pairs (B, n, Q, Q) of rows in a chunk; kept (B, n, Q, 1, 1) of a row and the end of its chunk;
    before (B, n, Q, 1, 1) of a row and the end of the chunk before; between (B, 1, n+1, n+1) of the
    ends of two chunks, the first of which is the beginning. What is kept at the end of a last chunk
    with padding is not defined, because nothing reads it.
    """

    def __init__(self, document_starts: mx.array, Q: int) -> None:
        starts = _chunks(document_starts, Q)
        ends = mx.pad(starts[:, :, -1], [(0, 0), (1, 0)], constant_values=-1)  # (B, n+1)
        self.pairs = starts[..., :, None] == starts[..., None, :]
        self.kept = (starts == starts[:, :, -1:])[..., None, None]
        self.before = (starts == ends[:, :-1, None])[..., None, None]
        self.between = (ends[:, :, None] == ends[:, None, :])[:, None]


def _carry(
    local: mx.array, totals: mx.array, state: mx.array | None, between: mx.array | None
) -> mx.array:
    """States (B, n+1, N, H, P) before, between and after the chunks.

    `local` is what each chunk adds to the state, `totals` the logarithm of its decay; `between` is
    False for two chunks that end in different documents.
    """
    local = local.astype(totals.dtype)
    first = mx.zeros_like(local[:, 0]) if state is None else state.transpose(0, 3, 1, 2)
    local = mx.concatenate([first[:, None], local], 1)
    decays = _decays(
        mx.pad(mx.cumsum(totals, axis=1), [(0, 0), (1, 0), (0, 0)]).swapaxes(1, 2)
    )  # (B, H, n+1, n+1)
    if between is not None:
        decays = decays * between
    return mx.einsum("bhij,bjnhp->binhp", decays, local)


class CausalConv1d(nn.Module):
    """Depth-wise convolution over time: a sum of W shifted products, weight (channels, 1, W)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = mx.zeros((channels, 1, width))
        self.bias = mx.zeros((channels,))

    def __call__(self, x: mx.array, document_starts: mx.array | None = None) -> mx.array:
        """(B, W-1+T, channels) -> (B, T, channels); none reads before document_starts (B, T)."""
        taps = self.weight[:, 0].T
        T = x.shape[1] - len(taps) + 1
        y = self.bias
        for i, tap in enumerate(taps):
            rows, ago = x[:, i : i + T], len(taps) - 1 - i
            if document_starts is not None and ago:
                rows = rows * (mx.arange(T) - ago >= document_starts)[..., None]
            y = y + rows * tap
        return y


class Mamba2Mixer(nn.Module):
    """Mamba-2 with one group: projection, convolution, state space, gated RMSNorm, projection."""

    def __init__(self, config: SessaConfig) -> None:
        super().__init__()
        D, N = config.hidden_size, config.mamba_d_state
        self.inner = config.mamba_expand * D
        self.heads, self.states = self.inner // config.mamba_d_head, N
        channels = self.inner + 2 * N
        self.in_proj = nn.Linear(D, self.inner + channels + self.heads, bias=False)
        self.conv1d = CausalConv1d(channels, config.mamba_d_conv)
        self.dt_bias = mx.zeros((self.heads,))
        self.A_log = mx.zeros((self.heads,))
        self.D = mx.ones((self.heads,))
        self.norm = nn.RMSNorm(self.inner, eps=config.layer_norm_eps)
        self.out_proj = nn.Linear(self.inner, D, bias=False)

    def __call__(
        self,
        a: mx.array,  # (B, T, D)
        *,
        cache: Mamba2LayerCache | None = None,
        key_mask: mx.array | None = None,  # (B, P+T)
        document_starts: mx.array | None = None,  # (B, T)
    ) -> mx.array:
        """Mix a (B, T, D) over time; with a cache, a follows the cached positions.

        A position that key_mask hides enters neither the convolution nor the state; at
        document_starts, which go with neither a cache nor a mask, both begin anew.
        """
        T = a.shape[1]
        ends = [self.inner, 2 * self.inner + 2 * self.states]
        z, xbc, dt = mx.split(self.in_proj(a), ends, -1)
        work = mx.float64 if dt.dtype == mx.float64 else mx.float32
        dt = nn.softplus(dt.astype(work) + self.dt_bias.astype(work))
        if key_mask is not None:
            real = key_mask[:, -T:, None]
            xbc, dt = xbc * real, dt * real
        xbc = nn.silu(self.conv1d(self._with_past(xbc, cache), document_starts))
        x, b, c = mx.split(xbc, [self.inner, self.inner + self.states], -1)
        x = mx.unflatten(x, -1, (self.heads, -1))
        y = self._scan(x, dt, b, c, cache, document_starts) + self.D.astype(work)[:, None] * x
        gated = y.flatten(2) * nn.silu(z)
        return self.out_proj(self.norm(gated.astype(self.norm.weight.dtype)))

    def _with_past(self, xbc: mx.array, cache: Mamba2LayerCache | None) -> mx.array:
        past = self.conv1d.weight.shape[-1] - 1
        if cache is None or cache.conv is None:
            rows = mx.pad(xbc, [(0, 0), (past, 0), (0, 0)])
        else:
            rows = mx.concatenate([cache.conv, xbc], 1)
        if cache is not None:
            cache.keep_conv(rows, past)
        return rows

    def _scan(
        self,
        x: mx.array,
        dt: mx.array,
        b: mx.array,
        c: mx.array,
        cache: Mamba2LayerCache | None,
        document_starts: mx.array | None,
    ) -> mx.array:
        A = -mx.exp(self.A_log.astype(dt.dtype))
        if cache is None:
            return ssd_chunked(x, dt, A, b, c, document_starts=document_starts)[0]
        if cache.state is not None and x.shape[1] == 1:
            y, cache.state = ssd_step(x, dt, A, b, c, cache.state)
        else:
            y, cache.state = ssd_chunked(x, dt, A, b, c, cache.state)
        return y
