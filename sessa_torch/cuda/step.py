"""New tokens behind a cache on CUDA: eight kernels for a Sessa layer, and no look at the host.

The kernels read the weights of the model's own modules, and the caches where they lie. For a step
of a few tokens the length of the caches is on the device, so that one captured graph serves growing
lengths. A short prompt takes the same kernels but for attention and solve: the host, which has to
start four times as many kernels for the modules, would take longer than the device.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sessa_torch.attention import causal_attention
from sessa_torch.cache import Mamba2LayerCache, SessaCache, SessaLayerCache
from sessa_torch.cuda.attention import attend
from sessa_torch.cuda.linear import Norm, linear
from sessa_torch.cuda.projection import Feedback, project
from sessa_torch.feedback.cuda import solve_forward
from sessa_torch.feedback.cuda_decode import read_past, solve_behind
from sessa_torch.model import SessaForCausalLM, SessaLayer


@dataclass(frozen=True, kw_only=True)
class Place:
    """The place of the new tokens, on the device: what does not differ between layers."""

    length: Tensor  # (), int32: positions cached before the step
    hidden: Tensor  # (B,), int32: how many of them are padding
    mask: Tensor | None  # (B, capacity)
    rope: tuple[Tensor, Tensor] | None  # (capacity, d) each
    past: int | None = None  # the value of `length` for a prompt; None for a step


def run_step(
    model: SessaForCausalLM, cache: SessaCache, ids: Tensor, place: Place, keep: int = 0
) -> Tensor:
    """Logits (B, T, V) float32 of new tokens ids (B, T), whose rows are written into the caches.

    keep > 0 gives only the last positions. A prompt must have no padding. Every buffer of the cache
    has room for the tokens; neither `cache.length` nor `place` is changed.
    """
    B, T = ids.shape
    x = model.model.embed_tokens.weight[ids.flatten()]  # (B T, D)
    for layer, rows in zip(model.model.layers, cache.layers, strict=True):
        if isinstance(rows, Mamba2LayerCache):
            x = _mamba2_layer(layer, x, rows, B)
        elif isinstance(layer, SessaLayer):
            x = _gated_layer(layer, x, rows, place, B)
        else:
            x = _standard_layer(layer, x, rows, place, B)
    if keep:
        x = x.view(B, T, -1)[:, -keep:].flatten(0, 1)
    tied = model.config.tie_word_embeddings
    head = model.model.embed_tokens.weight if tied else model.lm_head.weight
    if len(x) == 1:
        logits = linear(x, head, norm=_norm(model.model.norm), out=x.new_empty(1, len(head)))
    else:
        logits = F.linear(model.model.norm(x), head)
    return logits.float().view(B, -1, len(head))


def _gated_layer(layer: Any, x: Tensor, rows: SessaLayerCache, place: Place, B: int) -> Tensor:
    R, D = x.shape
    inner = x.new_empty(R, 2 * D)
    linear(x, layer.W_in.weight, layer.W_in.bias, norm=_norm(layer.ln), gelu=D, out=inner)
    a, g = inner[:, :D], inner[:, D:]
    mixed = _mix(layer.mixer, a, None, rows, place, B)
    out = torch.empty_like(x)
    return linear(mixed, layer.W_out.weight, layer.W_out.bias, times=g, residual=x, out=out)


def _standard_layer(layer: Any, x: Tensor, rows: SessaLayerCache, place: Place, B: int) -> Tensor:
    mixer, mlp = layer.mixer, layer.mlp
    up, down = mlp.up_proj, mlp.down_proj
    feeds_back = rows.s.buffer is not None
    mixed = _mix(mixer, x, layer.ln, rows, place, B, residual=None if feeds_back else x)
    # Without feedback the output projection has added the residual.
    x, states = (x, mixed) if feeds_back else (mixed, None)
    inner = x.new_empty(len(x), up.out_features)
    gate = (mlp.gate_proj.weight, mlp.gate_proj.bias) if mlp.gated else None
    linear(
        x,
        up.weight,
        up.bias,
        norm=_norm(layer.ln_mlp),
        plus=states,
        gelu=0 if mlp.gated else up.out_features,
        gate=gate,
        out=inner,
    )
    out = torch.empty_like(x)
    return linear(inner, down.weight, down.bias, residual=x, more=states, out=out)


def _mix(
    mixer: Any,
    a: Tensor,  # (B T, D)
    norm: nn.Module | None,
    rows: SessaLayerCache,
    place: Place,
    B: int,
    residual: Tensor | None = None,
) -> Tensor:
    """The mixer's result for the rows a, after `norm` where there is one, as (B T, D)."""
    config, (R, D) = mixer.config, a.shape
    k, v, k_fb, s = (held.buffer for held in (rows.k, rows.v, rows.k_fb, rows.s))
    assert k is not None and v is not None
    T, feedback = R // B, None
    q = a.new_empty(R, config.num_attention_heads * config.head_dim)
    if k_fb is not None:
        proj, gain = mixer.proj_fb, (mixer.gamma_ctx.weight, mixer.gamma_bias)
        feedback = Feedback(
            proj=(proj.weight, proj.bias),
            gain=gain,
            most=config.gamma_max,
            keys=k_fb,
            queries=a.new_empty(R, k_fb.shape[2]),
            gamma=a.new_empty(R, dtype=torch.float32),
        )
    project(
        a,
        (mixer.q_proj.weight, mixer.k_proj.weight, mixer.v_proj.weight),
        (mixer.q_proj.bias, mixer.k_proj.bias, mixer.v_proj.bias) if config.qkv_bias else None,
        norm=None if norm is None else _norm(norm),
        head_norms=(_norm(mixer.q_norm), _norm(mixer.k_norm)) if config.qk_norm else None,
        rope=place.rope,
        length=place.length,
        hidden=place.hidden,
        keys=k,
        values=v,
        feedback=feedback,
        out=q,
    )
    # What enters the solve is float32, like the states.
    wide = torch.float32 if feedback is not None else a.dtype
    heads = q.view(B, T, config.num_attention_heads, config.head_dim)
    shares = None
    if place.past is not None:
        keys, values = (x[:, :, : place.past + T] for x in (k, v))
        f = causal_attention(heads.transpose(1, 2), keys, values).transpose(1, 2).reshape(R, -1)
    else:
        f = torch.empty_like(q, dtype=a.dtype if mixer.projects else wide)
        if feedback is not None and s is not None:
            # The past is read before f is known; attention starts while that ends.
            queries = feedback.queries.view(B, T, -1)
            given = (queries, feedback.keys, s, place.mask)
            shares = read_past(*given, length=place.length, chained=True)
        seen = (place.length, place.mask)
        attend(heads, k, v, *seen, unrelated=shares is not None, out=f.view(heads.shape))
    if mixer.projects:
        out = a.new_empty(R, D, dtype=wide)
        f = linear(f, mixer.out_proj.weight, mixer.out_proj.bias, residual=residual, out=out)
    if feedback is None or s is None:
        return f
    gamma = feedback.gamma.view(B, T)
    if shares is not None:
        return solve_behind(f.view(B, T, D), gamma, shares, append=True)[0].view(R, D)
    return _solve_prompt(f.view(B, T, D), feedback, s, place.past or 0).view(R, D)


def _solve_prompt(f: Tensor, feedback: Feedback, states: Tensor, P: int) -> Tensor:
    """The solved rows (B, T, D), which are also written behind the P cached ones."""
    B, T, _ = f.shape
    q, k = feedback.queries.view(B, T, -1), feedback.keys[:, : P + T]
    past = states[:, :P] if P else None
    # Without the checks of `feedback_solve`, which take the host longer than the launch.
    s, _ = solve_forward(f.to(states.dtype), q, k, feedback.gamma.view(B, T), past)
    states[:, P : P + T] = s
    return s


def _mamba2_layer(layer: Any, x: Tensor, rows: Mamba2LayerCache, B: int) -> Tensor:
    """The module itself; its new state is written where an old one lies."""
    old: Any = copy.copy(rows)
    y = layer(x.view(B, -1, x.shape[1]), cache=rows)
    if old.conv is not None:
        old.conv.copy_(rows.conv)
        old.state.copy_(rows.state)
        rows.conv, rows.state = old.conv, old.state
    return y.flatten(0, 1)


def _norm(norm: Any) -> Norm:
    return Norm(weight=norm.weight, bias=getattr(norm, "bias", None), eps=norm.eps)
