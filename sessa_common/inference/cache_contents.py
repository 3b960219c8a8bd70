"""The contents of a cache as named arrays, with the same names and shapes in every runtime."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError

# Which positions are real tokens, (B, P) bool; every contents has it unless the cache is empty.
MASK = "mask"
# Kept in float32 at least; all others have the dtype of the model.
STATES = ("s", "state")


def is_trimmable(config: SessaConfig) -> bool:
    """Return True when positions can be dropped: no layer keeps a state instead of rows."""
    return all(kind.attends for kind in config.kinds)


def require_trimmable(config: SessaConfig, count: int, length: int) -> None:
    """Raise SessaError unless `count` of `length` cached positions can be dropped."""
    if not 0 <= count <= length:
        raise SessaError(f"cannot drop {count} of {length} cached positions")
    if 0 < count < length and not is_trimmable(config):
        raise SessaError(
            f"cannot drop {count} of {length} positions: the state of a Mamba-2 layer "
            "cannot be rolled back; drop all of them and read the prompt again"
        )


def cache_shapes(config: SessaConfig, B: int, P: int) -> dict[str, tuple[int, ...]]:
    """The name and shape of every array in the cache of B sequences of P tokens."""
    D, inner = config.hidden_size, config.mamba_expand * config.hidden_size
    rows = (B, config.num_key_value_heads, P, config.head_dim)
    conv = (B, config.mamba_d_conv - 1, inner + 2 * config.mamba_d_state)
    state = (B, inner // config.mamba_d_head, config.mamba_d_head, config.mamba_d_state)
    shapes: dict[str, tuple[int, ...]] = {MASK: (B, P)}
    for i, kind in enumerate(config.kinds):
        layer: dict[str, tuple[int, ...]]
        layer = {"k": rows, "v": rows} if kind.attends else {"conv": conv, "state": state}
        if kind.feeds_back:
            layer |= {"k_fb": (B, P, config.feedback_key_dim), "s": (B, P, D)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def position_axis(name: str) -> int | None:
    """Return the axis of positions of an array in the cache, None for a state."""
    return {MASK: 1, "k": 2, "v": 2, "k_fb": 1, "s": 1}.get(name.rpartition(".")[2])


def check_cache_arrays(config: SessaConfig, arrays: Mapping[str, np.ndarray], dtype: str) -> None:
    """Raise SessaError unless the arrays are a cache of this model in `dtype`, not empty.

    bfloat16 arrays have the dtype of ml_dtypes, as weights have.
    """
    mask = arrays.get(MASK)
    if mask is None or mask.ndim != 2 or mask.dtype != np.bool_ or 0 in mask.shape:
        raise SessaError(f"the cache has no array `{MASK}` of shape (B, P) and dtype bool")
    shapes = cache_shapes(config, *mask.shape)
    if wrong := sorted(shapes.keys() ^ arrays.keys()):
        where = "is missing" if wrong[0] in shapes else "does not belong to this model"
        raise SessaError(f"the cache is of another model: {wrong[0]} {where}")
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise SessaError(
                f"the cache is of another model: {name} has shape {arrays[name].shape}, "
                f"expected {shape}"
            )
        expected = _dtype_of(name, dtype)
        if arrays[name].dtype != expected:
            raise SessaError(
                f"the cache was made in another dtype: {name} is {arrays[name].dtype}, "
                f"expected {expected}"
            )


def _dtype_of(name: str, dtype: str) -> np.dtype:
    if name == MASK:
        return np.dtype(np.bool_)
    wide = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    if name.rpartition(".")[2] in STATES and wide.itemsize < 4:
        return np.dtype(np.float32)
    return wide
