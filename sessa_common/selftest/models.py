"""A small model on the present device: training steps, decoding, 4 bits, memory."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from sessa_common.checkpoint.folder import load_weights, save_weights
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.checkpoint.quantization import GROUP_SIZE, quantize_weights
from sessa_common.config import SessaConfig
from sessa_common.data.batches import Batch, next_token_batch
from sessa_common.frameworks import framework
from sessa_common.inference.evaluation import token_losses
from sessa_common.reference.model import model_logits
from sessa_common.selftest.rows import Row, judge, skipped
from sessa_common.selftest.solve import TF32_LIMIT
from sessa_common.selftest.twin import MemoryUse, Twin
from sessa_common.train_config import TrainConfig

# A head of 64, the narrowest that MLX's fused attention takes; kinds with and without feedback.
CONFIG = SessaConfig(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=1,
    layer_kinds=("sessa", "transformer"),
    max_position_embeddings=8192,
)
# Largest relative difference of losses and gradient norms, and of logits, by precision. Float32
# products with the 11 bits of TF32 have a limit, and a verdict, of their own.
STEP_LIMITS = {"float32": 1e-4, "bfloat16": 3e-2, "TF32": 1e-2}
LOGIT_LIMITS = {"float32": 1e-3, "bfloat16": 5e-2, "TF32": 1e-2}
STEPS, ROWS, STEP_LENGTH = 4, 2, 192
PROMPT, PIECE, NEW = 4096, 512, 4
# Training rows whose memory is compared: twice as long may take at most this much more.
LENGTHS = (2048, 4096)
GROWTH, POOL = 2.5, 2.0
PRODUCTS = "float32 products"
OF_LOGIT = "of the largest logit, against float64"


def precisions(twin: Twin) -> tuple[str, ...]:
    """The precisions that models have on the device."""
    return ("float32",) if twin.device == "cpu" else ("float32", "bfloat16")


@cache
def _weights() -> dict[str, np.ndarray]:
    """Initial weights, scaled until the logits depend on every layer."""
    return {
        name: value * np.float32(2 if value.ndim == 2 else 1)
        for name, value in initial_weights(CONFIG, 0).items()
    }


def _tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, CONFIG.vocab_size, (rows, length))


def _row(
    twin: Twin, check: str, precision: str, error: float, limits: Mapping[str, float], detail: str
) -> Row:
    """The row of a relative error with limits by precision."""
    allowed = limits[precision]
    return Row(
        framework=twin.name,
        device=twin.device_name,
        check=check,
        precision=precision,
        measured=error,
        allowed=allowed,
        detail=detail,
        verdict=judge(error, allowed, limits["TF32"] if precision == "float32" else None),
    )


def check_products(twin: Twin) -> Iterator[Row]:
    """The row on float32 products: 24 bits, or operands rounded to the 11 bits of TF32."""
    a, b = np.random.default_rng(0).standard_normal((2, 256, 256), np.float32)
    # Gradients of a product are products: no interface of its own is needed.
    _, found, _ = twin.vjp(lambda x, y: x @ y, [twin.array(a), twin.array(b)], twin.array(a))
    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    error = float(np.linalg.norm(twin.numpy(found) - exact) / np.linalg.norm(exact))
    limits = {"float32": 1e-5, "TF32": TF32_LIMIT}
    yield _row(twin, PRODUCTS, "float32", error, limits, "")


def check_training(twin: Twin) -> Iterator[Row]:
    """Losses and gradient norms of a few steps, eager and compiled, against eager on the CPU.

    The eager step on the CPU is compared with the float64 reference.
    """
    batches = [next_token_batch(_tokens(ROWS, STEP_LENGTH + 1)) for _ in range(STEPS)]
    wanted = _train(twin, batches, "cpu", "float32", compiled=False)
    error = abs(wanted[0, 0] / _reference_loss(batches[0]) - 1)
    detail = "first loss on the CPU against float64"
    yield _row(twin, "training step, eager", "float32", error, STEP_LIMITS, detail)
    detail = f"loss or gradient norm of {STEPS} steps against eager steps on the CPU"
    for compiled, precision in product((False, True), precisions(twin)):
        check = f"training step, {'compiled' if compiled else 'eager'}"
        if twin.device == "cpu" and not compiled:
            continue
        if twin.device == "cpu" and twin.name == "torch":
            reason = "PyTorch compiles C++ for minutes on a CPU, so this is left out"
            yield skipped(twin, check, precision, reason)
            continue
        found = _train(twin, batches, twin.device, precision, compiled=compiled)
        error = float((np.abs(found - wanted) / np.abs(wanted)).max())
        yield _row(twin, check, precision, error, STEP_LIMITS, detail)


def _reference_loss(batch: Batch) -> float:
    """The mean loss in nats, in float64."""
    logits = model_logits(CONFIG, _weights(), batch.inputs)
    return float(token_losses(logits.reshape(-1, CONFIG.vocab_size), batch.targets.ravel()).mean())


def _train(
    twin: Twin, batches: list[Batch], device: str, precision: str, *, compiled: bool
) -> np.ndarray:
    """Loss and gradient norm of each step, (steps, 2)."""
    settings = TrainConfig(precision=precision, compile=compiled, learning_rate=1e-3)
    training = framework(twin.name, "training")
    backend = training.TrainBackend(CONFIG, settings, _weights(), device)
    return np.array([backend.step([batch], 1e-3) for batch in batches])


def check_decoding(twin: Twin) -> Iterator[Row]:
    """A prompt of 4,096 tokens in pieces, then single tokens, against float64 without a cache."""
    for precision in precisions(twin):
        checkpoint, decoding = (framework(twin.name, name) for name in ("checkpoint", "decoding"))
        model = checkpoint.build_model(CONFIG, _weights(), dtype=precision, device=twin.device)
        found = _decode(decoding.Decoder(model), _tokens(1, PROMPT + NEW))
        for name, logits, wanted in zip(
            ("prefill", "decode"), found, _reference_logits(), strict=True
        ):
            check, error = f"{name} behind {PROMPT} tokens", _largest(logits, wanted)
            yield _row(twin, check, precision, error, LOGIT_LIMITS, OF_LOGIT)


def _decode(decoder: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the prompt's last piece (1, PIECE, V), and of each token after it, (1, NEW, V)."""
    pieces = [decoder.logits(tokens[:, start : start + PIECE]) for start in range(0, PROMPT, PIECE)]
    steps = [decoder.step(tokens[:, t : t + 1]) for t in range(PROMPT, tokens.shape[1])]
    return pieces[-1], np.stack(steps, 1)


@cache
def _reference_logits() -> tuple[np.ndarray, np.ndarray]:
    logits = model_logits(CONFIG, _weights(), _tokens(1, PROMPT + NEW))
    return logits[:, PROMPT - PIECE : PROMPT], logits[:, PROMPT:]


def _largest(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference over the largest logit; infinite if a logit is not finite."""
    error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    return error if np.isfinite(found).all() else float("inf")


def check_4_bits(twin: Twin) -> Iterator[Row]:
    """Logits of a 4-bit folder against float64 with the weights that it stands for."""
    decoding = framework(twin.name, "decoding")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {"bits": 4, "group_size": GROUP_SIZE}
        packed = quantize_weights(_weights(), **settings)
        save_weights(folder, CONFIG, packed, extra_config={"quantization": settings})
        config, dense = load_weights(folder)
        tokens = _tokens(1, 48)
        for precision in precisions(twin):
            decoder = decoding.load_decoder(folder, dtype=precision, device=twin.device)
            error = _largest(decoder.logits(tokens), model_logits(config, dense, tokens))
            yield _row(twin, "4-bit model", precision, error, LOGIT_LIMITS, OF_LOGIT)


def check_memory(twin: Twin) -> Iterator[Row]:
    """Peak and pool of a training step at two lengths: neither may grow faster than the length."""
    check, precision = "memory of a training step", precisions(twin)[-1]
    short, long = (_step_memory(twin, precision, length) for length in LENGTHS)
    if short is None or long is None:
        reason = f"{twin.name} counts no memory on the device {twin.device}"
        yield skipped(twin, check, precision, reason)
        return
    peaks = " and ".join(
        f"{_mib(use.peak)} at T {T}" for use, T in zip((short, long), LENGTHS, strict=True)
    )
    limits = {precision: GROWTH, "TF32": GROWTH}
    yield _row(
        twin, f"{check}, peak", precision, long.peak / short.peak, limits, f"times as much: {peaks}"
    )
    limits = {precision: POOL, "TF32": POOL}
    detail = f"times the peak: {_mib(long.pool)} kept at T {LENGTHS[1]}"
    yield _row(twin, f"{check}, pool", precision, long.pool / long.peak, limits, detail)


def _step_memory(twin: Twin, precision: str, length: int) -> MemoryUse | None:
    """Memory of a step on one row, after a step on a short row that builds what stays."""
    gc.collect()  # Models of other checks may be held by circles of references.
    training = framework(twin.name, "training")
    settings = TrainConfig(precision=precision)
    backend = training.TrainBackend(CONFIG, settings, _weights(), twin.device)
    for tokens in (STEP_LENGTH, length):
        twin.forget_memory()
        backend.step([next_token_batch(_tokens(1, tokens + 1))], 1e-3)
    return twin.memory()


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
