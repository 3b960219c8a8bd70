"""A few tokens behind a cache on a CPU, in few operations: the step that decoding repeats.

For few rows most operations take longer to start than to compute. The step therefore works on rows
(B T, D) instead of (B, T, D), multiplies what a mixer reads by one matrix, rotates queries and keys
together, and computes of the feedback of a single token only what its state needs.

Letters as in `attention` and `mixer`; P is the number of cached positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sessa_torch.attention import Rope, rope_of
from sessa_torch.cache import Mamba2LayerCache, SessaCache, SessaLayerCache
from sessa_torch.feedback.blocked import solve_forward
from sessa_torch.feedback.masking import visible_rows
from sessa_torch.model import SessaForCausalLM, SessaLayer

# The score of a hidden row. It is finite, so that a token that sees no row gets the mean of rows
# that are zero, not NaN.
HIDDEN = -1e30

# Tokens of a sequence up to which starting the operations takes most of the time.
MOST_TOKENS = 16

Project = Callable[[Tensor], Tensor]


def is_supported(model: SessaForCausalLM) -> bool:
    """True for a model on a CPU whose weights have the type in which states are computed."""
    kinds = {(weight.device.type, weight.dtype) for weight in model.parameters()}
    return kinds in ({("cpu", torch.float32)}, {("cpu", torch.float64)})


class TokenStep:
    """Appends at most MOST_TOKENS tokens to the cache of a model, like a call of the model.

    The weights of a mixer's projections become parts of one matrix, so that nothing is held twice.
    Changes of weights in place are seen; when a weight is replaced, a step must be made anew.
    """

    def __init__(self, model: SessaForCausalLM) -> None:
        self.model = model
        with torch.inference_mode(False), torch.no_grad():
            self.layers: list[tuple[Any, Any]] = [
                (layer, _joined_projections(layer.mixer) if kind.attends else None)
                for layer, kind in zip(model.model.layers, model.config.kinds, strict=True)
            ]

    def __call__(
        self,
        cache: SessaCache,
        ids: Tensor,  # (B, T)
        seen: Tensor | None = None,  # (B, T) or (B, P+T)
        keep: int = 0,
    ) -> Tensor:
        """Append ids to a cache that is not empty and return logits (B, T, V).

        seen and keep are the attention mask and `logits_to_keep` of the model's call.
        """
        body, config, past = self.model.model, self.model.config, cache.length
        B, T = ids.shape
        mask = cache.extend(T, seen)
        x = body.embed_tokens(ids)  # (B, T, D)
        turn = _turn(rope_of(config, x, past, mask)) if config.rotates else None
        x = x.view(B * T, -1)
        for (layer, project), rows in zip(self.layers, cache.layers, strict=True):
            if isinstance(rows, Mamba2LayerCache):
                x = layer(x.view(B, T, -1), cache=rows, key_mask=mask).flatten(0, 1)
                continue
            mix = partial(_mix, layer.mixer, project, B, rows=rows, turn=turn, mask=mask)
            if isinstance(layer, SessaLayer):
                a, g = layer.W_in(layer.ln(x)).chunk(2, -1)
                x = x + layer.W_out(mix(_gelu(a)) * g)
            else:
                x = x + mix(layer.ln(x))
                x = x + layer.mlp(layer.ln_mlp(x))
        x = body.norm(x.view(B, T, -1)[:, -keep:])
        tied = config.tie_word_embeddings
        return F.linear(x, body.embed_tokens.weight) if tied else self.model.lm_head(x)


def _joined_projections(mixer: Any) -> Project:
    """A function of a (B, D) that returns all projections of the mixer side by side.

    These are queries, keys and values, and with feedback its queries and keys and the logit of the
    gain. Layers of another kind than `nn.Linear`, such as adapters, are called one by one, and so
    are those of which only some have a bias.
    """
    layers = [mixer.q_proj, mixer.k_proj, mixer.v_proj]
    plain, gain = True, []
    if hasattr(mixer, "proj_fb"):
        layers.append(mixer.proj_fb)
        plain, gain = isinstance(mixer.gamma_ctx, nn.Linear), [mixer.gamma_ctx]
    plain &= all(type(layer) is nn.Linear for layer in layers)
    biases = [layer.bias for layer in layers] + [mixer.gamma_bias for _ in gain]
    if not plain or 0 < sum(bias is None for bias in biases) < len(biases):
        return partial(_project_apart, mixer, layers)
    weight = _join([layer.weight for layer in layers + gain]).view(-1, mixer.q_proj.in_features)
    bias = None if biases[0] is None else _join(biases)
    return lambda a: F.linear(a, weight, bias)


def _project_apart(mixer: Any, layers: list[nn.Module], a: Tensor) -> Tensor:
    found = [layer(a) for layer in layers]
    if hasattr(mixer, "proj_fb"):
        found.append(mixer.gamma_ctx(a) + mixer.gamma_bias)
    return torch.cat(found, -1)


def _join(parts: list[nn.Parameter]) -> Tensor:
    """All numbers of the parameters in one tensor, of which the parameters become parts."""
    counts = [part.numel() for part in parts]
    first, size = parts[0].data_ptr(), parts[0].itemsize
    places = [first + size * before for before in itertools.accumulate([0, *counts[:-1]])]
    storages = {part.untyped_storage().data_ptr() for part in parts}
    if len(storages) == 1 and [part.data_ptr() for part in parts] == places:
        return parts[0].data.as_strided((sum(counts),), (1,))
    joined = torch.cat([part.data.reshape(-1) for part in parts])
    for part, piece in zip(parts, joined.split(counts), strict=True):
        part.data = piece.view(part.shape)
    return joined


def _turn(rope: Rope | None) -> Tensor | None:
    """Tables (B, 1, T, d) as complex numbers (B, T, 1, d/2), with which pairs are multiplied."""
    if rope is None:
        return None
    return torch.complex(rope[0][..., ::2], rope[1][..., 1::2]).transpose(1, 2)


def _mix(
    mixer: Any,
    project: Project,
    B: int,
    a: Tensor,  # (B T, D)
    *,
    rows: SessaLayerCache,
    turn: Tensor | None,  # (B, T, 1, d/2), or (1, T, 1, d/2) without padding
    mask: Tensor | None,  # (B, P+T)
) -> Tensor:
    """The mixer of a (B T, D)."""
    config, T = mixer.config, len(a) // B
    H, G, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    sizes = [(H + G) * d, G * d]
    if hasattr(mixer, "proj_fb"):
        sizes += [2 * config.feedback_key_dim, 1]
    rotated, v, *feedback = project(a).split(sizes, -1)
    if config.qk_norm:
        q, k = rotated.view(B * T, -1, d).split([H, G], 1)
        rotated = torch.cat([mixer.q_norm(q), mixer.k_norm(k)], 1)
    if turn is not None:
        pairs = torch.view_as_complex(rotated.reshape(-1, d // 2, 2)).view(B, T, -1, d // 2)
        rotated = torch.view_as_real(pairs * turn)
    q, k = rotated.view(B, T, -1, d).transpose(1, 2).split([H, G], 1)
    k, v = rows.k.append(k), rows.v.append(v.view(B, T, -1, d).transpose(1, 2))
    single = T == 1 and mask is None
    f = _attend(q, k, v) if single else mixer.attend(q, k, v, mask).transpose(1, 2)
    f = f.reshape(B * T, -1)
    if mixer.projects:
        f = mixer.out_proj(f)
    return _feed_back(mixer, f.view(B, T, -1), feedback, rows, mask) if feedback else f


def _attend(
    q: Tensor,  # (B, H, 1, d)
    k: Tensor,  # (B, G, P+1, d)
    v: Tensor,  # (B, G, P+1, d)
) -> Tensor:
    """Attention without a mask by two products, whose work is shared better than whole heads."""
    (B, H, _, d), G = q.shape, k.shape[1]
    scores = torch.bmm(q.reshape(B * G, H // G, d), k.flatten(0, 1).mT).mul_(d**-0.5)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1))


def _feed_back(
    mixer: Any,
    f: Tensor,  # (B, T, D)
    projected: list[Tensor],  # query and key (B T, 2K), and the logit of the gain (B T, 1)
    rows: SessaLayerCache,
    mask: Tensor | None,  # (B, P+T)
) -> Tensor:
    """The next states s (B T, D); one is f + gain * the mean of the past states."""
    B, T, D = f.shape
    both, logit = (x.view(B, T, -1) for x in projected)
    q, k = both.chunk(2, -1)
    keys, states = rows.k_fb.append(k), rows.s.rows
    assert states is not None
    gain = mixer.config.gamma_max * torch.tanh(logit)
    if T == 1:
        s = torch.addcmul(f, _mean_state(q, keys[:, :-1], states, mask), gain)
    else:
        s, _ = solve_forward(f, q, keys, gain[..., 0], states, mask)
    rows.s.append(s)
    return s.view(B * T, D)


def _mean_state(
    q: Tensor,  # (B, 1, K)
    keys: Tensor,  # (B, P, K)
    states: Tensor,  # (B, P, D)
    mask: Tensor | None,  # (B, P+1)
) -> Tensor:
    """The past states (B, 1, D), weighted by the softmax of their scores."""
    scores = torch.bmm(q, keys.mT).mul_(q.shape[2] ** -0.5)  # (B, 1, P)
    if mask is not None:
        scores.masked_fill_(~mask[:, None, :-1], HIDDEN)
    return torch.bmm(scores.softmax(-1), visible_rows(states, mask))


def _gelu(x: Tensor) -> Tensor:
    """gelu(x); for a single row of float32, PyTorch's own takes several times as long."""
    half = 0.5 * x
    return torch.addcmul(half, half, torch.erf(x * 0.5**0.5))
