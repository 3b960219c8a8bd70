"""Operators in float64 NumPy with their gradients, of which the reference model is made.

Letters: B batch, T time, P past, D width, H heads, G key/value heads, d = D/H, K feedback key
width. Arguments may have any floating type; everything is computed and returned in float64.
Equations are those of arXiv 2604.18580, sections 3 and 5.
"""

from __future__ import annotations

import math

import numpy as np

from sessa_common.rope import RopeScaling

_erf = np.vectorize(math.erf, otypes=[np.float64])


def f64(x: np.ndarray) -> np.ndarray:
    """The same numbers in float64."""
    return np.asarray(x, dtype=np.float64)


def visible_columns(
    T: int,
    P: int,
    key_mask: np.ndarray | None = None,
    document_starts: np.ndarray | None = None,
    *,
    strict: bool,
) -> np.ndarray:
    """Mask (1 or B, T, P+T) of the columns that row t sees: j <= P+t, or j < P+t if strict.

    With document_starts (B, T) no column before the first row of the own document is seen; P is 0.
    """
    last = P + np.arange(T)[:, None] - int(strict)
    visible = (np.arange(P + T) <= last)[None]
    if document_starts is not None:
        visible = visible & (np.arange(T) >= np.asarray(document_starts)[..., None])
    return visible if key_mask is None else visible & np.asarray(key_mask, dtype=bool)[:, None]


def masked_softmax(scores: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Softmax over the visible columns; a row without a visible column is all zeros."""
    scores = np.where(visible, scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total > 0, total, 1.0)


def softmax_backward(dweights: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Gradient at the scores, given the softmax's output and the gradient at that output."""
    return weights * (dweights - (dweights * weights).sum(axis=-1, keepdims=True))


def feedback_weights(
    q: np.ndarray,
    k: np.ndarray,
    key_mask: np.ndarray | None = None,
    document_starts: np.ndarray | None = None,
) -> np.ndarray:
    """alpha (B, T, P+T): strictly causal softmax of q (B, T, K) on k (B, P+T, K)."""
    q, k = f64(q), f64(k)
    T, K = q.shape[1:]
    visible = visible_columns(T, k.shape[1] - T, key_mask, document_starts, strict=True)
    return masked_softmax(q @ k.swapaxes(1, 2) * K**-0.5, visible)


def feedback_solve(
    f: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    gamma: np.ndarray,
    past_s: np.ndarray | None = None,
    key_mask: np.ndarray | None = None,
    document_starts: np.ndarray | None = None,
) -> np.ndarray:
    """Solve (I - N) s = f with N = diag(gamma) alpha, by forward substitution.

    f (B, T, D), q (B, T, K), k (B, P+T, K), gamma (B, T), past_s (B, P, D), key_mask (B, P+T) with
    True for visible, document_starts (B, T) with the first row of each row's document. Returns
    s (B, T, D); a row without a visible column gives s = f.
    """
    N = f64(gamma)[..., None] * feedback_weights(q, k, key_mask, document_starts)
    T, P = f.shape[1], k.shape[1] - f.shape[1]
    past = np.zeros((f.shape[0], 0, f.shape[2])) if past_s is None else f64(past_s)
    s = np.concatenate([past, f64(f)], axis=1)
    for t in range(T):
        s[:, P + t] += (N[:, t : t + 1, : P + t] @ s[:, : P + t])[:, 0]
    return s[:, P:]


def feedback_solve_backward(
    ds: np.ndarray,
    f: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    gamma: np.ndarray,
    past_s: np.ndarray | None = None,
    key_mask: np.ndarray | None = None,
    document_starts: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Gradients (df, dq, dk, dgamma, dpast_s) of `feedback_solve`; dpast_s is None without a past.

    df = u solves the transposed system (I - N)^T u = ds backwards in time.
    """
    q, k, gamma = f64(q), f64(k), f64(gamma)[..., None]
    alpha = feedback_weights(q, k, key_mask, document_starts)
    N = gamma * alpha
    T, P = f.shape[1], k.shape[1] - f.shape[1]
    u = f64(ds).copy()
    for j in reversed(range(T)):
        u[:, j] += (N[:, None, j + 1 :, P + j] @ u[:, j + 1 :])[:, 0]
    s = feedback_solve(f, q, k, gamma[..., 0], past_s, key_mask, document_starts)
    columns = s if past_s is None else np.concatenate([f64(past_s), s], axis=1)
    dalpha = u @ columns.swapaxes(1, 2)
    dgamma = (alpha * dalpha).sum(axis=-1)
    dscores = gamma * softmax_backward(dalpha, alpha) * q.shape[-1] ** -0.5
    dpast = None if past_s is None else N[:, :, :P].swapaxes(1, 2) @ u
    return u, dscores @ k, dscores.swapaxes(1, 2) @ q, dgamma, dpast


def uniform_kernel(gamma: float | np.ndarray, T: int) -> np.ndarray:
    """(I - N)^-1, (T, T), when every row attends uniformly: alpha[t, j] = 1/t for j < t.

    A constant gain uses the Gamma ratio of Corollary F.2; varying gains (T,) use
    K[t, tau] = gamma_t/t * prod_{i=tau+1}^{t-1} (1 + gamma_i/i). |gamma| < 1.
    """
    if np.ndim(gamma) == 0:
        g, index = float(gamma), np.arange(T)
        early = np.array([math.lgamma(i + 1) - math.lgamma(i + 1 + g) for i in index])
        late = np.array([math.lgamma(i + g) - math.lgamma(i + 1) if i else 0.0 for i in index])
        below = g * np.exp(early[None] + late[:, None])
    else:
        steps = np.arange(1, T)
        gains = f64(np.asarray(gamma))
        logs = np.concatenate([np.zeros(min(T, 2)), np.cumsum(np.log1p(gains[1:] / steps))])[:T]
        shifted = np.append(logs[1:], 0.0)
        below = gains[:, None] / np.arange(T).clip(1)[:, None] * np.exp(logs[:, None] - shifted)
    return np.tril(below, -1) + np.eye(T)


def rotate(
    x: np.ndarray, positions: np.ndarray, theta: float, scaling: RopeScaling | None = None
) -> np.ndarray:
    """RoPE on x (B, H, T, d): the pairs (0,1), (2,3), ... rotate by position times frequency.

    positions (1 or B, T). The rotation by -positions is the transpose, and without the amplitude of
    a scaling also the inverse.
    """
    if scaling is None:
        frequencies, amplitude = theta ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1]), 1.0
    else:
        frequencies, amplitude = scaling.frequencies(x.shape[-1], theta), scaling.amplitude
    angles = f64(positions)[:, None, :, None] * frequencies
    cos, sin = amplitude * np.cos(angles), amplitude * np.sin(angles)
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def attention_weights(
    q: np.ndarray,
    k: np.ndarray,
    key_mask: np.ndarray | None = None,
    document_starts: np.ndarray | None = None,
) -> np.ndarray:
    """Causal softmax weights (B, H, T, P+T) of q (B, H, T, d) on k (B, G, P+T, d).

    A row without a visible column attends to itself.
    """
    H, T, d = q.shape[1:]
    P = k.shape[2] - T
    visible = visible_columns(T, P, key_mask, document_starts, strict=False)
    itself = np.arange(P + T) == P + np.arange(T)[:, None]
    visible = visible | (itself & ~visible.any(axis=-1, keepdims=True))
    scores = q @ _per_query_head(k, H).swapaxes(2, 3) * d**-0.5
    return masked_softmax(scores, visible[:, None])


def _per_query_head(x: np.ndarray, H: int) -> np.ndarray:
    return np.repeat(x, H // x.shape[1], axis=1)


def _per_key_head(dx: np.ndarray, G: int) -> np.ndarray:
    B, H, T, d = dx.shape
    return dx.reshape(B, G, H // G, T, d).sum(axis=2)


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    key_mask: np.ndarray | None = None,
    document_starts: np.ndarray | None = None,
) -> np.ndarray:
    """Causal attention, q (B, H, T, d), k and v (B, G, P+T, d) -> (B, H, T, d)."""
    q, k, v = f64(q), f64(k), f64(v)
    return attention_weights(q, k, key_mask, document_starts) @ _per_query_head(v, q.shape[1])


def attention_backward(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    key_mask: np.ndarray | None = None,
    document_starts: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients (dq, dk, dv) of `attention`."""
    q, k, v, dout = f64(q), f64(k), f64(v), f64(dout)
    H, G = q.shape[1], k.shape[1]
    weights = attention_weights(q, k, key_mask, document_starts)
    dweights = dout @ _per_query_head(v, H).swapaxes(2, 3)
    dscores = softmax_backward(dweights, weights) * q.shape[-1] ** -0.5
    dq = dscores @ _per_query_head(k, H)
    dk = _per_key_head(dscores.swapaxes(2, 3) @ q, G)
    return dq, dk, _per_key_head(weights.swapaxes(2, 3) @ dout, G)


def gelu(x: np.ndarray) -> np.ndarray:
    """x times the normal distribution function, the exact erf form."""
    return x * 0.5 * (1 + _erf(x / math.sqrt(2)))


def gelu_derivative(x: np.ndarray) -> np.ndarray:
    """Slope of `gelu`: the distribution function plus x times the density."""
    density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + _erf(x / math.sqrt(2))) + x * density


def silu(x: np.ndarray) -> np.ndarray:
    """x times the logistic function, written with tanh because exp overflows for large -x."""
    return x * 0.5 * (1 + np.tanh(x / 2))


def silu_derivative(x: np.ndarray) -> np.ndarray:
    """Slope of `silu`."""
    share = 0.5 * (1 + np.tanh(x / 2))
    return share * (1 + x * (1 - share))


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + exp(x))."""
    return np.logaddexp(0.0, x)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Divide the last axis by its root mean square, then scale."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def rms_norm_backward(
    dy: np.ndarray, x: np.ndarray, weight: np.ndarray, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients (dx, dweight) of `rms_norm`."""
    scale = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    unit, dunit = x * scale, dy * weight
    dx = scale * (dunit - unit * (dunit * unit).mean(axis=-1, keepdims=True))
    return dx, (dy * unit).sum(axis=tuple(range(x.ndim - 1)))


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """Normalise the last axis, then scale and shift."""
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight + bias


def layer_norm_backward(
    dy: np.ndarray, x: np.ndarray, weight: np.ndarray, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients (dx, dweight, dbias) of `layer_norm`."""
    x = x - x.mean(axis=-1, keepdims=True)
    scale = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    unit, dunit = x * scale, dy * weight
    along = (dunit * unit).mean(axis=-1, keepdims=True)
    dx = scale * (dunit - dunit.mean(axis=-1, keepdims=True) - unit * along)
    rows = tuple(range(x.ndim - 1))
    return dx, (dy * unit).sum(axis=rows), dy.sum(axis=rows)


def cross_entropy(
    logits: np.ndarray, targets: np.ndarray, weight: np.ndarray | None = None
) -> tuple[float, np.ndarray]:
    """Mean loss in nats over targets (B, T), and its gradient at logits (B, T, V).

    weight (B, T) counts each target; None counts all alike.
    """
    logits = f64(logits)
    weight = np.ones(targets.shape) if weight is None else f64(weight)
    share = weight / weight.sum()
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logp = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    hit = np.arange(logits.shape[-1]) == np.asarray(targets)[..., None]
    loss = -float((share * logp[hit].reshape(targets.shape)).sum())
    return loss, (np.exp(logp) - hit) * share[..., None]
