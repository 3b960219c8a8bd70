"""The Mamba-2 block in float64 NumPy, one row after another, to judge the chunked forms.

Letters: B batch, T time, D width, H heads of width P, N state size, W width of the convolution.
Formulas: section 7 of arXiv 2405.21060 and modules/mamba2.py of state-spaces/mamba, one group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from sessa_common.config import SessaConfig
from sessa_common.reference.ops import f64, rms_norm, silu, softplus


class Mamba2LayerCache(NamedTuple):
    """The past of one layer: the last inputs of the convolution, and the state."""

    conv: np.ndarray  # (B, W-1, channels)
    state: np.ndarray  # (B, H, P, N)


def empty_mamba_cache(config: SessaConfig, B: int) -> Mamba2LayerCache:
    """A cache of zero tokens for B sequences."""
    inner, N = config.mamba_expand * config.hidden_size, config.mamba_d_state
    P = config.mamba_d_head
    conv = np.zeros((B, config.mamba_d_conv - 1, inner + 2 * N))
    return Mamba2LayerCache(conv, np.zeros((B, inner // P, P, N)))


def mamba2_layer(
    config: SessaConfig,
    weights: Mapping[str, np.ndarray],
    x: np.ndarray,
    past: Mamba2LayerCache | None = None,
    key_mask: np.ndarray | None = None,
    document_starts: np.ndarray | None = None,
) -> tuple[np.ndarray, Mamba2LayerCache]:
    """x + mixer(rmsnorm(x)) for x (B, T, D), and the cache after it.

    A position that key_mask (B, P+T) hides enters neither the convolution nor the state, and at the
    document_starts (B, T) both begin anew.
    """
    w = {name: f64(value) for name, value in weights.items()}
    conv, state = past or empty_mamba_cache(config, len(x))
    H, P, N = state.shape[1:]
    eps, inner = config.layer_norm_eps, H * P
    rows = rms_norm(x, w["ln.weight"], eps) @ w["mixer.in_proj.weight"].T
    z, xbc, dt = np.split(rows, [inner, 2 * inner + 2 * N], axis=-1)
    dt, A = softplus(dt + w["mixer.dt_bias"]), -np.exp(w["mixer.A_log"])
    if key_mask is not None:
        real = (np.asarray(key_mask) != 0)[:, -x.shape[1] :, None]
        xbc, dt = xbc * real, dt * real
    taps = w["mixer.conv1d.weight"][:, 0].T  # (W, channels)
    mixed = []
    for t in range(x.shape[1]):
        if document_starts is not None:
            going_on = (np.asarray(document_starts)[:, t] < t)[:, None, None]
            conv, state = conv * going_on, state * going_on[..., None]
        window = np.concatenate([conv, xbc[:, t : t + 1]], axis=1)
        row, conv = silu((window * taps).sum(axis=1) + w["mixer.conv1d.bias"]), window[:, 1:]
        u, b, c = np.split(row, [inner, inner + N], axis=-1)
        u = u.reshape(-1, H, P)
        added = (dt[:, t, :, None] * u)[..., None] * b[:, None, None]
        state = np.exp(dt[:, t] * A)[..., None, None] * state + added
        y = (state * c[:, None, None]).sum(axis=-1) + w["mixer.D"][:, None] * u
        mixed.append(y.reshape(-1, inner) * silu(z[:, t]))
    normed = rms_norm(np.stack(mixed, axis=1), w["mixer.norm.weight"], eps)
    return x + normed @ w["mixer.out_proj.weight"].T, Mamba2LayerCache(conv, state)
