"""The cache inside the compiled step of one token: whole buffers, of which R rows are read."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn

# Added to the score of a hidden row. It is finite, so that a token that sees no row gets the mean
# of rows that are zero, not NaN.
HIDDEN = -1e30


@dataclass(frozen=True)
class Position:
    """The place of the new token: the rows that it sees and its rotary position."""

    index: mx.array  # (1,) int32, the number of cached positions
    seen: mx.array  # (1 or B, 1, 1, R) bool, the cached tokens that are no padding, and itself
    past: mx.array  # (1 or B, 1, R) float32, 0 for a cached token and HIDDEN for any other row
    rope: Any  # the rotary position as `attention.apply_rope` takes it, None without

    @classmethod
    def after(cls, index: mx.array, rows: int, mask: mx.array | None, rope: Any) -> Position:
        """The position behind `index` cached ones; mask (B, R) is False for padding."""
        column = mx.arange(rows)[None]
        cached = column < index
        if mask is not None:
            cached = cached & mask
        return cls(
            index=index,
            seen=(cached | (column == index))[:, None, None],
            past=mx.where(cached, 0.0, HIDDEN)[:, None],
            rope=rope,
        )


class StepLayerCache:
    """Contents of one layer's `SessaLayerCache`: the buffers, and the state that is not written.

    `project` gives the queries, keys and values of the attention and, with feedback, the queries
    and keys of the feedback, side by side in one product.
    """

    def __init__(
        self,
        buffers: dict[str, mx.array],
        newest: mx.array | None,
        position: Position,
        project: Callable[[mx.array], mx.array],
    ) -> None:
        self.buffers, self.newest, self.position = buffers, newest, position
        self.project = project

    def write(self, name: str, row: mx.array, index: mx.array, axis: int) -> mx.array:
        """Write a row into a buffer and return the R rows that the step reads."""
        buffer = mx.slice_update(self.buffers[name], row, index, [axis])
        self.buffers[name] = buffer
        return buffer[(slice(None),) * axis + (slice(self.position.seen.shape[-1]),)]

    def write_newest_state(self) -> mx.array:
        """Write the state of the token before and return the rows (B, R, D) of states."""
        assert self.newest is not None
        return self.write("s", self.newest, self.position.index - 1, axis=1)


def hide_rows(rows: mx.array, mask: mx.array | None) -> mx.array:
    """Zero the rows (B, T, D) or (B, G, T, d) that the last T columns of a mask (B, S) hide."""
    if mask is None:
        return rows
    mask = mask[:, -rows.shape[-2] :, None]
    return mx.where(mask[:, None] if rows.ndim == 4 else mask, rows, 0)


def on_gpu() -> bool:
    """Return True when MLX computes on a GPU."""
    return mx.default_device().type == mx.DeviceType.gpu


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "proj_fb")


def join_projections(mixer: nn.Module) -> Callable[[mx.array], mx.array]:
    """One linear layer whose output is that of the mixer's projections side by side.

    Their arrays become parts of the joined ones, so that nothing is held twice. Projections that
    are quantised in different ways stay apart, and so do those of which only some have a bias.
    """
    layers = [mixer[name] for name in PROJECTIONS if name in mixer]
    forms = {
        (type(x), getattr(x, "bits", 0), getattr(x, "group_size", 0), "bias" in x) for x in layers
    }
    if len(forms) > 1:
        return lambda a: mx.concatenate([layer(a) for layer in layers], -1)
    joined = copy.copy(layers[0])
    for name in list(joined.parameters()):
        joined[name] = mx.concatenate([layer[name] for layer in layers])
        mx.eval(joined[name])
        ends = itertools.accumulate(len(layer[name]) for layer in layers[:-1])
        for layer, part in zip(layers, mx.split(joined[name], list(ends)), strict=True):
            layer[name] = part
            mx.eval(part)
    return joined
