"""Decoders for tests: the float64 reference, and one that says fixed tokens."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np
from support.export_models import small_config

from sessa_common.config import SessaConfig
from sessa_common.inference.generation import draw_on_host
from sessa_common.inference.sampling import GumbelNoise, SamplingConfig
from sessa_common.reference.model import ModelCache, empty_cache, model_logits


class HostDecoder:
    """The common part of both decoders here: `feed` and `draw` by way of `step`."""

    config: SessaConfig
    last: np.ndarray | None = None

    def step(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        raise NotImplementedError

    def feed(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> None:
        self.step(tokens, mask)

    def draw(
        self, sampling: SamplingConfig, budget: int, noise: GumbelNoise | None = None
    ) -> Generator[np.ndarray, None, None]:
        return draw_on_host(self, self.last, sampling, budget, noise)


class ReferenceDecoder(HostDecoder):
    """The float64 reference with its own cache."""

    def __init__(self, config: SessaConfig, weights: dict[str, np.ndarray]) -> None:
        self.config, self.weights = config, weights
        self.reset()

    @property
    def length(self) -> int:
        return self.cache.length if self.cache else 0

    def reset(self) -> None:
        self.cache: ModelCache | None = None

    def logits(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        self.cache = self.cache or empty_cache(self.config, len(tokens))
        found = model_logits(self.config, self.weights, tokens, mask, self.cache)
        self.last = found[:, -1]
        return found

    def step(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        return self.logits(tokens, mask)[:, -1]

    def keep(self, rows: Sequence[int]) -> None:
        rows = list(rows)
        for i, layer in enumerate(self.cache.layers):
            self.cache.layers[i] = type(layer)(*(array[rows] for array in layer))
        self.cache.mask = None if self.cache.mask is None else self.cache.mask[rows]


class ScriptedDecoder(HostDecoder):
    """A decoder whose rows say fixed tokens, whatever they are told."""

    def __init__(self, *rows: list[int]) -> None:
        self.scripts = rows
        self.config = small_config()
        self.reset()

    def reset(self) -> None:
        self.calls = self.length = 0
        self.rows = list(self.scripts)
        self.fed: list[np.ndarray] = []

    def step(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        self.last = np.zeros((len(self.rows), 257))
        for row, script in enumerate(self.rows):
            self.last[row, script[min(self.calls, len(script) - 1)]] = 9
        self.calls += 1
        self.length += tokens.shape[1]
        self.fed.append(tokens)
        return self.last

    def keep(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]
