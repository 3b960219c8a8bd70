"""PyTorch's optimizers of a run: AdamW alone, or AdamW beside Muon."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sessa_common.train_config import TrainConfig
from sessa_common.training.backend import decays
from sessa_common.training.muon import takes_muon
from sessa_torch.distributed.sharding import as_copy_of, as_part_of, is_sharded, own_values
from sessa_torch.muon import muon_update


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    factors: Mapping[str, float],
    settings: TrainConfig,
    *,
    low: bool,
) -> Optimizer:
    """Return the optimizers that the settings name; they decay matrices only.

    The learning rate of a group is `rate_factor` times that of the run. Muon computes in bfloat16
    if `low`. AdamW gets the process's own part of a shard as a tensor, because the host needs
    longer to start an operation on DTensors than the GPU to run it.
    """
    muon = {n: p for n, p in parameters.items() if takes_muon(n, p.shape, settings)}
    others = {n: p for n, p in parameters.items() if n not in muon}
    own = {n: nn.Parameter(own_values(p)) if is_sharded(p) else p for n, p in others.items()}
    parts: list[torch.optim.Optimizer] = []
    if muon:
        parts.append(_Muon(_groups(muon, factors, settings), low=low))
    if own:
        groups, betas = _groups(own, factors, settings), (settings.beta1, settings.beta2)
        parts.append(torch.optim.AdamW(groups, betas=betas, eps=settings.adam_eps, fused=True))
    return Optimizer(parts, {own[n]: p for n, p in others.items() if is_sharded(p)})


def _groups(
    parameters: Mapping[str, nn.Parameter], factors: Mapping[str, float], settings: TrainConfig
) -> list[dict[str, Any]]:
    kinds: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        kind = (factors[name], decays(parameter.shape))
        kinds.setdefault(kind, []).append(parameter)
    return [
        {"params": held, "weight_decay": settings.weight_decay * matrices, "rate_factor": factor}
        for (factor, matrices), held in kinds.items()
    ]


class _Muon(torch.optim.Optimizer):
    """Muon with the state and the skipped steps of fused AdamW.

    torch.optim.Muon computes in bfloat16 always, and reads the learning rate on the host, which a
    CUDA graph cannot.
    """

    def __init__(self, groups: list[dict[str, Any]], *, low: bool) -> None:
        super().__init__(groups, {"lr": 0.0})
        self.low = low
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step, or none where `found_inf` is 1."""
        for group in self.param_groups:
            rate = group["lr"]
            keep = 1 - rate * group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(own_values(p))
                m = as_part_of(self.state[p]["exp_avg"], p)
                new = muon_update(p, m, p.grad, rate, keep, low=self.low)
                skip = None if self.found_inf is None else as_copy_of(self.found_inf, p)
                for old, value in zip((p, m), new, strict=True):
                    old.copy_(value if skip is None else torch.where(skip > 0, old, value))


class Optimizer:
    """One or two of PyTorch's optimizers, each with parameters of its own, used as one.

    `shards` are the shards of which an optimizer has the process's own part as a tensor; moments in
    `state` are such parts too.
    """

    def __init__(
        self, parts: Sequence[torch.optim.Optimizer], shards: Mapping[Tensor, nn.Parameter]
    ) -> None:
        self.parts, self.shards = parts, shards
        self.param_groups = [group for part in parts for group in part.param_groups]
        held = [(part.state, p) for part in parts for g in part.param_groups for p in g["params"]]
        # An optimizer fills the empty entry that looking it up makes.
        self.state: dict[Tensor, dict[str, Any]] = {shards.get(p, p): at[p] for at, p in held}

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.state:
            parameter.grad = None

    def step(self) -> None:
        """Take a step."""
        for own, shard in self.shards.items():
            own.grad = None if shard.grad is None else own_values(shard.grad)
        for part in self.parts:
            part.step()
        for own in self.shards:
            own.grad = None

    def skip_steps_where(self, found_inf: Tensor) -> None:
        """Skip a step when `found_inf` () is 1, which GradScaler does by the same attribute."""
        for part in self.parts:
            part.found_inf = found_inf  # type: ignore[attr-defined]
