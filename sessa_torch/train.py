"""The PyTorch side of `sessa_common.trainer`: forward pass, loss, gradients, AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sessa_common.config import SessaConfig, TrainConfig
from sessa_common.data.batches import Batch
from sessa_common.trainer import MOMENTS, decays
from sessa_torch.checkpoint import (
    build_model,
    choose_device,
    model_weights,
    to_numpy,
    to_tensor,
)
from sessa_torch.model import SessaModel

MOMENT_KEYS = dict(zip(MOMENTS, ("exp_avg", "exp_avg_sq"), strict=True))


def choose_precision(precision: str, device: str) -> str:
    """Resolve "auto": bfloat16 on a CUDA device that computes in it, float32 elsewhere."""
    if precision != "auto":
        return precision
    fast = device.startswith("cuda") and torch.cuda.is_bf16_supported()
    return "bfloat16" if fast else "float32"


def logits_function(model: SessaModel) -> Callable[[np.ndarray], np.ndarray]:
    """A function from token ids (B, T) to logits (B, T, V) float32, both NumPy."""
    device = next(model.parameters()).device

    @torch.inference_mode()
    def logits(ids: np.ndarray) -> np.ndarray:
        return to_numpy(model(torch.as_tensor(ids, dtype=torch.long, device=device)).float())

    return logits


class Learner:
    """A `sessa_common.trainer.Learner` in PyTorch.

    Master weights, gradients and AdamW are float32. With bfloat16 the forward pass runs under
    autocast: matrix products in bfloat16; norms, softmax, the feedback solve's sums and the loss in
    float32. Raises SessaError for a device that is not there.
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
        self.parameters = dict(self.model.named_parameters())
        groups: list[dict[str, Any]] = [
            {
                "params": [p for p in self.parameters.values() if decays(p.shape) == matrices],
                "weight_decay": settings.weight_decay * matrices,
            }
            for matrices in (True, False)
        ]
        self.optimizer = torch.optim.AdamW(
            groups, betas=(settings.beta1, settings.beta2), eps=settings.adam_eps, fused=True
        )

    def step(self, batches: Sequence[Batch], learning_rate: float) -> tuple[float, float]:
        """Take one AdamW step on the weighted mean loss of all rows; (nats, gradient norm)."""
        total = sum(float(batch.weights.sum()) for batch in batches)
        self.optimizer.zero_grad()
        losses = []
        for batch in batches:
            loss = self._loss_sum(batch) / total
            loss.backward()
            losses.append(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip_norm)
        # One transfer, so that the device is waited for once a step.
        loss, size = torch.stack([torch.stack(losses).sum(), norm]).tolist()
        # A step with a gradient that is not finite would spoil the weights for good.
        if math.isfinite(loss + size):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        return loss, size

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        """The weighted sum of the losses of a batch, in nats."""
        return self._loss_sum(batch).item()

    @torch.inference_mode()
    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """The likeliest next ids int32 (B, T) after inputs (B, T)."""
        return to_numpy(self._logits(inputs).argmax(-1).int())

    def weights(self) -> dict[str, np.ndarray]:
        """The float32 master weights."""
        return {name: value.copy() for name, value in model_weights(self.model).items()}

    def state(self) -> dict[str, np.ndarray]:
        """Weights and optimizer moments as they are after the last step."""
        arrays = {f"weights.{name}": value for name, value in self.weights().items()}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state[parameter]
            for kind, key in MOMENT_KEYS.items():
                value = moments.get(key, torch.zeros_like(parameter))
                arrays[f"{kind}.{name}"] = to_numpy(value).copy()
        return arrays

    @torch.no_grad()
    def restore(self, state: Mapping[str, np.ndarray], steps: int) -> None:
        """Continue from a state that was taken after `steps` steps."""
        for name, parameter in self.parameters.items():
            parameter.copy_(to_tensor(state[f"weights.{name}"]))
            moments = {
                key: to_tensor(state[f"{kind}.{name}"]).to(parameter.device)
                for kind, key in MOMENT_KEYS.items()
            }
            count = torch.tensor(float(steps), device=parameter.device)
            self.optimizer.state[parameter] = {"step": count, **moments}

    def _loss_sum(self, batch: Batch) -> Tensor:
        targets, weights = (self._on_device(array) for array in (batch.targets, batch.weights))
        logits = self._logits(batch.inputs).float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.long().flatten(), reduction="none")
        return (losses * weights.flatten()).sum()

    def _logits(self, inputs: np.ndarray) -> Tensor:
        low = self.precision == "bfloat16"
        with torch.autocast(self.device.split(":")[0], dtype=torch.bfloat16, enabled=low):
            return self.model(self._on_device(inputs).long())

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
