"""The language model: embedding, one block for each layer, final norm, head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from sessa_common.config import SessaConfig
from sessa_common.layer_kinds import KINDS, LayerKind
from sessa_torch.attention import AttentionMixer, Rope, rope_of
from sessa_torch.cache import Mamba2LayerCache, SessaCache, SessaLayerCache
from sessa_torch.mamba2 import Mamba2Mixer
from sessa_torch.mixer import SessaMixer

MIXERS = {"attention": AttentionMixer, "sessa": SessaMixer}
NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
# The operators whose work grows with the square of a row's length.
QUADRATIC = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._flash_attention_forward.default,
    torch.ops.higher_order.flex_attention,
    torch.ops.sessa.feedback_solve.default,
}


class SessaLayer(nn.Module):
    """The pre-norm gated block: y = x + W_out(mixer(gelu(a)) * g), a and g the halves of W_in.

    Alone, `SessaLayer(config)` is the layer of the author's release. The kind "gated_attention" is
    the same block without the feedback.
    """

    def __init__(self, config: SessaConfig, kind: LayerKind = KINDS["sessa"]) -> None:
        super().__init__()
        D = config.hidden_size
        self.ln = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.W_in = nn.Linear(D, 2 * D)
        self.mixer = MIXERS[kind.mixer](config, gated=True)
        self.W_out = nn.Linear(D, D)

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        *,
        rope: Rope | None = None,
        cache: SessaLayerCache | None = None,
        key_mask: Tensor | None = None,  # (B, P+T)
        document_starts: Tensor | None = None,  # (B, T)
    ) -> Tensor:
        """Apply the block to x (B, T, D); the other arguments as in `AttentionMixer`."""
        a, g = self.W_in(self.ln(x)).chunk(2, -1)
        s = self.mixer(
            F.gelu(a), rope=rope, cache=cache, key_mask=key_mask, document_starts=document_starts
        )
        return x + self.W_out(s * g)

    def mixer_input(self, x: Tensor) -> Tensor:
        """The input a (B, T, D) of the mixer for x (B, T, D)."""
        return F.gelu(self.W_in(self.ln(x)).chunk(2, -1)[0])


class MLP(nn.Module):
    """down_proj(gelu(up_proj(x))), D -> intermediate_size -> D.

    The type "swiglu" is down_proj(silu(gate_proj(x)) * up_proj(x)).
    """

    def __init__(self, config: SessaConfig) -> None:
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gated = config.mlp_type == "swiglu"
        if self.gated:
            self.gate_proj = nn.Linear(D, inner, bias=bias)
        self.up_proj = nn.Linear(D, inner, bias=bias)
        self.down_proj = nn.Linear(inner, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (B, T, D)."""
        if self.gated:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(F.gelu(self.up_proj(x)))


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

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        *,
        rope: Rope | None = None,
        cache: SessaLayerCache | None = None,
        key_mask: Tensor | None = None,  # (B, P+T)
        document_starts: Tensor | None = None,  # (B, T)
    ) -> Tensor:
        """Apply the block to x (B, T, D); the other arguments as in `AttentionMixer`."""
        x = x + self.mixer(
            self.ln(x), rope=rope, cache=cache, key_mask=key_mask, document_starts=document_starts
        )
        return x + self.mlp(self.ln_mlp(x))

    def mixer_input(self, x: Tensor) -> Tensor:
        """The input a (B, T, D) of the mixer for x (B, T, D)."""
        return self.ln(x)


class Mamba2Layer(nn.Module):
    """x = x + mamba2(rmsnorm(x)); the layer has no positions, so `rope` is not read."""

    def __init__(self, config: SessaConfig) -> None:
        super().__init__()
        self.ln = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = Mamba2Mixer(config)

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        *,
        rope: Rope | None = None,
        cache: Mamba2LayerCache | None = None,
        key_mask: Tensor | None = None,  # (B, P+T)
        document_starts: Tensor | None = None,  # (B, T)
    ) -> Tensor:
        """Apply the block to x (B, T, D)."""
        return x + self.mixer(
            self.ln(x), cache=cache, key_mask=key_mask, document_starts=document_starts
        )


def new_layer(config: SessaConfig, kind: LayerKind) -> nn.Module:
    """A layer of the given kind."""
    if kind.block == "mamba2":
        return Mamba2Layer(config)
    return (SessaLayer if kind.block == "gated" else TransformerLayer)(config, kind)


def _run(layer: nn.Module, x: Tensor, **rest: Any) -> Tensor:
    y: Tensor = layer(x, **rest)
    return y


def _checkpointed(layer: nn.Module, x: Tensor, options: Mapping[str, Any], **rest: Any) -> Tensor:
    """`_run`, which the backward pass repeats instead of keeping what the layer computes."""
    y: Tensor = checkpoint(layer, x, use_reentrant=False, **options, **rest)
    return y


def _kept(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Say that results of attention and of the feedback solve are kept, and others repeated."""
    keep, repeat = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
    return keep if operator in QUADRATIC else repeat


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
        self.layers = nn.ModuleList(new_layer(config, kind) for kind in config.kinds)
        self.norm = NORMS[config.final_norm](config.hidden_size, eps=config.layer_norm_eps)
        self.checkpoint_layers = self._keeps_attention = False
        # Sessa draws no random numbers; an adapter's dropout must be the same when it is repeated.
        self._preserve_rng_state = False
        # `sessa_torch.distributed` replaces it where processes share the tokens of a row.
        self.rope_of: Callable[..., Rope | None] = rope_of

    def forward(
        self,
        input_ids: Tensor,  # (B, T), or (B, T, D)
        *,
        cache: SessaCache | None = None,
        attention_mask: Tensor | None = None,  # (B, P+T)
        document_starts: Tensor | None = None,  # (B, T)
    ) -> Tensor:
        """Hidden states (B, T, D) after the final norm, for token ids or for their embeddings.

        document_starts are, for each position, the first one of its document in the row; documents
        do not read each other. Raises ValueError when they come with a cache or a mask.
        """
        if document_starts is not None and (cache is not None or attention_mask is not None):
            raise ValueError("document_starts goes with neither cache nor attention_mask")
        x = input_ids if input_ids.is_floating_point() else self.embed_tokens(input_ids)
        past = cache.length if cache is not None else 0
        if cache is not None:
            mask = cache.extend(x.shape[1], attention_mask)
        else:
            mask = None if attention_mask is None else attention_mask.bool()
        masks = {"key_mask": mask, "document_starts": document_starts}
        documents = {} if document_starts is None else {"document_starts": document_starts}
        rotates = self.config.rotates
        rope = self.rope_of(self.config, x, past, mask, **documents) if rotates else None
        run = _run
        if self.checkpoint_layers and cache is None:
            options: dict[str, Any] = {"preserve_rng_state": self._preserve_rng_state}
            if self._keeps_attention:
                options["context_fn"] = partial(create_selective_checkpoint_contexts, _kept)
            run = partial(_checkpointed, options=options)
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

    def forward(
        self,
        input_ids: Tensor,  # (B, T)
        *,
        cache: SessaCache | None = None,
        attention_mask: Tensor | None = None,  # (B, P+T)
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Logits (B, T, V) for token ids (B, T).

        attention_mask, nonzero for real tokens, covers the cached past and the new tokens, or the
        new ones alone; a cache remembers it. logits_to_keep > 0 gives only the last positions.
        """
        x = self.model(input_ids, cache=cache, attention_mask=attention_mask)
        if logits_to_keep:
            x = x[:, -logits_to_keep:]
        if self.config.tie_word_embeddings:
            return F.linear(x, self.model.embed_tokens.weight)
        return self.lm_head(x)
