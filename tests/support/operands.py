"""Random operands of the feedback solve in NumPy, for every test of the operator."""

from __future__ import annotations

import numpy as np

Arrays = dict[str, np.ndarray]
# In the order of the arguments of `feedback_solve`.
NAMES = ("f", "q", "k", "gamma", "past_s", "key_mask")


def draw_operands(
    seed: int | list[int],
    *,
    B: int = 2,
    T: int = 63,
    D: int = 41,
    K: int = 23,
    P: int = 0,
    mask: str | None = None,
    gain: float | None = None,
    logits: float | None = None,
    dtype: type = np.float32,
) -> Arrays:
    """Draw f, q, k, gamma, past_s (of P rows, so empty without a past), and key_mask if `mask`.

    `mask` is a name of `key_mask`. Gains are all `gain`, or of both signs up to 0.999 with many
    near it. The largest score has magnitude `logits`, or is left as drawn.
    """
    rng = np.random.default_rng(seed)
    shapes = {"f": (B, T, D), "q": (B, T, K), "k": (B, P + T, K), "past_s": (B, P, D)}
    found = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    if logits is not None:
        scores = np.abs(found["q"] @ found["k"].swapaxes(1, 2)) / np.sqrt(K)
        found["q"] *= dtype(logits / scores.max())
    gamma = 0.999 * np.tanh(2 * rng.normal(size=(B, T))) if gain is None else np.full((B, T), gain)
    found["gamma"] = gamma.astype(dtype)
    if mask is not None:
        found["key_mask"] = key_mask(mask, rng, B, T, P)
    return {name: found[name] for name in NAMES if name in found}


def key_mask(name: str, rng: np.random.Generator, B: int, T: int, P: int) -> np.ndarray:
    """Make a key mask (B, P + T), True where a key is seen.

    It is "open", "closed", "left" (padding of uneven length), "holes" (random), or "blind": holes,
    and the first rows of the first sequence see no key.
    """
    columns, shape = np.arange(P + T)[None], (B, P + T)
    masks = {
        "open": np.ones(shape, bool),
        "left": columns >= np.arange(B)[:, None] * ((P + T) // 2),
        "holes": (holes := rng.random(shape) < 0.6),
        "closed": np.zeros(shape, bool),
        "blind": holes & ((np.arange(B)[:, None] > 0) | (columns >= P + min(T, 4))),
    }
    return masks[name]


def draw_starts(seed: int, B: int, T: int, length: int = 12) -> np.ndarray:
    """Draw the first rows (B, T) int32 of documents of about `length` rows, some of one row."""
    rng = np.random.default_rng([seed, 7])
    begins = rng.random((B, T)) < 1 / length
    begins[:, 0] = True
    begins[0, 1:3] = T > 2
    begins[-1, T // 2 :] = False
    return np.maximum.accumulate(np.where(begins, np.arange(T, dtype=np.int32), 0), 1)
