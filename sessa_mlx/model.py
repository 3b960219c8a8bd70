"""The language model: embedding, one block for each layer, final norm, head."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain, islice
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from sessa_common.config import SessaConfig
from sessa_common.layer_kinds import KINDS, LayerKind
from sessa_mlx._gelu import gelu
from sessa_mlx._linear import Linear
from sessa_mlx._operator import recorded, replayed
from sessa_mlx.attention import AttentionMixer, Rope, rope_of
from sessa_mlx.cache import Mamba2LayerCache, SessaCache, SessaLayerCache
from sessa_mlx.mamba2 import Mamba2Mixer
from sessa_mlx.mixer import SessaMixer

MIXERS = {"attention": AttentionMixer, "sessa": SessaMixer}
NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class SessaLayer(nn.Module):
    """The pre-norm gated block: y = x + W_out(mixer(gelu(a)) * g), a and g the halves of W_in.

    Alone, `SessaLayer(config)` is the layer of the author's release. The kind "gated_attention" is
    the same block without the feedback.
    """

    def __init__(self, config: SessaConfig, kind: LayerKind = KINDS["sessa"]) -> None:
        super().__init__()
        D = config.hidden_size
        self.ln = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.W_in = Linear(D, 2 * D)
        self.mixer = MIXERS[kind.mixer](config, gated=True)
        self.W_out = Linear(D, D)

    def __call__(
        self,
        x: mx.array,  # (B, T, D)
        *,
        rope: Rope | None = None,
        cache: SessaLayerCache | None = None,
        key_mask: mx.array | None = None,  # (B, P+T)
        document_starts: mx.array | None = None,  # (B, T)
    ) -> mx.array:
        """Apply the block to x (B, T, D); the other arguments as in `AttentionMixer`."""
        a, g = mx.split(self.W_in(self.ln(x)), 2, -1)
        s = self.mixer(
            gelu(a), rope=rope, cache=cache, key_mask=key_mask, document_starts=document_starts
        )
        return x + self.W_out(s * g)

    def mixer_input(self, x: mx.array) -> mx.array:
        """The input a (B, T, D) of the mixer for x (B, T, D)."""
        return gelu(mx.split(self.W_in(self.ln(x)), 2, -1)[0])


class MLP(nn.Module):
    """down_proj(gelu(up_proj(x))), D -> intermediate_size -> D.

    The type "swiglu" is down_proj(silu(gate_proj(x)) * up_proj(x)).
    """

    def __init__(self, config: SessaConfig) -> None:
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gated = config.mlp_type == "swiglu"
        if self.gated:
            self.gate_proj = Linear(D, inner, bias=bias)
        self.up_proj = Linear(D, inner, bias=bias)
        self.down_proj = Linear(inner, D, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        """Apply to x (B, T, D)."""
        if self.gated:
            return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(gelu(self.up_proj(x)))


class TransformerLayer(nn.Module):
    """The standard pre-norm block: x = x + mixer(ln(x)); x = x + mlp(ln_mlp(x)).

    The kind "sessa_transformer" has the feedback behind the attention's output projection.
    """

    def __init__(self, config: SessaConfig, kind: LayerKind = KINDS["transformer"]) -> None:
        super().__init__()
        norm = NORMS[config.norm_type]
        self.ln = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = MIXERS[kind.mixer](config, gated=False)
        self.ln_mlp = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def __call__(
        self,
        x: mx.array,  # (B, T, D)
        *,
        rope: Rope | None = None,
        cache: SessaLayerCache | None = None,
        key_mask: mx.array | None = None,  # (B, P+T)
        document_starts: mx.array | None = None,  # (B, T)
    ) -> mx.array:
        """Apply the block to x (B, T, D); the other arguments as in `AttentionMixer`."""
        x = x + self.mixer(
            self.ln(x), rope=rope, cache=cache, key_mask=key_mask, document_starts=document_starts
        )
        return x + self.mlp(self.ln_mlp(x))

    def mixer_input(self, x: mx.array) -> mx.array:
        """The input a (B, T, D) of the mixer for x (B, T, D)."""
        return self.ln(x)


class Mamba2Layer(nn.Module):
    """x = x + mamba2(rmsnorm(x)); the layer has no positions, so `rope` is not read."""

    def __init__(self, config: SessaConfig) -> None:
        super().__init__()
        self.ln = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = Mamba2Mixer(config)

    def __call__(
        self,
        x: mx.array,  # (B, T, D)
        *,
        rope: Rope | None = None,
        cache: Mamba2LayerCache | None = None,
        key_mask: mx.array | None = None,  # (B, P+T)
        document_starts: mx.array | None = None,  # (B, T)
    ) -> mx.array:
        """Apply the block to x (B, T, D)."""
        return x + self.mixer(
            self.ln(x), cache=cache, key_mask=key_mask, document_starts=document_starts
        )


def new_layer(config: SessaConfig, kind: LayerKind) -> nn.Module:
    """A layer of the given kind."""
    if kind.block == "mamba2":
        return Mamba2Layer(config)
    return (SessaLayer if kind.block == "gated" else TransformerLayer)(config, kind)


def _run(layer: nn.Module, x: mx.array, **rest: Any) -> mx.array:
    return layer(x, **rest)


def _checkpointed(layer: nn.Module, x: mx.array, keeps: bool, **rest: Any) -> mx.array:
    """`_run`, which the backward pass repeats instead of keeping what the layer computes.

    With `keeps` the results of operators, attention and the feedback solve, are kept.
    mx.checkpoint saves little here: MLX may repeat all layers before it needs the first of them,
    and computes the gradients of weights last.
    """
    # MLX differentiates arguments only, so the layer gets its parameters as arguments.
    names, arrays = zip(*tree_flatten(layer.parameters()), strict=True)

    def run(x: mx.array, *arrays: mx.array) -> Any:
        own = layer.parameters()
        layer.update(tree_unflatten(list(zip(names, arrays, strict=True))))
        y = layer(x, **rest)
        layer.update(own)
        return y

    counts: list[int] = []

    def forward(*primals: mx.array) -> tuple[mx.array, ...]:
        with recorded() as results:
            y = run(*primals)
        kept = results if keeps else []
        counts.extend(map(len, kept))
        return (y, *chain(*kept))

    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        kept = iter(outputs[1:])
        results = [tuple(islice(kept, count)) for count in counts]
        again: AbstractContextManager[None] = replayed(results) if keeps else nullcontext()
        with again:
            given = mx.depends(list(primals), [cotangents[0]])
            _, gradients = mx.vjp(run, given, [cotangents[0]])
        return tuple(mx.depends(gradients, gradients))

    checkpointed: Any = mx.custom_function(forward)
    checkpointed.vjp(backward)
    y: mx.array = checkpointed(x, *arrays)[0]
    return y


class SessaModel(nn.Module):
    """Token embedding, the blocks and the final norm.

    With `checkpoint_layers` the backward pass computes each layer again from its input, and the
    forward pass keeps nothing else of it but, with `_keeps_attention`, the results of attention and
    of the feedback solve.
    """

    def __init__(self, config: SessaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [new_layer(config, kind) for kind in config.kinds]
        self.norm = NORMS[config.final_norm](config.hidden_size, eps=config.layer_norm_eps)
        self.checkpoint_layers = self._keeps_attention = False

    def __call__(
        self,
        input_ids: mx.array,  # (B, T)
        *,
        cache: SessaCache | None = None,
        attention_mask: mx.array | None = None,  # (B, P+T)
        document_starts: mx.array | None = None,  # (B, T)
    ) -> mx.array:
        """Hidden states (B, T, D) after the final norm.

        document_starts are, for each position, the first one of its document in the row; documents
        do not read each other. Raises ValueError when they come with a cache or a mask.
        """
        if document_starts is not None and (cache is not None or attention_mask is not None):
            raise ValueError("document_starts goes with neither cache nor attention_mask")
        x = self.embed_tokens(input_ids)
        past = cache.length if cache is not None else 0
        if cache is not None:
            mask = cache.extend(input_ids.shape[1], attention_mask)
        else:
            mask = None if attention_mask is None else attention_mask.astype(mx.bool_)
        rotates = self.config.rotates
        rope = rope_of(self.config, x, past, mask, document_starts) if rotates else None
        masks = {"key_mask": mask, "document_starts": document_starts}
        run = _run
        if self.checkpoint_layers and cache is None:
            run = partial(_checkpointed, keeps=self._keeps_attention)
        for i, layer in enumerate(self.layers):
            layer_cache = cache.layers[i] if cache is not None else None
            x = run(layer, x, rope=rope, cache=layer_cache, **masks)
        return self.norm(x)


class SessaForCausalLM(nn.Module):
    """A language model of any kinds of layers; parameter names are the checkpoint's keys."""

    def __init__(self, config: SessaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = SessaModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(
        self,
        input_ids: mx.array,  # (B, T)
        *,
        cache: SessaCache | None = None,
        attention_mask: mx.array | None = None,  # (B, P+T)
        logits_to_keep: int = 0,
    ) -> mx.array:
        """Logits (B, T, V) for token ids (B, T).

        attention_mask, nonzero for real tokens, covers the cached past and the new tokens, or the
        new ones alone; a cache remembers it. logits_to_keep > 0 gives only the last positions.
        """
        x = self.model(input_ids, cache=cache, attention_mask=attention_mask)
        if logits_to_keep:
            x = x[:, -logits_to_keep:]
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(x)
        return self.lm_head(x)
