"""Derivatives and routing of one model on one text, for the analysis of influence, in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sessa_torch.checkpoint import to_numpy
from sessa_torch.feedback import feedback_solve
from sessa_torch.model import SessaForCausalLM


class InfluenceProbe:
    """`sessa_common.experiments.influence.InfluenceProbe` on a PyTorch model and token ids (T,)."""

    def __init__(self, model: SessaForCausalLM, tokens: np.ndarray) -> None:
        self.model, self.backbone = model.eval(), model.model
        self.config, self.length = model.config, len(tokens)
        device = next(model.parameters()).device
        self.ids = torch.tensor(tokens, dtype=torch.long, device=device)[None]
        self.inputs = self._run()

    @torch.no_grad()
    def _run(self) -> list[Tensor]:
        """The input (1, T, D) of each layer."""
        x = self.backbone.embed_tokens(self.ids)
        inputs = []
        for layer in self.backbone.layers:
            inputs.append(x)
            x = layer(x)
        return inputs

    def squared_norms(
        self, first: int, last: int, times: np.ndarray, cotangents: np.ndarray
    ) -> np.ndarray:
        """Squared norms (R, max(times) + 1) of times (R,), cotangents (R, D); see the protocol."""
        R, length = len(times), int(times.max()) + 1
        x = self.inputs[first][:, :length].repeat(R, 1, 1).requires_grad_()  # (R, length, D)
        y = x
        for layer in self.backbone.layers[first:last]:
            y = layer(y)
        dy = torch.zeros_like(y)
        dy[torch.arange(R), torch.tensor(times)] = torch.tensor(cotangents, dtype=y.dtype).to(
            y.device
        )
        (dx,) = torch.autograd.grad(y, x, dy)
        # Squares are taken in float64, which MPS lacks: in float32 values below 1e-19 vanish.
        return to_numpy(dx.cpu().double().square().sum(-1))

    @torch.no_grad()
    def feedback(
        self, layer: int, sources: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gains (T,), largest weights (T,) and kernel columns (T, n); see the protocol."""
        block: Any = self.backbone.layers[layer]
        x = self.inputs[layer]
        a = block.mixer_input(x)
        q, k = block.mixer.proj_fb(a).chunk(2, -1)
        gamma = block.mixer.gain(a)
        impulses = torch.zeros(1, self.length, len(sources), dtype=gamma.dtype, device=x.device)
        impulses[0, list(sources), torch.arange(len(sources))] = 1
        kernel = feedback_solve(impulses, q, k, gamma)
        logits = (q[0] @ k[0].mT) * q.shape[-1] ** -0.5
        past = torch.ones_like(logits, dtype=torch.bool).tril(-1)
        alpha = logits.masked_fill(~past, -torch.inf)[1:].softmax(-1)
        peak = F.pad(alpha.amax(-1), (1, 0))
        return to_numpy(gamma[0]), to_numpy(peak), to_numpy(kernel[0])

    @torch.no_grad()
    def decay(self, layer: int) -> np.ndarray:
        """Decay (T, heads); see the protocol."""
        block: Any = self.backbone.layers[layer]
        mixer = block.mixer
        dt = mixer.in_proj(block.ln(self.inputs[layer]))[0, :, -mixer.heads :]
        return to_numpy(F.softplus(dt + mixer.dt_bias) * mixer.A_log.exp())
