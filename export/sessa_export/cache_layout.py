"""The pairs of caches that each layer of an exported model has, and which layers have a graph."""

from __future__ import annotations

from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError
from sessa_common.layer_kinds import KINDS

# natural and uniform return the grown caches; buffer returns only the new rows, which the runner
# writes into its buffers.
LAYOUTS = ("natural", "uniform", "buffer")


def require_supported(config: SessaConfig) -> None:
    """Raise SessaError for a stack with a layer that has no graph."""
    for i, kind in enumerate(config.kinds):
        if not kind.exports:
            supported = ", ".join(name for name, known in KINDS.items() if known.exports)
            raise SessaError(
                f"layer {i} is {kind.name}, which ONNX export does not support; it takes "
                f"{supported} (run this model with PyTorch or MLX)"
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
