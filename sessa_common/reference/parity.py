"""Comparison of a runtime with the float64 reference: prefill, decoding and an uneven batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError
from sessa_common.inference.generation import Decoder, left_pad
from sessa_common.reference.model import model_logits

# Two blocks of the operator's body, the second one cut short.
TOKENS = 80
# Largest difference over the largest logit: a wrong graph gives about 1, float32 rounding less
# than 1e-4.
TOLERANCE = 1e-3
# The same for an exported folder, by its dtype. Quantised weights make another model, whose quality
# the perplexity measures; their bounds only detect a broken export.
TOLERANCES = {"fp32": TOLERANCE, "fp16": 2e-2, "int8": 0.5, "int4": 1.0}


@dataclass(frozen=True)
class Case:
    """Tokens to feed in pieces of the given sizes, and the logits that must come out."""

    name: str
    tokens: np.ndarray  # (B, T) int64
    mask: np.ndarray | None  # (B, T)
    pieces: tuple[int, ...]
    expected: np.ndarray  # (B, T, V) float64


@dataclass(frozen=True)
class Result:
    """Agreement of one runtime with one case; difference is over the largest expected logit."""

    case: str
    difference: float
    agreement: float  # share of the real positions whose likeliest token is the expected one
    tolerance: float = TOLERANCE

    @property
    def ok(self) -> bool:
        """Return True when the runtime computes what the reference computes."""
        return self.difference <= self.tolerance


def tolerance_of(decoder: Decoder) -> float:
    """The largest difference that a runtime may show: by dtype for an exported folder."""
    return TOLERANCES[getattr(decoder, "dtype", "fp32")]


def make_cases(
    config: SessaConfig, weights: Mapping[str, np.ndarray], *, seed: int = 0
) -> list[Case]:
    """Random token batches with the reference's logits: prefill, decode and a left-padded batch."""
    T = min(TOKENS, config.max_position_embeddings)
    rng = np.random.default_rng(seed)
    lengths = (T, max(1, 2 * T // 5), min(3, T))
    rows = [rng.integers(0, config.vocab_size, n).tolist() for n in lengths]
    tokens, mask = left_pad(rows)
    expected = model_logits(config, weights, tokens, mask)
    half = _pieces(T // 2, 1, total=T)
    return [
        Case("prefill", tokens[:1], None, (T,), expected[:1]),
        Case("decode", tokens[:1], None, half, expected[:1]),
        Case("padded batch", tokens, mask, half, expected),
    ]


def _pieces(first: int, then: int, *, total: int) -> tuple[int, ...]:
    """Sizes: `first` tokens, then a third of the rest as one chunk, then `then` tokens each."""
    chunk = (total - first) // 3
    rest = total - first - chunk
    return tuple(n for n in (first, chunk, *[then] * (rest // then)) if n)


def run_case(decoder: Decoder, case: Case) -> np.ndarray:
    """Logits (B, T, V) of a case; single tokens go through `step`, as in generation."""
    decoder.reset()
    found, start = [], 0
    for size in case.pieces:
        stop = start + size
        tokens = case.tokens[:, start:stop]
        mask = None if case.mask is None else case.mask[:, :stop]
        if size == 1:
            found.append(decoder.step(tokens, mask)[:, None])
        else:
            found.append(decoder.logits(tokens, mask))
        start = stop
    return np.concatenate(found, axis=1)


def compare(decoder: Decoder, cases: Sequence[Case], tolerance: float = TOLERANCE) -> list[Result]:
    """Run every case and compare the logits at all positions but the padding."""
    results = []
    for case in cases:
        real = np.ones(case.tokens.shape, bool) if case.mask is None else case.mask > 0
        found, expected = run_case(decoder, case)[real], case.expected[real]
        difference = np.abs(found - expected).max() / (np.abs(expected).max() or 1.0)
        # A comparison with NaN is always false, so NaN would pass as a small difference.
        difference = float(difference) if np.isfinite(found).all() else float("inf")
        agreement = float((found.argmax(-1) == expected.argmax(-1)).mean())
        results.append(Result(case.name, difference, agreement, tolerance))
    return results


def require_ok(results: Sequence[Result], where: str) -> None:
    """Raise SessaError naming the worst case when a runtime does not agree with the reference."""
    worst = max(results, key=lambda result: result.difference)
    if not worst.ok:
        raise SessaError(
            f"{where}: logits differ from the checkpoint's by {worst.difference:.1e} of the "
            f"largest ({worst.case}), expected at most {worst.tolerance:.0e}; nothing was written"
        )
