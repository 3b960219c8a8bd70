"""Training in MLX: forward pass, loss, gradients, AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn, optimizers
from mlx.utils import tree_flatten, tree_unflatten

from sessa_common.config import SessaConfig, TrainConfig
from sessa_common.data.batches import Batch
from sessa_common.training.backend import MOMENTS, decays
from sessa_common.training.preparation import TrainRequest
from sessa_common.training.session import TrainResult, run_session
from sessa_common.training.trainer import Reporter
from sessa_mlx.checkpoint import build_model, choose_device, to_numpy, to_tensor

Arrays = dict[str, mx.array]
# Parameters of gains and decays: low precision does not round them.
EXACT = ("gamma_bias", "dt_bias", "A_log", "mixer.D")


def choose_precision(precision: str, device: str) -> str:
    """Resolve "auto": bfloat16 on the GPU, float32 on the CPU."""
    if precision != "auto":
        return precision
    return "bfloat16" if device == "gpu" else "float32"


def train(
    out: Path | str | None = None,
    *,
    preset: str | None = None,
    config: SessaConfig | Path | str | None = None,
    init: Path | str | None = None,
    train_config: TrainConfig | Path | str | None = None,
    resume: Path | str | None = None,
    force: bool = False,
    device: str | None = None,
    reporter: Reporter | None = None,
    **fields: Any,
) -> TrainResult:
    """Train a new run in the folder `out`, or go on with the run in the folder `resume`.

    The model is a named size (`preset`, "demo" if nothing is named), a `config` (or the path of a
    config.json) or the checkpoint folder `init` to fine-tune; the settings are `train_config` (or
    the path of a training.json). Further keyword arguments are fields of SessaConfig and
    TrainConfig that replace theirs, as in train("runs/a", data="notes.txt", steps=200). `force`
    replaces a folder that is not empty; `reporter` receives the progress. Raises SessaError before
    anything is written for input that cannot train, DivergedError when a loss is not finite.
    """
    request = TrainRequest(
        out=out,
        preset=preset,
        config=config,
        init=init,
        train_config=train_config,
        resume=resume,
        force=force,
        fields=fields,
    )
    return run_session(TrainBackend, request, choose_device(device), reporter)


class TrainBackend:
    """A `sessa_common.training.backend.TrainBackend` in MLX.

    Master weights, gradients and AdamW are float32. With bfloat16 the forward pass runs on a
    bfloat16 copy of the weights (not of the scalars that decide gains and decays), with softmax,
    the feedback solve's sums and the loss in float32; the gradients reach the float32 weights
    through the cast. With settings.compile mx.compile fuses the operations of loss and gradient.
    Raises SessaError for a device that is not there.
    """

    def __init__(
        self,
        config: SessaConfig,
        settings: TrainConfig,
        weights: Mapping[str, np.ndarray],
        device: str | None = None,
    ) -> None:
        self.settings = settings
        self.device = choose_device(device)
        self.precision = choose_precision(settings.precision, self.device)
        self.model = build_model(config, weights, dtype="float32", device=self.device)
        self.parameters: Arrays = dict(tree_flatten(self.model.parameters()))
        self.moments: dict[str, Arrays] = {
            kind: {name: mx.zeros_like(p) for name, p in self.parameters.items()}
            for kind in MOMENTS
        }
        self.steps = 0
        self.loss_and_gradients = mx.value_and_grad(self._loss_sum)
        if settings.compile:
            self.loss_and_gradients = mx.compile(self.loss_and_gradients)

    def step(self, batches: Sequence[Batch], learning_rate: float) -> tuple[float, float]:
        """Take one AdamW step on the weighted mean loss of all rows; (nats, gradient norm)."""
        # An array, because compiled code takes a Python number for a constant.
        total = mx.array(sum(float(batch.weights.sum()) for batch in batches))
        loss = mx.array(0.0)
        grads: Arrays = {}
        for batch in batches:
            part, new = self.loss_and_gradients(self.parameters, *_arrays(batch), total)
            loss = loss + part
            grads = {name: grads[name] + g for name, g in new.items()} if grads else new
            mx.eval(loss, grads)
        grads, norm = optimizers.clip_grad_norm(grads, self.settings.max_grad_norm)
        # A gradient that is not finite would spoil the weights for good, so the step is skipped.
        if bool(mx.isfinite(loss + norm)):
            self._adamw(grads, learning_rate)
        return float(loss), float(norm)

    def evaluate(self, batch: Batch) -> tuple[float, np.ndarray]:
        """Return the weighted sum of the losses of a batch, in nats, and its `predict`."""
        inputs, targets, weights = _arrays(batch)
        logits = self._logits(self.parameters, inputs)
        return float(_cross_entropy(logits, targets, weights)), _likeliest(logits)

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """Return the likeliest next ids int32 (B, T) after inputs (B, T)."""
        return _likeliest(self._logits(self.parameters, mx.array(inputs)))

    def weights(self) -> dict[str, np.ndarray]:
        """Return the float32 master weights."""
        return {name: to_numpy(value) for name, value in self.parameters.items()}

    def state(self) -> dict[str, np.ndarray]:
        """Return weights and optimizer moments as they are after the last step."""
        kinds = {"weights": self.parameters, **self.moments}
        return {
            f"{kind}.{name}": to_numpy(value)
            for kind, arrays in kinds.items()
            for name, value in arrays.items()
        }

    def restore(self, state: Mapping[str, np.ndarray], steps: int) -> None:
        """Continue from a state that was taken after `steps` steps."""
        for kind, arrays in {"weights": self.parameters, **self.moments}.items():
            for name in arrays:
                arrays[name] = to_tensor(state[f"{kind}.{name}"])
        self.steps = steps

    def _loss_sum(
        self,
        parameters: Arrays,
        inputs: mx.array,
        targets: mx.array,
        weights: mx.array,
        total: mx.array,
    ) -> mx.array:
        return _cross_entropy(self._logits(parameters, inputs), targets, weights) / total

    def _logits(self, parameters: Arrays, inputs: mx.array) -> mx.array:
        if self.precision == "bfloat16":
            parameters = {
                name: p if name.endswith(EXACT) else p.astype(mx.bfloat16)
                for name, p in parameters.items()
            }
        self.model.update(tree_unflatten(list(parameters.items())))
        return self.model(inputs)

    def _adamw(self, grads: Arrays, learning_rate: float) -> None:
        # The rule of torch.optim.AdamW. mlx.optimizers.AdamW decays every parameter and rounds its
        # bias corrections to float32.
        settings, m, v = self.settings, *(self.moments[kind] for kind in MOMENTS)
        self.steps += 1
        size = learning_rate / (1 - settings.beta1**self.steps)
        scale = (1 - settings.beta2**self.steps) ** -0.5
        for name, g in grads.items():
            m[name] = settings.beta1 * m[name] + (1 - settings.beta1) * g
            v[name] = settings.beta2 * v[name] + (1 - settings.beta2) * g * g
            p = self.parameters[name]
            if decays(p.shape):
                p = p * (1 - learning_rate * settings.weight_decay)
            self.parameters[name] = p - size * m[name] / (
                mx.sqrt(v[name]) * scale + settings.adam_eps
            )
        mx.eval(self.parameters, self.moments)


def _cross_entropy(logits: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Return the weighted sum of the losses over all positions of logits (B, T, V), in float32."""
    return (nn.losses.cross_entropy(logits.astype(mx.float32), targets) * weights).sum()


def _likeliest(logits: mx.array) -> np.ndarray:
    return to_numpy(logits.argmax(-1).astype(mx.int32))


def _arrays(batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
    return mx.array(batch.inputs), mx.array(batch.targets), mx.array(batch.weights)
