"""The types in which a checkpoint stores the weights of a model."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

# Ends of the names of parameters that decide gains and decays. A 16-bit model keeps them in
# float32, where rounding them would change how long the model remembers.
EXACT = ("gamma_bias", "dt_bias", "A_log", "mixer.D")


def as_stored(weights: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Round float32 weights to what a model of `dtype` stores: "bfloat16", else as they are."""
    if dtype != "bfloat16":
        return dict(weights)
    return {
        name: value if is_exact(name) else value.astype(ml_dtypes.bfloat16)
        for name, value in weights.items()
    }


def is_exact(name: str) -> bool:
    """Return True for a parameter that stays in float32 where it is stored so."""
    return name.endswith(EXACT)
