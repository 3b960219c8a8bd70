"""The layers and the language model in float64 NumPy, gradients written out: judge of all others.

Letters and equations as in `sessa_common.reference.ops`, which has the operators. The kind of a
layer is read from the names of its weights; the Mamba-2 block has no gradients here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError
from sessa_common.layer_kinds import infer_kind
from sessa_common.reference.mamba2 import Mamba2LayerCache, empty_mamba_cache, mamba2_layer
from sessa_common.reference.ops import (
    attention,
    attention_backward,
    cross_entropy,
    f64,
    feedback_solve,
    feedback_solve_backward,
    feedback_weights,
    gelu,
    gelu_derivative,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
    rotate,
    silu,
    silu_derivative,
    uniform_kernel,
)

__all__ = [
    "Mamba2LayerCache",
    "ModelCache",
    "SessaLayerCache",
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
NO_GRADIENTS = (
    "the NumPy reference has no gradients of a Mamba-2 layer; take those of PyTorch in float64"
)


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


class SessaLayerCache(NamedTuple):
    """The P past tokens of one layer; k_fb and s stay empty without feedback."""

    k: np.ndarray  # (B, G, P, d), after RoPE
    v: np.ndarray  # (B, G, P, d)
    k_fb: np.ndarray  # (B, P, K)
    s: np.ndarray  # (B, P, D)


def empty_layer_cache(config: SessaConfig, B: int) -> SessaLayerCache:
    """A cache of zero tokens for B sequences in a layer with attention."""
    heads = np.zeros((B, config.num_key_value_heads, 0, config.head_dim))
    k_fb = np.zeros((B, 0, config.feedback_key_dim))
    return SessaLayerCache(heads, heads, k_fb, np.zeros((B, 0, config.hidden_size)))


def _layer(
    config: SessaConfig,
    weights: Weights,
    x: np.ndarray,
    past: SessaLayerCache | Mamba2LayerCache | None = None,
    positions: np.ndarray | None = None,
    key_mask: np.ndarray | None = None,
    document_starts: np.ndarray | None = None,
) -> SimpleNamespace:
    """One layer with all of its intermediate results, which `_backward` reads."""
    kind = infer_kind(weights)
    if positions is None and document_starts is not None:
        positions = np.arange(x.shape[1]) - document_starts
    c = SimpleNamespace(x=f64(x), positions=positions, kind=kind)
    c.masks = (key_mask, document_starts)
    if kind.block == "mamba2":
        assert not isinstance(past, SessaLayerCache)
        c.y, c.cache = mamba2_layer(config, weights, c.x, past, key_mask, document_starts)
        return c
    assert not isinstance(past, Mamba2LayerCache)
    past = past or empty_layer_cache(config, len(x))
    c.normed = _norm(config, weights, "ln", c.x)
    block = _standard_block if kind.block == "standard" else _gated_block
    block(config, weights, c, past)
    return c


def _norm(config: SessaConfig, weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    """LayerNorm where the norm has a bias, RMSNorm where it has none."""
    weight, bias = f64(weights[f"{name}.weight"]), weights.get(f"{name}.bias")
    if bias is None:
        return rms_norm(x, weight, config.layer_norm_eps)
    return layer_norm(x, weight, f64(bias), config.layer_norm_eps)


def _gated_block(
    config: SessaConfig, weights: Weights, c: SimpleNamespace, past: SessaLayerCache
) -> None:
    c.a, c.g = np.split(_linear(weights, "W_in", c.normed), 2, axis=-1)
    c.mixer_in = gelu(c.a)
    _mix(config, weights, c, past)
    c.y = c.x + _linear(weights, "W_out", c.s * c.g)


def _standard_block(
    config: SessaConfig, weights: Weights, c: SimpleNamespace, past: SessaLayerCache
) -> None:
    c.mixer_in = c.normed
    _mix(config, weights, c, past)
    c.middle = c.x + c.s
    c.normed_mlp = _norm(config, weights, "ln_mlp", c.middle)
    c.up = _linear(weights, "mlp.up_proj", c.normed_mlp)
    if config.mlp_type == "swiglu":
        c.gate = _linear(weights, "mlp.gate_proj", c.normed_mlp)
        c.inner = silu(c.gate) * c.up
    else:
        c.inner = gelu(c.up)
    c.y = c.middle + _linear(weights, "mlp.down_proj", c.inner)


def _mix(config: SessaConfig, weights: Weights, c: SimpleNamespace, past: SessaLayerCache) -> None:
    """c.mixer_in -> c.s: attention, then the feedback solve where the layer has one."""
    _attention(config, weights, c, past)
    c.s = c.f
    if c.kind.feeds_back:
        _feedback(config, weights, c, past)


def _attention(
    config: SessaConfig, weights: Weights, c: SimpleNamespace, past: SessaLayerCache
) -> None:
    P, T = past.k.shape[2], c.x.shape[1]
    c.positions = np.arange(P, P + T)[None] if c.positions is None else c.positions
    c.q = _split_heads(_linear(weights, "mixer.q_proj", c.mixer_in), config.num_attention_heads)
    k = _split_heads(_linear(weights, "mixer.k_proj", c.mixer_in), config.num_key_value_heads)
    v = _split_heads(_linear(weights, "mixer.v_proj", c.mixer_in), config.num_key_value_heads)
    c.heads_before_norm = {"q": c.q, "k": k}
    if config.qk_norm:
        c.q = _norm(config, weights, "mixer.q_norm", c.q)
        k = _norm(config, weights, "mixer.k_norm", k)
    if config.use_forward_rope:
        c.q = rotate(c.q, c.positions, config.rope_theta, config.rope_scaling)
        k = rotate(k, c.positions, config.rope_theta, config.rope_scaling)
    c.k, c.v = np.concatenate([past.k, k], axis=2), np.concatenate([past.v, v], axis=2)
    c.heads = _join_heads(attention(c.q, c.k, c.v, *c.masks))
    projects = "mixer.out_proj.weight" in weights
    c.f = _linear(weights, "mixer.out_proj", c.heads) if projects else c.heads
    c.cache = past._replace(k=c.k, v=c.v)


def _feedback(
    config: SessaConfig, weights: Weights, c: SimpleNamespace, past: SessaLayerCache
) -> None:
    c.q_fb, k_fb = np.split(_linear(weights, "mixer.proj_fb", c.mixer_in), 2, axis=-1)
    c.k_fb = np.concatenate([past.k_fb, k_fb], axis=1)
    gain = _linear(weights, "mixer.gamma_ctx", c.mixer_in)[..., 0]
    c.tanh = np.tanh(gain + f64(weights["mixer.gamma_bias"]))
    c.gamma = config.gamma_max * c.tanh
    c.s = feedback_solve(c.f, c.q_fb, c.k_fb, c.gamma, past.s, *c.masks)
    c.cache = SessaLayerCache(c.k, c.v, c.k_fb, np.concatenate([past.s, c.s], axis=1))


def layer_forward(
    config: SessaConfig,
    weights: Weights,
    x: np.ndarray,
    *,
    positions: np.ndarray | None = None,
    key_mask: np.ndarray | None = None,
    document_starts: np.ndarray | None = None,
) -> np.ndarray:
    """One layer on whole sequences, x (B, T, D) -> y (B, T, D).

    weights by the names of `parameter_shapes` without the layer's prefix; key_mask (B, T) and
    document_starts (B, T).
    """
    return _layer(config, weights, x, None, positions, key_mask, document_starts).y


def layer_decode(
    config: SessaConfig,
    weights: Weights,
    x: np.ndarray,
    cache: SessaLayerCache | Mamba2LayerCache | None = None,
    *,
    positions: np.ndarray | None = None,
    key_mask: np.ndarray | None = None,
) -> tuple[np.ndarray, SessaLayerCache | Mamba2LayerCache]:
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
    document_starts: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Gradients of `layer_forward`: dx (B, T, D), and one array a weight, by its name.

    Raises SessaError for a Mamba-2 layer.
    """
    c = _layer(config, weights, x, None, positions, key_mask, document_starts)
    return _backward(config, weights, c, dy)


def _backward(
    config: SessaConfig, weights: Weights, c: SimpleNamespace, dy: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    if c.kind.block == "mamba2":
        raise SessaError(NO_GRADIENTS)
    grads: dict[str, np.ndarray] = {}
    block = _standard_backward if c.kind.block == "standard" else _gated_backward
    dresidual, dnormed = block(config, weights, c, f64(dy), grads)
    dx = _norm_backward(config, weights, "ln", c.x, dnormed, grads)
    return dresidual + dx, grads


def _norm_backward(
    config: SessaConfig,
    weights: Weights,
    name: str,
    x: np.ndarray,
    dy: np.ndarray,
    grads: dict[str, np.ndarray],
) -> np.ndarray:
    weight, eps = f64(weights[f"{name}.weight"]), config.layer_norm_eps
    if f"{name}.bias" not in weights:
        dx, grads[f"{name}.weight"] = rms_norm_backward(dy, x, weight, eps)
        return dx
    dx, grads[f"{name}.weight"], grads[f"{name}.bias"] = layer_norm_backward(dy, x, weight, eps)
    return dx


def _gated_backward(
    config: SessaConfig,
    weights: Weights,
    c: SimpleNamespace,
    dy: np.ndarray,
    grads: dict[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients at the residual stream and at the normed input."""
    dgated = _linear_backward(weights, "W_out", c.s * c.g, dy, grads)
    dmixer_in = _mix_backward(config, weights, c, dgated * c.g, grads)
    dag = np.concatenate([dmixer_in * gelu_derivative(c.a), dgated * c.s], axis=-1)
    return dy, _linear_backward(weights, "W_in", c.normed, dag, grads)


def _standard_backward(
    config: SessaConfig,
    weights: Weights,
    c: SimpleNamespace,
    dy: np.ndarray,
    grads: dict[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients at the residual stream and at the normed input."""
    dinner = _linear_backward(weights, "mlp.down_proj", c.inner, dy, grads)
    if config.mlp_type == "swiglu":
        dgate = dinner * c.up * silu_derivative(c.gate)
        dnormed = _linear_backward(weights, "mlp.gate_proj", c.normed_mlp, dgate, grads)
        dup = dinner * silu(c.gate)
    else:
        dnormed, dup = np.zeros_like(c.normed_mlp), dinner * gelu_derivative(c.up)
    dnormed += _linear_backward(weights, "mlp.up_proj", c.normed_mlp, dup, grads)
    dmiddle = dy + _norm_backward(config, weights, "ln_mlp", c.middle, dnormed, grads)
    return dmiddle, _mix_backward(config, weights, c, dmiddle, grads)


def _mix_backward(
    config: SessaConfig,
    weights: Weights,
    c: SimpleNamespace,
    ds: np.ndarray,
    grads: dict[str, np.ndarray],
) -> np.ndarray:
    """The gradient at c.mixer_in, given the one at c.s."""
    if not c.kind.feeds_back:
        return _attention_backward(config, weights, c, ds, grads)
    df, dq_fb, dk_fb, dgamma, _ = feedback_solve_backward(
        ds, c.f, c.q_fb, c.k_fb, c.gamma, None, *c.masks
    )
    dfb = np.concatenate([dq_fb, dk_fb], axis=-1)
    dmixer_in = _linear_backward(weights, "mixer.proj_fb", c.mixer_in, dfb, grads)
    dgain = (config.gamma_max * (1 - c.tanh**2) * dgamma)[..., None]
    dmixer_in += _linear_backward(weights, "mixer.gamma_ctx", c.mixer_in, dgain, grads)
    grads["mixer.gamma_bias"] = dgain.sum()
    return dmixer_in + _attention_backward(config, weights, c, df, grads)


def _attention_backward(
    config: SessaConfig,
    weights: Weights,
    c: SimpleNamespace,
    df: np.ndarray,
    grads: dict[str, np.ndarray],
) -> np.ndarray:
    if "mixer.out_proj.weight" in weights:
        df = _linear_backward(weights, "mixer.out_proj", c.heads, df, grads)
    dheads = _split_heads(df, config.num_attention_heads)
    dq, dk, dv = attention_backward(dheads, c.q, c.k, c.v, *c.masks)
    if config.use_forward_rope:
        dq = rotate(dq, -c.positions, config.rope_theta, config.rope_scaling)
        dk = rotate(dk, -c.positions, config.rope_theta, config.rope_scaling)
    if config.qk_norm:
        before = c.heads_before_norm
        dq = _norm_backward(config, weights, "mixer.q_norm", before["q"], dq, grads)
        dk = _norm_backward(config, weights, "mixer.k_norm", before["k"], dk, grads)
    dmixer_in = np.zeros_like(c.mixer_in)
    for name, gradient in (("q_proj", dq), ("k_proj", dk), ("v_proj", dv)):
        joined = _join_heads(gradient)
        dmixer_in += _linear_backward(weights, f"mixer.{name}", c.mixer_in, joined, grads)
    return dmixer_in


@dataclass
class ModelCache:
    """The layers' caches and the mask (B, P) of the tokens in them, None when all are real."""

    layers: list[SessaLayerCache | Mamba2LayerCache]
    mask: np.ndarray | None = None
    length: int = 0


def empty_cache(config: SessaConfig, B: int) -> ModelCache:
    """A cache of zero tokens for the whole model, B sequences."""
    return ModelCache(
        [
            empty_layer_cache(config, B) if kind.attends else empty_mamba_cache(config, B)
            for kind in config.kinds
        ]
    )


def _mask_and_positions(
    attention_mask: np.ndarray | None, cache: ModelCache | None, B: int, T: int
) -> tuple[np.ndarray | None, np.ndarray]:
    P = cache.length if cache else 0
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
        cache.length += T
    normed = _norm(config, weights, "model.norm", x)
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


def model_backward(
    config: SessaConfig,
    weights: Weights,
    input_ids: np.ndarray,
    dlogits: np.ndarray,
    attention_mask: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Gradient of every weight, given dlogits (B, T, V) at the logits of `model_logits`.

    Raises SessaError when a layer is Mamba-2.
    """
    if not all(kind.attends for kind in config.kinds):
        raise SessaError(NO_GRADIENTS)
    c = _model(config, weights, input_ids, attention_mask, None)
    head = _head(config, weights)
    flat = f64(dlogits).reshape(-1, head.shape[0])
    dhead = flat.T @ c.normed.reshape(-1, head.shape[1])
    grads: dict[str, np.ndarray] = {}
    dx = _norm_backward(config, weights, "model.norm", c.x, dlogits @ head, grads)
    for i in reversed(range(config.num_hidden_layers)):
        dx, layer = _backward(config, _layer_weights(weights, i), c.layers[i], dx)
        grads |= {f"model.layers.{i}.{name}": gradient for name, gradient in layer.items()}
    dembed = dhead if config.tie_word_embeddings else np.zeros_like(dhead)
    np.add.at(dembed, np.asarray(input_ids), dx)
    grads["model.embed_tokens.weight"] = dembed
    if not config.tie_word_embeddings:
        grads["lm_head.weight"] = dhead
    return grads
