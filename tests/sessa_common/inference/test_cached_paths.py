"""Chunks of many sizes behind pasts around every block edge equal one float64 prefill."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from support.export_models import lively_weights, small_config, write_checkpoint

import sessa_export.runtime
import sessa_mlx.decoding
import sessa_torch.decoding
from sessa_common.reference.model import model_logits
from sessa_export.exporter import Options, export_checkpoint

CONFIG = small_config(
    vocab_size=61,
    bos_token_id=None,
    eos_token_id=None,
    hidden_size=24,
    num_key_value_heads=2,
    num_hidden_layers=4,
    layer_kinds=("sessa", "transformer", "sessa_transformer", "gated_attention"),
    max_position_embeddings=2048,
)
CHUNKS = (1, 2, 7, 16, 17, 512)
# Blocks of the solve have 64 rows in ONNX and 256 elsewhere; buffers grow by 64 and 256.
PASTS = (0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513)
# The longest chunk and the largest batch take long, and both together very long.
FEW_PASTS, ONE_PAST = (0, 1, 17, 256, 513), (256,)
LENGTH = PASTS[-1] + CHUNKS[-1]
# Left padding of a row, by the number of the row.
PADDING = (3, 0, 17, 64, 5)
# Logits come out as float32 in every dtype.
LIMITS = {"float64": 2e-7, "float32": 1e-4}
RUNTIMES = ["torch-float64", "torch-float32", "mlx-float32", "natural-float32", "buffer-float32"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("paths") / "checkpoint", CONFIG)[0]


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request, checkpoint, tmp_path_factory):
    """A decoder, and the largest error that it may show."""
    name, dtype = request.param.split("-")
    if name in ("torch", "mlx"):
        module = {"torch": sessa_torch.decoding, "mlx": sessa_mlx.decoding}[name]
        return module.load_decoder(checkpoint, dtype=dtype), LIMITS[dtype]
    folder = tmp_path_factory.mktemp("exported") / name
    export_checkpoint(checkpoint, folder, Options(layout=name))
    return sessa_export.runtime.load_decoder(folder), LIMITS[dtype]


def draw(B: int, padded: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Token ids (B, LENGTH) and their mask, None without padding."""
    tokens = np.random.default_rng(B).integers(0, CONFIG.vocab_size, (B, LENGTH))
    if not padded:
        return tokens, None
    padding = np.resize(PADDING, B)[:, None]
    return tokens, (np.arange(LENGTH) >= padding).astype(np.int64)


@functools.cache
def prefill_of_one_row(B: int, padded: bool, row: int) -> np.ndarray:
    tokens, mask = draw(B, padded)
    mine = None if mask is None else mask[row : row + 1]
    return model_logits(CONFIG, lively_weights(CONFIG), tokens[row : row + 1], mine)[0]


@pytest.mark.parametrize("B, padded", [(1, False), (3, False), (3, True), (16, True)])
def test_every_chunk_behind_every_past(runtime, B: int, padded: bool) -> None:
    decoder, limit = runtime
    tokens, mask = draw(B, padded)
    want = np.stack([prefill_of_one_row(B, padded, row) for row in range(B)])
    scale, worst, past = np.abs(want).max(), {}, 0
    decoder.reset()
    pasts, long_behind = (FEW_PASTS, ONE_PAST) if B == 16 else (PASTS, FEW_PASTS)
    for P in pasts:
        if past < P:
            decoder.feed(tokens[:, past:P], None if mask is None else mask[:, :P])
        for T in CHUNKS if P in long_behind else CHUNKS[:-1]:
            rows = slice(P, P + T)
            got = decoder.logits(tokens[:, rows], None if mask is None else mask[:, : P + T])
            wrong = np.abs(got - want[:, rows]).max(-1)
            real = np.ones_like(wrong) if mask is None else mask[:, rows]
            worst[P, T] = (wrong * real).max() / scale
            decoder.trim(T)
        assert decoder.length == P
        past = P
    assert max(worst.values()) < limit, max(worst, key=worst.get)
