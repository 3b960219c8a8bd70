"""The pairs of caches that each layer of an exported model has, and which layers have a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError
from sessa_common.layer_kinds import KINDS

# natural and uniform return the grown caches; buffer returns only the new rows, which the runner
# writes into its buffers.
LAYOUTS = ("natural", "uniform", "buffer")


def require_supported(config: SessaConfig) -> None:
    """Raise SessaError for a stack with a layer that has no graph, or with an option it lacks."""
    for i, kind in enumerate(config.kinds):
        if not kind.exports:
            supported = ", ".join(name for name, known in KINDS.items() if known.exports)
            raise SessaError(
                f"layer {i} is {kind.name}, which ONNX export does not support; it takes "
                f"{supported} (run this model with PyTorch or MLX)"
            )
    options = {name: repr(value) for name, value in config.block_options.items()}
    if config.rope_scaling is not None:
        options["rope_scaling"] = config.rope_scaling.rope_type
    if options:
        listed = ", ".join(f"{name} {value}" for name, value in options.items())
        raise SessaError(
            f"ONNX export does not support {listed} yet (run this model with PyTorch or MLX)"
        )


def layer_pairs(config: SessaConfig, i: int, layout: str = "natural") -> list[tuple[int, int]]:
    """Heads and width of the cached pairs of layer i: (k_f, v_f), then (k_fb, s) with feedback.

    In the uniform layout the second pair is cut into H/G pairs that are shaped like the first.
    """
    H, G = config.num_attention_heads, config.num_key_value_heads
    first = (G, config.head_dim)
    if not config.kinds[i].feeds_back:
        return [first]
    return [first] * (1 + H // G) if layout == "uniform" else [first, (1, config.hidden_size)]


def kv_layers(config: SessaConfig, layout: str = "natural") -> list[tuple[int, int]]:
    """Heads and width of all cached pairs, layer after layer."""
    layers = range(config.num_hidden_layers)
    return [pair for i in layers for pair in layer_pairs(config, i, layout)]


def pair_numbers(config: SessaConfig, layout: str) -> list[range]:
    """The numbers of each layer's pairs, which are numbered through all layers."""
    sizes = [len(layer_pairs(config, i, layout)) for i in range(config.num_hidden_layers)]
    return [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]


def layout_of(config: SessaConfig, pairs: Sequence[tuple[int, int]]) -> str:
    """The layout, "uniform" or "natural" (as in buffer), of pairs of these heads and widths."""
    return "natural" if list(pairs) == kv_layers(config) else "uniform"


def named_rows(
    config: SessaConfig, layout: str, arrays: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """Copy keys and values of all pairs, (B, heads, P, width), to `cache_contents` names."""
    found = {}
    for i, numbers in enumerate(pair_numbers(config, layout)):
        for j, (first, second) in enumerate((("k", "k_fb"), ("v", "s"))):
            forward, *rest = (arrays[2 * number + j] for number in numbers)
            found[f"layers.{i}.{first}"] = forward.copy()
            if rest:
                heads = np.concatenate(rest, axis=1)
                found[f"layers.{i}.{second}"] = _merge_heads(heads)
    return found


def numbered_pairs(
    config: SessaConfig, layout: str, named: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """Return keys and values of all pairs in the order of the graph; undoes `named_rows`."""
    found = []
    for i, numbers in enumerate(pair_numbers(config, layout)):
        columns = []
        for first, second in (("k", "k_fb"), ("v", "s")):
            pieces = [named[f"layers.{i}.{first}"]]
            if len(numbers) > 1:
                rows = named[f"layers.{i}.{second}"]
                heads = config.num_attention_heads if layout == "uniform" else 1
                pieces += np.split(_split_heads(rows, heads), len(numbers) - 1, axis=1)
            columns.append(pieces)
        found += [array for pair in zip(*columns, strict=True) for array in pair]
    return found


def _merge_heads(x: np.ndarray) -> np.ndarray:
    """(B, heads, P, width) -> (B, P, heads * width)."""
    return x.transpose(0, 2, 1, 3).reshape(len(x), x.shape[2], -1)


def _split_heads(x: np.ndarray, heads: int) -> np.ndarray:
    """(B, P, heads * width) -> (B, heads, P, width)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)
