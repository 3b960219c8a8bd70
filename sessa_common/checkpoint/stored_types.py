"""The types in which a checkpoint stores the weights of a model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import ml_dtypes
import numpy as np

from sessa_common.checkpoint.lazy_tensors import LazyTensors, Spec, spec_of

# Ends of the names of parameters that decide gains and decays. A 16-bit model keeps them in
# float32, where rounding them would change how long the model remembers.
EXACT = ("gamma_bias", "dt_bias", "A_log", "mixer.D")


def as_stored(weights: Mapping[str, np.ndarray], dtype: str) -> Mapping[str, np.ndarray]:
    """Round float32 weights to what a model of `dtype` stores: "bfloat16", else as they are.

    A tensor is rounded when it is read.
    """
    if dtype != "bfloat16":
        return weights
    stored, low = LazyTensors(weights), np.dtype(ml_dtypes.bfloat16)
    for name in weights:
        if not is_exact(name):
            spec = Spec(spec_of(weights, name).shape, low)
            stored.defer(name, spec, partial(_rounded, weights, name))
    return stored


def _rounded(weights: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    return weights[name].astype(ml_dtypes.bfloat16)


def is_exact(name: str) -> bool:
    """Return True for a parameter that stays in float32 where it is stored so."""
    return name.endswith(EXACT)
