"""One token behind a cache on a CPU, in few operations: the step that decoding repeats.

For a single row most operations take longer to start than to compute. The step therefore works on
rows (B, D) instead of (B, 1, D), rotates queries and keys together, and computes of the feedback
only what the next state needs. It calls the model's own linear layers, so adapters apply.

Letters as in `attention` and `mixer`; P is the number of cached positions, B the number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sessa_torch.attention import Rope, rope_of
from sessa_torch.cache import Mamba2LayerCache, SessaCache, SessaLayerCache
from sessa_torch.feedback.masking import visible_rows
from sessa_torch.model import SessaForCausalLM, SessaLayer

# The score of a hidden row. It is finite, so that a token that sees no row gets the mean of rows
# that are zero, not NaN.
HIDDEN = -1e30


def is_supported(model: SessaForCausalLM) -> bool:
    """True for a model on a CPU whose weights have the type in which states are computed."""
    kinds = {(weight.device.type, weight.dtype) for weight in model.parameters()}
    return kinds in ({("cpu", torch.float32)}, {("cpu", torch.float64)})


def append_token(
    model: SessaForCausalLM,
    cache: SessaCache,
    ids: Tensor,  # (B, 1)
    seen: Tensor | None = None,  # (B, 1) or (B, P+1)
) -> Tensor:
    """Append a token to a cache that is not empty and return logits (B, 1, V), as the model does.

    seen is the attention mask of the model's call.
    """
    body, config, past = model.model, model.config, cache.length
    mask = cache.extend(1, seen)
    x = body.embed_tokens(ids[:, 0])
    turn = _turn(rope_of(config, x[:, None], past, mask)) if config.rotates else None
    layer: Any
    for layer, rows in zip(body.layers, cache.layers, strict=True):
        if isinstance(rows, Mamba2LayerCache):
            x = layer(x[:, None], cache=rows, key_mask=mask)[:, 0]
        elif isinstance(layer, SessaLayer):
            a, g = layer.W_in(layer.ln(x)).chunk(2, -1)
            x = x + layer.W_out(_mix(layer.mixer, _gelu(a), rows, turn, mask) * g)
        else:
            x = x + _mix(layer.mixer, layer.ln(x), rows, turn, mask)
            x = x + layer.mlp(layer.ln_mlp(x))
    x = body.norm(x)[:, None]
    return F.linear(x, body.embed_tokens.weight) if config.tie_word_embeddings else model.lm_head(x)


def _turn(rope: Rope | None) -> Tensor | None:
    """Tables (B, 1, 1, d) as complex numbers (B, 1, d/2), with which pairs are multiplied."""
    return None if rope is None else torch.complex(rope[0][:, 0, :, ::2], rope[1][:, 0, :, 1::2])


def _mix(
    mixer: Any,
    a: Tensor,  # (B, D)
    rows: SessaLayerCache,
    turn: Tensor | None,  # (B, 1, d/2), or (1, 1, d/2) without padding
    mask: Tensor | None,  # (B, P+1)
) -> Tensor:
    """The mixer of a (B, D)."""
    B, d = len(a), mixer.config.head_dim
    q, k, v = (project(a).view(B, -1, d) for project in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    if mixer.config.qk_norm:
        q, k = mixer.q_norm(q), mixer.k_norm(k)
    heads = torch.cat([q, k], 1)
    if turn is not None:
        pairs = torch.view_as_complex(heads.view(B, -1, d // 2, 2))
        heads = torch.view_as_real(pairs * turn).view(B, -1, d)
    q, k = heads[:, :, None].split([q.shape[1], k.shape[1]], 1)
    f = mixer.attend(q, rows.k.append(k), rows.v.append(v[:, :, None]), mask).reshape(B, -1)
    if mixer.projects:
        f = mixer.out_proj(f)
    return _feed_back(mixer, a, f, rows, mask) if hasattr(mixer, "proj_fb") else f


def _feed_back(
    mixer: Any,
    a: Tensor,  # (B, D)
    f: Tensor,  # (B, D)
    rows: SessaLayerCache,
    mask: Tensor | None,  # (B, P+1)
) -> Tensor:
    """The next state s (B, D) = f + gamma times the mean of the past states."""
    q, k = mixer.proj_fb(a)[:, None].chunk(2, -1)
    keys, states = rows.k_fb.append(k)[:, :-1], rows.s.rows
    assert states is not None
    scores = torch.bmm(q, keys.mT).mul_(q.shape[2] ** -0.5)  # (B, 1, P)
    if mask is not None:
        scores.masked_fill_(~mask[:, None, :-1], HIDDEN)
    mean = torch.bmm(scores.softmax(-1), visible_rows(states, mask))[:, 0]
    s = torch.addcmul(f, mean, mixer.gain(a)[:, None])
    rows.s.append(s[:, None])
    return s


def _gelu(x: Tensor) -> Tensor:
    """gelu(x); for a single row of float32, PyTorch's own takes several times as long."""
    half = 0.5 * x
    return torch.addcmul(half, half, torch.erf(x * 0.5**0.5))
