"""Decoding with a cache in PyTorch: NumPy token ids in, NumPy logits out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sessa_torch.cache import SessaCache
from sessa_torch.checkpoint import load_model
from sessa_torch.model import SessaForCausalLM


class Decoder:
    """`sessa_common.inference.generation.Decoder` on a PyTorch model."""

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

    @torch.inference_mode()
    def _run(self, tokens: np.ndarray, mask: np.ndarray | None, keep: int) -> np.ndarray:
        device = next(self.model.parameters()).device
        ids = torch.tensor(tokens, dtype=torch.long, device=device)
        seen = None if mask is None else torch.tensor(mask != 0, device=device)
        logits = self.model(ids, cache=self.cache, attention_mask=seen, logits_to_keep=keep)
        return logits.float().cpu().numpy()


def load_decoder(
    folder: Path | str, *, dtype: str | None = None, device: str | None = None
) -> Decoder:
    """A decoder on the model of a checkpoint folder; arguments and errors as in `load_model`."""
    return Decoder(load_model(folder, dtype=dtype, device=device))
