"""The golden files of tests/golden as (config, parameters, arrays), for the tests that use them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sessa_common.config import SessaConfig

FOLDER = Path(__file__).parents[1] / "golden"
NAMES = sorted(path.stem for path in FOLDER.glob("*.npz"))


@dataclass(frozen=True)
class GoldenCase:
    """One float64 run of the author's released layer."""

    config: SessaConfig
    params: dict[str, np.ndarray]  # by the release's names: ln.weight, mixer.q_proj.weight, ...
    grads: dict[str, np.ndarray]  # same names
    arrays: dict[str, np.ndarray]  # x, y, dy, dx, mixer_in, mixer_out, y_decode: (B, T, D)


def golden_case(name: str) -> GoldenCase:
    """Read tests/golden/<name>.npz."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        stored = dict(file)
    config = SessaConfig(
        vocab_size=16,
        hidden_size=int(stored["config_D"]),
        num_hidden_layers=1,
        num_attention_heads=int(stored["config_n_heads"]),
        num_key_value_heads=int(stored["config_n_kv_heads"]),
        use_forward_rope=bool(stored["config_rope"]),
        gamma_max=float(stored["config_gamma_max"]),
        layer_norm_eps=float(stored["config_ln_eps"]),
        dtype="float64",
    )
    return GoldenCase(
        config,
        _under("param.", stored),
        _under("grad.", stored),
        {key: value for key, value in stored.items() if key[0] in "xydm"},
    )


def _under(prefix: str, stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key[len(prefix) :]: value for key, value in stored.items() if key.startswith(prefix)}


def relative_error(got: np.ndarray, want: np.ndarray, scale: float | None = None) -> float:
    """Largest difference over `scale`, by default the largest magnitude wanted.

    Infinite when the shape differs or a value is not finite.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    scale = scale or np.abs(want).max(initial=0.0) or 1.0
    return float(np.abs(got - want).max(initial=0.0) / scale)


def gradient_errors(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative error of each gradient; names on one side only count as infinitely wrong.

    Some gradients are zero but for rounding (a key bias without RoPE shifts a whole softmax row):
    those are measured against the largest gradient of the case.
    """
    largest = max(float(np.abs(value).max()) for value in want.values())
    errors = {name: float("inf") for name in got.keys() ^ want.keys()}
    for name in got.keys() & want.keys():
        vanishes = np.abs(want[name]).max() < 1e-12 * largest
        errors[name] = relative_error(got[name], want[name], largest if vanishes else None)
    return errors
