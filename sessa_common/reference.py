"""The layer and the language model in float64 NumPy, gradients written out: judge of all others.

Letters and equations as in `sessa_common.reference_ops`, which has the operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from sessa_common.config import SessaConfig
from sessa_common.reference_ops import (
    attention,
    attention_backward,
    f64,
    feedback_solve,
    feedback_solve_backward,
    feedback_weights,
    gelu,
    gelu_derivative,
    layer_norm,
    layer_norm_backward,
    rotate,
    uniform_kernel,
)

__all__ = [
    "LayerCache",
    "ModelCache",
    "attention",
    "attention_backward",
    "cross_entropy",
    "empty_cache",
    "empty_layer_cache",
    "feedback_solve",
    "feedback_solve_backward",
    "feedback_weights",
    "layer_backward",
    "layer_decode",
    "layer_forward",
    "model_backward",
    "model_logits",
    "rotate",
    "uniform_kernel",
]

Weights = Mapping[str, np.ndarray]


def _linear(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    y = x @ f64(weights[f"{name}.weight"]).T
    return y + f64(weights[f"{name}.bias"]) if f"{name}.bias" in weights else y


def _linear_backward(
    weights: Weights, name: str, x: np.ndarray, dy: np.ndarray, grads: dict[str, np.ndarray]
) -> np.ndarray:
    flat = dy.reshape(-1, dy.shape[-1])
    grads[f"{name}.weight"] = flat.T @ x.reshape(-1, x.shape[-1])
    if f"{name}.bias" in weights:
        grads[f"{name}.bias"] = flat.sum(axis=0)
    return dy @ f64(weights[f"{name}.weight"])


def _split_heads(x: np.ndarray, heads: int) -> np.ndarray:
    B, T, width = x.shape
    return x.reshape(B, T, heads, width // heads).transpose(0, 2, 1, 3)  # (B, heads, T, d)


def _join_heads(x: np.ndarray) -> np.ndarray:
    B, H, T, d = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, T, H * d)


class LayerCache(NamedTuple):
    """What one layer keeps of P past tokens; k_fb and s stay empty without feedback."""

    k: np.ndarray  # (B, G, P, d), after RoPE
    v: np.ndarray  # (B, G, P, d)
    k_fb: np.ndarray  # (B, P, D)
    s: np.ndarray  # (B, P, D)


def empty_layer_cache(config: SessaConfig, B: int) -> LayerCache:
    """A cache of zero tokens for B sequences."""
    heads = np.zeros((B, config.num_key_value_heads, 0, config.head_dim))
    wide = np.zeros((B, 0, config.hidden_size))
    return LayerCache(heads, heads, wide, wide)


def _layer(
    config: SessaConfig,
    weights: Weights,
    x: np.ndarray,
    past: LayerCache | None = None,
    positions: np.ndarray | None = None,
    key_mask: np.ndarray | None = None,
) -> SimpleNamespace:
    """One layer with everything it computes on the way, for `layer_backward` to read."""
    c, x = SimpleNamespace(x=f64(x), key_mask=key_mask), f64(x)
    past = past or empty_layer_cache(config, x.shape[0])
    P, T = past.k.shape[2], x.shape[1]
    c.positions = np.arange(P, P + T)[None] if positions is None else positions
    norm = (f64(weights["ln.weight"]), f64(weights["ln.bias"]), config.layer_norm_eps)
    c.normed = layer_norm(x, *norm)
    c.a, c.g = np.split(_linear(weights, "W_in", c.normed), 2, axis=-1)
    c.mixer_in = gelu(c.a)
    c.q = _split_heads(_linear(weights, "mixer.q_proj", c.mixer_in), config.num_attention_heads)
    k = _split_heads(_linear(weights, "mixer.k_proj", c.mixer_in), config.num_key_value_heads)
    v = _split_heads(_linear(weights, "mixer.v_proj", c.mixer_in), config.num_key_value_heads)
    if config.use_forward_rope:
        c.q = rotate(c.q, c.positions, config.rope_theta)
        k = rotate(k, c.positions, config.rope_theta)
    c.k, c.v = np.concatenate([past.k, k], axis=2), np.concatenate([past.v, v], axis=2)
    c.heads = _join_heads(attention(c.q, c.k, c.v, key_mask))
    single = config.num_attention_heads == 1
    c.f = c.heads if single else _linear(weights, "mixer.out_proj", c.heads)
    c.s, c.cache = c.f, past._replace(k=c.k, v=c.v)
    if config.feedback:
        _feedback(config, weights, c, past)
    c.y = x + _linear(weights, "W_out", c.s * c.g)
    return c


def _feedback(config: SessaConfig, weights: Weights, c: SimpleNamespace, past: LayerCache) -> None:
    c.q_fb, k_fb = np.split(_linear(weights, "mixer.proj_fb", c.mixer_in), 2, axis=-1)
    c.k_fb = np.concatenate([past.k_fb, k_fb], axis=1)
    gain = _linear(weights, "mixer.gamma_ctx", c.mixer_in)[..., 0]
    c.tanh = np.tanh(gain + f64(weights["mixer.gamma_bias"]))
    c.gamma = config.gamma_max * c.tanh
    c.s = feedback_solve(c.f, c.q_fb, c.k_fb, c.gamma, past.s, c.key_mask)
    c.cache = LayerCache(c.k, c.v, c.k_fb, np.concatenate([past.s, c.s], axis=1))


def layer_forward(
    config: SessaConfig,
    weights: Weights,
    x: np.ndarray,
    *,
    positions: np.ndarray | None = None,
    key_mask: np.ndarray | None = None,
) -> np.ndarray:
    """One layer on whole sequences, x (B, T, D) -> y (B, T, D); weights by the release's names."""
    return _layer(config, weights, x, None, positions, key_mask).y


def layer_decode(
    config: SessaConfig,
    weights: Weights,
    x: np.ndarray,
    cache: LayerCache | None = None,
    *,
    positions: np.ndarray | None = None,
    key_mask: np.ndarray | None = None,
) -> tuple[np.ndarray, LayerCache]:
    """One layer on the next T tokens: y (B, T, D) and the grown cache; key_mask is (B, P+T)."""
    c = _layer(config, weights, x, cache, positions, key_mask)
    return c.y, c.cache


def layer_backward(
    config: SessaConfig,
    weights: Weights,
    x: np.ndarray,
    dy: np.ndarray,
    *,
    positions: np.ndarray | None = None,
    key_mask: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Gradients of `layer_forward`: dx (B, T, D), and one array a weight, by its name."""
    return _backward(config, weights, _layer(config, weights, x, None, positions, key_mask), dy)


def _backward(
    config: SessaConfig, weights: Weights, c: SimpleNamespace, dy: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    grads: dict[str, np.ndarray] = {}
    dy = f64(dy)
    dgated = _linear_backward(weights, "W_out", c.s * c.g, dy, grads)
    df, dmixer_in = dgated * c.g, np.zeros_like(c.mixer_in)
    if config.feedback:
        df, dq_fb, dk_fb, dgamma, _ = feedback_solve_backward(
            df, c.f, c.q_fb, c.k_fb, c.gamma, None, c.key_mask
        )
        dfb = np.concatenate([dq_fb, dk_fb], axis=-1)
        dmixer_in += _linear_backward(weights, "mixer.proj_fb", c.mixer_in, dfb, grads)
        dgain = (config.gamma_max * (1 - c.tanh**2) * dgamma)[..., None]
        dmixer_in += _linear_backward(weights, "mixer.gamma_ctx", c.mixer_in, dgain, grads)
        grads["mixer.gamma_bias"] = dgain.sum()
    if config.num_attention_heads > 1:
        df = _linear_backward(weights, "mixer.out_proj", c.heads, df, grads)
    dheads = _split_heads(df, config.num_attention_heads)
    dq, dk, dv = attention_backward(dheads, c.q, c.k, c.v, c.key_mask)
    if config.use_forward_rope:
        dq = rotate(dq, -c.positions, config.rope_theta)
        dk = rotate(dk, -c.positions, config.rope_theta)
    for name, gradient in (("q_proj", dq), ("k_proj", dk), ("v_proj", dv)):
        joined = _join_heads(gradient)
        dmixer_in += _linear_backward(weights, f"mixer.{name}", c.mixer_in, joined, grads)
    dag = np.concatenate([dmixer_in * gelu_derivative(c.a), dgated * c.s], axis=-1)
    dnormed = _linear_backward(weights, "W_in", c.normed, dag, grads)
    dx, grads["ln.weight"], grads["ln.bias"] = layer_norm_backward(
        dnormed, c.x, f64(weights["ln.weight"]), config.layer_norm_eps
    )
    return dy + dx, grads


@dataclass
class ModelCache:
    """The layers' caches and the mask (B, P) of the tokens in them, None when all are real."""

    layers: list[LayerCache]
    mask: np.ndarray | None = None


def empty_cache(config: SessaConfig, B: int) -> ModelCache:
    """A cache of zero tokens for the whole model, B sequences."""
    return ModelCache([empty_layer_cache(config, B) for _ in range(config.num_hidden_layers)])


def _mask_and_positions(
    attention_mask: np.ndarray | None, cache: ModelCache | None, B: int, T: int
) -> tuple[np.ndarray | None, np.ndarray]:
    P = cache.layers[0].k.shape[2] if cache else 0
    if attention_mask is None and cache and cache.mask is not None:
        attention_mask = np.concatenate([cache.mask, np.ones((B, T), dtype=bool)], axis=1)
    if attention_mask is None:
        return None, np.arange(P, P + T)[None]
    mask = np.asarray(attention_mask) != 0
    return mask, (mask.cumsum(axis=1) - 1).clip(0)[:, P:]


def _layer_weights(weights: Weights, i: int) -> dict[str, np.ndarray]:
    prefix = f"model.layers.{i}."
    return {name[len(prefix) :]: w for name, w in weights.items() if name.startswith(prefix)}


def _model(
    config: SessaConfig,
    weights: Weights,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None,
    cache: ModelCache | None,
) -> SimpleNamespace:
    B, T = np.shape(input_ids)
    mask, positions = _mask_and_positions(attention_mask, cache, B, T)
    x, layers = f64(weights["model.embed_tokens.weight"])[np.asarray(input_ids)], []
    for i in range(config.num_hidden_layers):
        past = cache.layers[i] if cache else None
        c = _layer(config, _layer_weights(weights, i), x, past, positions, mask)
        layers.append(c)
        x = c.y
        if cache:
            cache.layers[i] = c.cache
    if cache:
        cache.mask = mask
    norm = (f64(weights["model.norm.weight"]), f64(weights["model.norm.bias"]))
    normed = layer_norm(x, *norm, config.layer_norm_eps)
    return SimpleNamespace(x=x, normed=normed, layers=layers)


def _head(config: SessaConfig, weights: Weights) -> np.ndarray:
    tied = config.tie_word_embeddings
    return f64(weights["model.embed_tokens.weight" if tied else "lm_head.weight"])


def model_logits(
    config: SessaConfig,
    weights: Weights,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None = None,
    cache: ModelCache | None = None,
) -> np.ndarray:
    """Logits (B, T, V) of input_ids (B, T); weights by the names of `parameter_shapes`.

    attention_mask (B, P+T), nonzero for a real token. A cache is grown in place by T tokens; it
    remembers a mask given once, and later tokens count as real.
    """
    c = _model(config, weights, input_ids, attention_mask, cache)
    return c.normed @ _head(config, weights).T


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


def model_backward(
    config: SessaConfig,
    weights: Weights,
    input_ids: np.ndarray,
    dlogits: np.ndarray,
    attention_mask: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Gradient of every weight, given dlogits (B, T, V) at the logits of `model_logits`."""
    c = _model(config, weights, input_ids, attention_mask, None)
    head = _head(config, weights)
    flat = f64(dlogits).reshape(-1, head.shape[0])
    dhead = flat.T @ c.normed.reshape(-1, head.shape[1])
    dx, dweight, dbias = layer_norm_backward(
        dlogits @ head, c.x, f64(weights["model.norm.weight"]), config.layer_norm_eps
    )
    grads = {"model.norm.weight": dweight, "model.norm.bias": dbias}
    for i in reversed(range(config.num_hidden_layers)):
        dx, layer = _backward(config, _layer_weights(weights, i), c.layers[i], dx)
        grads |= {f"model.layers.{i}.{name}": gradient for name, gradient in layer.items()}
    dembed = dhead if config.tie_word_embeddings else np.zeros_like(dhead)
    np.add.at(dembed, np.asarray(input_ids), dx)
    grads["model.embed_tokens.weight"] = dembed
    if not config.tie_word_embeddings:
        grads["lm_head.weight"] = dhead
    return grads
