"""The Mamba-2 mixer: a state space with scalar decays, in chunks to train, in steps to decode.

Letters: B batch, T time, D width, H heads of width P, N state size, Q chunk, n chunks, W width of
the convolution; x, dt, A, b, c as in state-spaces/mamba (b and c are shared by all heads).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sessa_common.config import SessaConfig
from sessa_torch.cache import Mamba2LayerCache

CHUNK = 64


def ssd_step(
    x: Tensor,  # (B, 1, H, P)
    dt: Tensor,  # (B, 1, H)
    A: Tensor,  # (H,)
    b: Tensor,  # (B, 1, N)
    c: Tensor,  # (B, 1, N)
    state: Tensor,  # (B, H, P, N)
) -> tuple[Tensor, Tensor]:
    """One row of h = exp(dt A) h + dt x b^T, y = h c: y (B, 1, H, P) and the next state."""
    inputs = (x * dt[..., None])[:, 0, :, :, None] * b[:, :, None, :]
    state = torch.exp(dt[:, 0] * A)[..., None, None] * state + inputs
    return (state * c[:, :, None, :]).sum(-1)[:, None], state


def ssd_chunked(
    x: Tensor,  # (B, T, H, P)
    dt: Tensor,  # (B, T, H)
    A: Tensor,  # (H,)
    b: Tensor,  # (B, T, N)
    c: Tensor,  # (B, T, N)
    state: Tensor | None = None,  # (B, H, P, N)
    document_starts: Tensor | None = None,  # (B, T)
) -> tuple[Tensor, Tensor]:
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
    logs = (dt * A).clamp_min(-40).cumsum(2)  # (B, n, Q, H)
    inputs = (x * dt[..., None]).to(x.dtype)  # (B, n, Q, H, P)
    pairs = c @ b.mT  # (B, n, Q, Q)
    if documents is not None:
        pairs = pairs * documents.pairs
    weights = pairs[:, :, None] * _decays(logs.mT).to(x.dtype)  # (B, n, H, Q, Q)
    inside = (weights @ inputs.transpose(2, 3)).transpose(2, 3)  # (B, n, Q, H, P)
    kept = torch.exp(logs[:, :, -1:] - logs)[..., None]
    if documents is not None:
        kept = kept * documents.kept
    local = b.mT @ (inputs * kept).to(x.dtype).flatten(3)  # (B, n, N, H P)
    between = None if documents is None else documents.between
    states = _carry(local.unflatten(-1, (H, P)), logs[:, :, -1], state, between)
    before = (c @ states[:, :-1].to(x.dtype).flatten(3)).unflatten(-1, (H, P))
    if documents is not None:
        before = before * documents.before
    y = inside + before * torch.exp(logs)[..., None]
    return y.flatten(1, 2)[:, :T], states[:, -1].permute(0, 2, 3, 1)


def _chunks(rows: Tensor, Q: int) -> Tensor:
    """(B, T, ...) -> (B, n, Q, ...); padding rows have dt = 0, so they change no state."""
    missing = -rows.shape[1] % Q
    if missing:
        rows = F.pad(rows, [0, 0] * (rows.ndim - 2) + [0, missing])
    return rows.unflatten(1, (-1, Q))


def _decays(logs: Tensor) -> Tensor:
    """exp(logs[i] - logs[j]) for j <= i, else 0: (..., Q) -> (..., Q, Q)."""
    Q = logs.shape[-1]
    future = torch.full((Q, Q), -torch.inf, dtype=logs.dtype, device=logs.device).triu(1)
    # Mask before exp, which would overflow above the diagonal and make the gradient NaN. Adding a
    # negated row and working in place avoids copies of the largest array.
    return (logs[..., :, None] + (-logs)[..., None, :]).add_(future).exp_()


class _Documents:
    """Factors that are 1 within a document and 0 between two, for chunks of Q rows.

    pairs (B, n, Q, Q) of rows in a chunk; kept (B, n, Q, 1, 1) of a row and the end of its chunk;
    before (B, n, Q, 1, 1) of a row and the end of the chunk before; between (B, 1, n+1, n+1) of the
    ends of two chunks, the first of which is the beginning. What is kept at the end of a last chunk
    with padding is not defined, because nothing reads it.
    """

    def __init__(self, document_starts: Tensor, Q: int) -> None:
        starts = _chunks(document_starts, Q)
        ends = F.pad(starts[:, :, -1], (1, 0), value=-1)  # (B, n+1)
        self.pairs = starts[..., :, None] == starts[..., None, :]
        self.kept = (starts == starts[:, :, -1:])[..., None, None]
        self.before = (starts == ends[:, :-1, None])[..., None, None]
        self.between = (ends[:, :, None] == ends[:, None, :])[:, None]


def _carry(local: Tensor, totals: Tensor, state: Tensor | None, between: Tensor | None) -> Tensor:
    """States (B, n+1, N, H, P) before, between and after the chunks.

    `local` is what each chunk adds to the state, `totals` the logarithm of its decay; `between` is
    False for two chunks that end in different documents.
    """
    local = local.to(totals.dtype)
    first = torch.zeros_like(local[:, 0]) if state is None else state.permute(0, 3, 1, 2)
    local = torch.cat([first[:, None], local], 1)
    decays = _decays(F.pad(totals.cumsum(1), (0, 0, 1, 0)).mT)  # (B, H, n+1, n+1)
    if between is not None:
        decays = decays * between
    with torch.autocast(local.device.type, enabled=False):
        return torch.einsum("bhij,bjnhp->binhp", decays, local)


class CausalConv1d(nn.Module):
    """Depth-wise convolution over time: a sum of W shifted products, weight (channels, 1, W)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, width))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, document_starts: Tensor | None = None) -> Tensor:
        """(B, W-1+T, channels) -> (B, T, channels); none reads before document_starts (B, T)."""
        taps = self.weight[:, 0].to(x.dtype).unbind(-1)
        T = x.shape[1] - len(taps) + 1
        y = self.bias.to(x.dtype)
        for i, tap in enumerate(taps):
            rows, ago = x[:, i : i + T], len(taps) - 1 - i
            if document_starts is not None and ago:
                index = torch.arange(T, device=x.device)
                rows = rows * (index - ago >= document_starts)[..., None]
            y = torch.addcmul(y, rows, tap)
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
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.RMSNorm(self.inner, eps=config.layer_norm_eps)
        self.out_proj = nn.Linear(self.inner, D, bias=False)

    def forward(
        self,
        a: Tensor,  # (B, T, D)
        *,
        cache: Mamba2LayerCache | None = None,
        key_mask: Tensor | None = None,  # (B, P+T)
        document_starts: Tensor | None = None,  # (B, T)
    ) -> Tensor:
        """Mix a (B, T, D) over time; with a cache, a follows the cached positions.

        A position that key_mask hides enters neither the convolution nor the state; at
        document_starts, which go with neither a cache nor a mask, both begin anew.
        """
        T = a.shape[1]
        z, xbc, dt = self.in_proj(a).split(
            [self.inner, self.inner + 2 * self.states, self.heads], -1
        )
        work = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(work) + self.dt_bias.to(work))
        if key_mask is not None:
            real = key_mask[:, -T:, None]
            xbc, dt = xbc * real, dt * real
        xbc = F.silu(self.conv1d(self._with_past(xbc, cache), document_starts))
        x, b, c = xbc.split([self.inner, self.states, self.states], -1)
        x = x.unflatten(-1, (self.heads, -1))
        y = self._scan(x, dt, b, c, cache, document_starts) + self.D.to(work)[:, None] * x
        gated = y.flatten(2) * F.silu(z)
        return self.out_proj(self.norm(gated.to(self.norm.weight.dtype)))

    def _with_past(self, xbc: Tensor, cache: Mamba2LayerCache | None) -> Tensor:
        past = self.conv1d.weight.shape[-1] - 1
        if cache is None or cache.conv is None:
            rows = F.pad(xbc, (0, 0, past, 0))
        else:
            rows = torch.cat([cache.conv, xbc], 1)
        if cache is not None:
            cache.keep_conv(rows, past)
        return rows

    def _scan(
        self,
        x: Tensor,
        dt: Tensor,
        b: Tensor,
        c: Tensor,
        cache: Mamba2LayerCache | None,
        document_starts: Tensor | None,
    ) -> Tensor:
        A = -self.A_log.to(dt.dtype).exp()
        if cache is None:
            return ssd_chunked(x, dt, A, b, c, document_starts=document_starts)[0]
        if cache.state is not None and x.shape[1] == 1:
            y, cache.state = ssd_step(x, dt, A, b, c, cache.state)
        else:
            y, state = ssd_chunked(x, dt, A, b, c, cache.state)
            # A copied cache is contiguous; with equal strides the sums of both have one order.
            cache.state = state.contiguous()
        return y
