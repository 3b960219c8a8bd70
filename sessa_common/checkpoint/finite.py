"""A check that weights are numbers: no NaN and no infinity."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sessa_common.errors import SessaError

# Elements looked at in one go, so that the check needs 16 MiB besides the tensor.
BLOCK = 2**24


class NotFiniteError(SessaError):
    """A tensor holds NaN or an infinity."""


def require_finite(name: str, array: np.ndarray, where: str) -> None:
    """Raise SessaError that names the tensor and the place of its first NaN or infinity.

    `array` has any shape and a floating type; `where` is the file or folder it comes from.
    """
    flat = array.reshape(-1)
    for start in range(0, flat.size, BLOCK):
        block = flat[start : start + BLOCK]
        finite = np.isfinite(block)
        if not finite.all():
            first = int(np.argmin(finite))
            place = tuple(map(int, np.unravel_index(start + first, array.shape)))
            kind = "NaN" if np.isnan(block[first]) else "infinity"
            raise NotFiniteError(
                f"{where}: {name} holds {kind} at index {place}; the weights are damaged or their "
                "training diverged, so take an earlier checkpoint"
            )


def require_finite_weights(weights: Mapping[str, np.ndarray], where: str) -> None:
    """Raise SessaError as `require_finite` does, for the first tensor that is not finite."""
    for name, array in weights.items():
        require_finite(name, array, where)
