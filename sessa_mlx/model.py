"""The Sessa language model: embedding, gated blocks, final norm, tied or untied head."""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from sessa_common.config import SessaConfig
from sessa_mlx.attention import Rope, rope_tables
from sessa_mlx.cache import LayerCache, SessaCache
from sessa_mlx.mixer import SessaMixer


class SessaLayer(nn.Module):
    """One pre-norm gated block: y = x + W_out(mixer(gelu(a)) * g), a and g the halves of W_in."""

    def __init__(self, config: SessaConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.ln = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.W_in = nn.Linear(D, 2 * D)
        self.mixer = SessaMixer(config)
        self.W_out = nn.Linear(D, D)

    def __call__(
        self,
        x: mx.array,  # (B, T, D)
        *,
        rope: Rope | None = None,
        cache: LayerCache | None = None,
        key_mask: mx.array | None = None,  # (B, P+T)
    ) -> mx.array:
        """Apply the block to x (B, T, D); rope comes from `rope_tables`, None switches it off."""
        a, g = mx.split(self.W_in(self.ln(x)), 2, -1)
        s = self.mixer(nn.gelu(a), rope=rope, cache=cache, key_mask=key_mask)
        return x + self.W_out(s * g)


class SessaBackbone(nn.Module):
    """Token embedding, the blocks and the final LayerNorm."""

    def __init__(self, config: SessaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [SessaLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(
        self,
        input_ids: mx.array,  # (B, T)
        *,
        cache: SessaCache | None = None,
        attention_mask: mx.array | None = None,  # (B, P+T)
    ) -> mx.array:
        """Hidden states (B, T, D) after the final norm."""
        x = self.embed_tokens(input_ids)
        past = cache.length if cache is not None else 0
        if cache is not None:
            mask = cache.extend(input_ids.shape[1], attention_mask)
        else:
            mask = None if attention_mask is None else attention_mask.astype(mx.bool_)
        rope = self._rope(past, input_ids, mask, x.dtype) if self.config.use_forward_rope else None
        for i, layer in enumerate(self.layers):
            layer_cache = cache.layers[i] if cache is not None else None
            x = layer(x, rope=rope, cache=layer_cache, key_mask=mask)
        return self.norm(x)

    def _rope(self, past: int, input_ids: mx.array, mask: mx.array | None, dtype: mx.Dtype) -> Rope:
        if mask is None:
            positions = mx.arange(past, past + input_ids.shape[1])[None]
        else:
            positions = mx.maximum(mx.cumsum(mask.astype(mx.int32), -1) - 1, 0)[:, past:]
        return rope_tables(positions, self.config.head_dim, self.config.rope_theta, dtype)


class SessaModel(nn.Module):
    """A Sessa language model; parameter names are the keys of the checkpoint."""

    def __init__(self, config: SessaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = SessaBackbone(config)
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
