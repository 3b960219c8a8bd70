"""The pairs of caches that each layer of an exported model has, and which layers have a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError
from sessa_common.layer_kinds import KINDS

# natural and uniform return the grown caches; buffer returns only the new rows, which the runner
# writes into its buffers.
LAYOUTS = ("natural", "uniform", "buffer")
# The names in a cache file of the two tensors of a pair: forward attention, feedback, part.
PARTS = (("k", "k_fb", "key"), ("v", "s", "value"))


class Pair(NamedTuple):
    """Heads and widths of two cached tensors, (B, heads, P, width) each."""

    heads: int
    key_width: int
    value_width: int


def require_supported(config: SessaConfig) -> None:
    """Raise SessaError for a stack with a layer that has no graph."""
    for i, kind in enumerate(config.kinds):
        if not kind.exports:
            supported = ", ".join(name for name, known in KINDS.items() if known.exports)
            raise SessaError(
                f"layer {i} is {kind.name}, which ONNX export does not support; it takes "
                f"{supported} (run this model with PyTorch or MLX)"
            )


def layer_pairs(config: SessaConfig, i: int, layout: str = "natural") -> list[Pair]:
    """The cached pairs of layer i: (k_f, v_f), then (k_fb, s) with feedback.

    In the uniform layout the second pair is cut into pairs that are shaped like the first; zeros
    fill the last of them.
    """
    G, d = config.num_key_value_heads, config.head_dim
    first = Pair(G, d, d)
    if not config.kinds[i].feeds_back:
        return [first]
    if layout == "uniform":
        return [first] * (1 + row_heads(config, layout) // G)
    return [first, Pair(1, config.feedback_key_dim, config.hidden_size)]


def feedback_width(config: SessaConfig, part: str) -> int:
    """The width of the feedback's keys ("key") or of its states ("value")."""
    return config.feedback_key_dim if part == "key" else config.hidden_size


def row_heads(config: SessaConfig, layout: str) -> int:
    """The number of heads that hold a row of feedback keys or states together."""
    if layout != "uniform":
        return 1
    pair = config.num_key_value_heads * config.head_dim
    widest = max(config.feedback_key_dim, config.hidden_size)
    return -(-widest // pair) * config.num_key_value_heads


def row_width(config: SessaConfig, layout: str, part: str) -> int:
    """The width of a cached row of feedback keys or states, with the zeros that fill it up."""
    if layout == "uniform":
        return row_heads(config, layout) * config.head_dim
    return feedback_width(config, part)


def kv_layers(config: SessaConfig, layout: str = "natural") -> list[Pair]:
    """All cached pairs, layer after layer."""
    layers = range(config.num_hidden_layers)
    return [pair for i in layers for pair in layer_pairs(config, i, layout)]


def pair_numbers(config: SessaConfig, layout: str) -> list[range]:
    """The numbers of each layer's pairs, which are numbered through all layers."""
    sizes = [len(layer_pairs(config, i, layout)) for i in range(config.num_hidden_layers)]
    return [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]


def layout_of(config: SessaConfig, pairs: Sequence[Pair]) -> str:
    """The layout, "uniform" or "natural" (as in buffer), of these pairs."""
    return "natural" if list(pairs) == kv_layers(config) else "uniform"


def named_rows(
    config: SessaConfig, layout: str, arrays: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """Copy keys and values of all pairs, (B, heads, P, width), to `cache_contents` names."""
    found = {}
    for i, numbers in enumerate(pair_numbers(config, layout)):
        for j, (first, second, part) in enumerate(PARTS):
            forward, *rest = (arrays[2 * number + j] for number in numbers)
            found[f"layers.{i}.{first}"] = forward.copy()
            if rest:
                rows = _merge_heads(np.concatenate(rest, axis=1))
                found[f"layers.{i}.{second}"] = rows[..., : feedback_width(config, part)]
    return found


def numbered_pairs(
    config: SessaConfig, layout: str, named: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """Return keys and values of all pairs in the order of the graph; undoes `named_rows`."""
    found = []
    for i, numbers in enumerate(pair_numbers(config, layout)):
        columns = []
        for first, second, part in PARTS:
            pieces = [named[f"layers.{i}.{first}"]]
            if len(numbers) > 1:
                rows = named[f"layers.{i}.{second}"]
                missing = row_width(config, layout, part) - rows.shape[-1]
                rows = np.pad(rows, [(0, 0), (0, 0), (0, missing)])
                split = _split_heads(rows, row_heads(config, layout))
                pieces += np.split(split, len(numbers) - 1, axis=1)
            columns.append(pieces)
        found += [array for pair in zip(*columns, strict=True) for array in pair]
    return found


def _merge_heads(x: np.ndarray) -> np.ndarray:
    """(B, heads, P, width) -> (B, P, heads * width)."""
    return x.transpose(0, 2, 1, 3).reshape(len(x), x.shape[2], -1)


def _split_heads(x: np.ndarray, heads: int) -> np.ndarray:
    """(B, P, heads * width) -> (B, heads, P, width)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)
