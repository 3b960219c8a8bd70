"""Operations of a training step, as docs/scaling.md counts them."""

from __future__ import annotations

from sessa_common.config import SessaConfig, parameter_count

# Dense bfloat16 operations in a second, by a part of the device's name (NVIDIA's data sheets).
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


def operations_per_token(config: SessaConfig, T: int) -> float:
    """Return operations of a training step for each token of rows of T tokens.

    6 for every parameter, and for every layer 6 T D for causal attention and 7 T D for the
    feedback; what activation checkpointing computes again is not counted.
    """
    attention = sum(kind.attends for kind in config.kinds)
    feedback = sum(kind.mixer == "sessa" for kind in config.kinds)
    rows = (6 * attention + 7 * feedback) * T * config.hidden_size
    return 6 * parameter_count(config) + rows


def peak_operations(device: str) -> float | None:
    """Return bfloat16 operations in a second of a device of this name, None if it is not known."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)
