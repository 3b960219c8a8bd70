"""Random sessions with caches, a thousand in all, end like a fresh reading of what they kept.

The slow test runs a thousand in every runtime.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.export_models import small_config, write_checkpoint

import sessa_export.runtime
import sessa_mlx.decoding
import sessa_torch.decoding
from sessa_common.checkpoint.folder import read_safetensors, write_safetensors
from sessa_common.inference.generation import Decoder
from sessa_export.exporter import Options, export_checkpoint

CONFIG = small_config(
    vocab_size=13,
    bos_token_id=None,
    eos_token_id=None,
    hidden_size=8,
    num_attention_heads=2,
    layer_kinds=("sessa", "sessa_transformer"),
    max_position_embeddings=128,
)
STEPS, MOST = 5, 40
LIMIT = 1e-4


@pytest.fixture(scope="module", params=["torch", "mlx", "natural", "uniform", "buffer"])
def decoder(request, tmp_path_factory) -> Decoder:
    folder = tmp_path_factory.mktemp("sessions")
    checkpoint = write_checkpoint(folder / "checkpoint", CONFIG)[0]
    if request.param in ("torch", "mlx"):
        module = {"torch": sessa_torch.decoding, "mlx": sessa_mlx.decoding}[request.param]
        return module.load_decoder(checkpoint)
    export_checkpoint(checkpoint, folder / "exported", Options(layout=request.param))
    return sessa_export.runtime.load_decoder(folder / "exported")


class Session:
    """A decoder, and the ids and the mask (B, P) that its cache should hold."""

    def __init__(self, decoder: Decoder, rng: np.random.Generator, folder: Path) -> None:
        self.decoder, self.rng, self.folder = decoder, rng, folder
        B = int(rng.integers(1, 4))
        self.tokens, self.mask = np.zeros((B, 0), np.int64), np.zeros((B, 0), np.int64)
        self.saved: list[tuple[Path, np.ndarray, np.ndarray]] = []
        decoder.reset()
        self.append()

    def append(self) -> np.ndarray:
        """Append some tokens; the first ones may be padded. Returns the last logits."""
        shape = len(self.tokens), int(self.rng.integers(1, MOST))
        new, real = self.rng.integers(0, CONFIG.vocab_size, shape), np.ones(shape, np.int64)
        if self.tokens.shape[1] == 0 and self.rng.random() < 0.5:
            real[:] = np.arange(shape[1]) >= self.rng.integers(0, shape[1], (shape[0], 1))
        self.tokens = np.concatenate([self.tokens, new], 1)
        self.mask = np.concatenate([self.mask, real], 1)
        return self.decoder.step(new, None if real.all() else self.mask)

    def trim(self) -> None:
        count = int(self.rng.integers(0, self.decoder.length + 1))
        self.decoder.trim(count)
        length = self.tokens.shape[1] - count
        self.tokens, self.mask = self.tokens[:, :length], self.mask[:, :length]

    def keep(self) -> None:
        B = len(self.tokens)
        rows = self.rng.permutation(B)[: self.rng.integers(1, B + 1)]
        self.decoder.keep(rows.tolist())
        self.tokens, self.mask = self.tokens[rows], self.mask[rows]

    def save(self) -> None:
        arrays = self.decoder.cache_arrays()
        assert bool(arrays) == bool(self.decoder.length)
        path = self.folder / f"{len(self.saved)}.safetensors"
        write_safetensors(path, arrays)
        self.saved.append((path, self.tokens, self.mask))

    def load(self) -> None:
        if self.saved:
            path, self.tokens, self.mask = self.saved[self.rng.integers(len(self.saved))]
            self.decoder.restore_cache(read_safetensors(path))

    def difference(self) -> float:
        """The largest difference between logits that continue the session and fresh ones."""
        got = self.append()
        self.decoder.reset()
        want = self.decoder.step(self.tokens, None if self.mask.all() else self.mask)
        return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("sessions", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_sessions_end_like_a_fresh_reading(decoder, sessions: int, tmp_path: Path) -> None:
    worst = {}
    for number in range(sessions):
        session = Session(decoder, np.random.default_rng(number), tmp_path)
        steps = [session.append, session.append, session.trim, session.keep, session.save]
        for _ in range(STEPS):
            steps[session.rng.integers(len(steps))]()
            if session.saved and session.rng.random() < 0.3:
                session.load()
        worst[number] = session.difference()
    assert max(worst.values()) < LIMIT, max(worst, key=worst.get)
