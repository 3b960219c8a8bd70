"""Selection of what a key mask shows: a weight of 0 does not hide NaN or infinity."""

from __future__ import annotations

from torch import Tensor


def visible_rows(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """x (B, n, D) with zeros in the rows that the first n columns of key_mask (B, S) hide."""
    return x if key_mask is None else x.masked_fill(~key_mask[:, : x.shape[1], None], 0)
