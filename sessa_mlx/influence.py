"""Derivatives and routing of one model on one text, for the analysis of influence, in MLX."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from mlx import nn

from sessa_mlx.checkpoint import to_numpy
from sessa_mlx.feedback import feedback_solve
from sessa_mlx.model import SessaForCausalLM


class InfluenceProbe:
    """`sessa_common.experiments.influence.InfluenceProbe` on an MLX model and token ids (T,)."""

    def __init__(self, model: SessaForCausalLM, tokens: np.ndarray) -> None:
        self.model, self.backbone = model.eval(), model.model
        self.config, self.length = model.config, len(tokens)
        self.ids = mx.array(tokens)[None]
        self.inputs = self._run()

    def _run(self) -> list[mx.array]:
        """The input (1, T, D) of each layer."""
        x = self.backbone.embed_tokens(self.ids)
        inputs = []
        for layer in self.backbone.layers:
            inputs.append(x)
            x = layer(x)
        mx.eval(inputs)
        return inputs

    def squared_norms(
        self, first: int, last: int, times: np.ndarray, cotangents: np.ndarray
    ) -> np.ndarray:
        """Squared norms (R, max(times) + 1) of times (R,), cotangents (R, D); see the protocol."""
        R, length = len(times), int(times.max()) + 1

        def run(x: mx.array) -> mx.array:
            for layer in self.backbone.layers[first:last]:
                x = layer(x)
            return x

        x = mx.repeat(self.inputs[first][:, :length], R, 0)  # (R, length, D)
        dy = mx.zeros_like(x)
        dy[mx.arange(R), mx.array(times)] = mx.array(cotangents, dtype=x.dtype)
        _, (dx,) = mx.vjp(run, [x], [dy])
        # Squares are taken in float64, which GPUs lack: in float32 values below 1e-19 vanish.
        return np.square(to_numpy(dx).astype(np.float64)).sum(-1)

    def feedback(
        self, layer: int, sources: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gains (T,), largest weights (T,) and kernel columns (T, n); see the protocol."""
        block = self.backbone.layers[layer]
        x = self.inputs[layer]
        a = block.mixer_input(x)
        q, k = mx.split(block.mixer.proj_fb(a), 2, -1)
        gamma = block.mixer.gain(a)
        impulses = mx.zeros((1, self.length, len(sources)), dtype=gamma.dtype)
        impulses[0, mx.array(list(sources)), mx.arange(len(sources))] = 1
        kernel = feedback_solve(impulses, q, k, gamma)
        logits = (q[0] @ k[0].T) * q.shape[-1] ** -0.5
        past = mx.tril(mx.ones_like(logits), -1) > 0
        alpha = mx.softmax(mx.where(past, logits, -mx.inf)[1:], -1)
        peak = mx.pad(alpha.max(-1), (1, 0))
        return to_numpy(gamma[0]), to_numpy(peak), to_numpy(kernel[0])

    def decay(self, layer: int) -> np.ndarray:
        """Decay (T, heads); see the protocol."""
        block = self.backbone.layers[layer]
        mixer = block.mixer
        dt = mixer.in_proj(block.ln(self.inputs[layer]))[0, :, -mixer.heads :]
        return to_numpy(nn.softplus(dt + mixer.dt_bias) * mx.exp(mixer.A_log))
