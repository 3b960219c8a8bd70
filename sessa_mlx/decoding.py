"""Decoding with a cache in MLX: NumPy token ids in, NumPy logits out."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from sessa_mlx.cache import SessaCache
from sessa_mlx.checkpoint import load_model
from sessa_mlx.model import SessaForCausalLM


class Decoder:
    """`sessa_common.inference.generation.Decoder` on an MLX model."""

    def __init__(self, model: SessaForCausalLM) -> None:
        self.model = model.eval()
        self.config = model.config
        self.reset()

    def reset(self) -> None:
        """Empty the cache."""
        self.cache = SessaCache(self.config)

    def logits(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Append tokens (B, T) and return their logits (B, T, V)."""
        return self._run(tokens, mask, 0)

    def step(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Append tokens (B, T) and return the logits of the last, (B, V)."""
        return self._run(tokens, mask, 1)[:, 0]

    def _run(self, tokens: np.ndarray, mask: np.ndarray | None, keep: int) -> np.ndarray:
        ids = mx.array(tokens.astype(np.int32))
        seen = None if mask is None else mx.array(mask != 0)
        logits = self.model(ids, cache=self.cache, attention_mask=seen, logits_to_keep=keep)
        # Nothing may stay lazy in the cache, or the graph would grow with every token.
        held = [
            getattr(x, "buffer", x) for layer in self.cache.layers for x in vars(layer).values()
        ]
        mx.eval(logits, [array for array in held if array is not None])
        return np.array(logits.astype(mx.float32))


def load_decoder(
    folder: Path | str, *, dtype: str | None = None, device: str | None = None
) -> Decoder:
    """A decoder on the model of a checkpoint folder; arguments and errors as in `load_model`."""
    return Decoder(load_model(folder, dtype=dtype, device=device))
