"""Selection of what a key mask shows: a weight of 0 does not hide NaN or infinity."""

from __future__ import annotations

import mlx.core as mx


def visible_rows(x: mx.array, key_mask: mx.array | None) -> mx.array:
    """x (B, n, D) with zeros in the rows that the first n columns of key_mask (B, S) hide."""
    return x if key_mask is None else mx.where(key_mask[:, : x.shape[1], None], x, 0)
