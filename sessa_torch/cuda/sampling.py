"""Choosing the next ids on the device, one token ahead of the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator

import numpy as np
import torch
from torch import Tensor

from sessa_common.errors import SessaError
from sessa_common.inference.sampling import GumbelNoise, SamplingConfig

# An id that stands for logits that are not finite.
DAMAGED = -1


class DeviceSampler:
    """`sampling.choose` on the device of the logits, with the noise that the host draws.

    Noise and ids travel by pinned memory. There are two places for each: the host reads the ids of
    one token while the device computes the next.
    """

    def __init__(self, config: SamplingConfig, noise: GumbelNoise, logits: Tensor) -> None:
        self.config, self.noise = config, noise
        B = len(logits)
        self.found = [torch.empty(B, dtype=torch.int64, pin_memory=True) for _ in range(2)]
        self.done = [torch.cuda.Event() for _ in range(2)]
        self.staged: list[Tensor] = []
        if config.temperature > 0:
            self.staged = [torch.empty(logits.shape, pin_memory=True) for _ in range(2)]

    def choose(self, logits: Tensor, turn: int, ahead: int) -> Tensor:
        """Ids (B,) on the device from logits (B, V), and begin their way to the host.

        `ahead` counts the draws between the next one of the noise and this one.
        """
        place = turn % 2
        scores = logits
        if self.config.temperature > 0:
            staged = self.staged[place]
            staged.copy_(torch.from_numpy(self.noise.peek(ahead)))
            scores = filter_on_device(logits, self.config)
            scores = scores + staged.to(logits.device, non_blocking=True)
        top, ids = scores.max(-1)
        self.found[place].copy_(ids.masked_fill(~top.isfinite(), DAMAGED), non_blocking=True)
        self.done[place].record()
        return ids

    def read(self, turn: int) -> np.ndarray:
        """The ids (B,) of a turn; SessaError when its logits were not finite."""
        self.done[turn % 2].synchronize()
        ids = self.found[turn % 2].numpy().copy()
        if (ids == DAMAGED).any():
            raise SessaError("the model's logits are not finite numbers; the weights are damaged")
        if self.config.temperature > 0:
            self.noise.take()
            # Drawn while the device computes and the host starts the next step.
            self.noise.begin()
        return ids


def filter_on_device(logits: Tensor, config: SamplingConfig) -> Tensor:
    """`sampling.filter_logits` of logits (B, V) on their device, by the same operations."""
    scores = (logits - logits.amax(-1, keepdim=True)) * float(config.inverse_temperature)
    V = scores.shape[1]
    limited = 0 < config.top_k < V
    if limited or config.top_p < 1:
        counts = torch.full_like(scores[:, :1], config.top_k if limited else V, dtype=torch.int64)
        ranked = scores.sort(-1, descending=True).values
        if config.top_p < 1:
            counts = _nucleus(ranked, counts, config.top_p)
        scores = scores.masked_fill(~_first(scores, ranked, counts), -math.inf)
    if config.min_p > 0:
        least = float(np.float32(math.log(config.min_p)))
        scores = scores.masked_fill(scores < least, -math.inf)
    return scores


def _nucleus(ranked: Tensor, counts: Tensor, top_p: float) -> Tensor:
    """The number (B, 1) of the `counts` likeliest tokens that first reach top_p of their sum."""
    place = torch.arange(ranked.shape[1], device=ranked.device)
    p = torch.where(place < counts, ranked.exp(), 0).double()
    before = p.cumsum(-1) - p
    reached = before < top_p * p.sum(-1, keepdim=True)
    return torch.minimum(reached.sum(-1, keepdim=True), counts)


def _first(scores: Tensor, ranked: Tensor, counts: Tensor) -> Tensor:
    """True at the `counts` (B, 1) largest scores; of equal ones the lower ids count."""
    # No token at all is kept of logits that are not numbers.
    least = ranked.gather(-1, (counts - 1).clamp_min(0))
    above, equal = scores > least, scores == least
    missing = counts - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= missing))


def draw_on_device(
    append: Callable[[Tensor], Tensor],
    undo: Callable[[], None] | None,
    logits: Tensor,  # (B, V)
    sampling: SamplingConfig,
    budget: int,
    noise: GumbelNoise | None = None,
) -> Generator[np.ndarray, None, None]:
    """`Decoder.draw` for logits on a CUDA device: the host waits for ids only, one token behind.

    `append` feeds ids (B, 1) and returns the next logits. `undo` takes the last token back if the
    iterator is closed early; without it no token is fed before the caller wants the next.
    """
    noise = noise or GumbelNoise(sampling.seed, range(len(logits)), logits.shape[1])
    sampler = DeviceSampler(sampling, noise, logits)
    ids = sampler.choose(logits, 0, 0)
    for turn in range(budget):
        goes_on = turn + 1 < budget
        # The first id is not kept waiting for the start of a step.
        early = goes_on and undo is not None and turn > 0
        found = None
        try:
            if early:
                ids = sampler.choose(append(ids[:, None]), turn + 1, 1)
            found = sampler.read(turn)
            yield found
        except BaseException:
            if early and undo is not None:
                undo()
            raise
        if goes_on and not early:
            ids = sampler.choose(append(ids[:, None]), turn + 1, 0)
