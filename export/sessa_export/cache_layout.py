"""The pairs of caches that each layer of an exported model has, and what can be exported at all."""

from __future__ import annotations

from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError

# natural and uniform return grown caches; buffer returns new rows, for a runner that fills them in.
LAYOUTS = ("natural", "uniform", "buffer")


def require_supported(config: SessaConfig) -> None:
    """Raise SessaError for a stack with a layer that has no graph."""
    if "mamba2" in config.mixers:
        i = config.mixers.index("mamba2")
        raise SessaError(
            f"layer {i} is mamba2, which ONNX export does not support; it takes sessa and "
            "attention layers (run this model with PyTorch or MLX)"
        )


def layer_pairs(config: SessaConfig, i: int, layout: str = "natural") -> list[tuple[int, int]]:
    """Heads and width of the cached pairs of layer i: (k_f, v_f), then (k_fb, s) with feedback.

    In the uniform layout the second pair is cut into H/G pairs that are shaped like the first.
    """
    H, G = config.num_attention_heads, config.num_key_value_heads
    first = (G, config.head_dim)
    if not feeds_back(config, i):
        return [first]
    return [first] * (1 + H // G) if layout == "uniform" else [first, (1, config.hidden_size)]


def feeds_back(config: SessaConfig, i: int) -> bool:
    """Whether layer i has a feedback solve."""
    return config.feedback and config.mixers[i] == "sessa"


def kv_layers(config: SessaConfig, layout: str = "natural") -> list[tuple[int, int]]:
    """Heads and width of all cached pairs, layer after layer."""
    layers = range(config.num_hidden_layers)
    return [pair for i in layers for pair in layer_pairs(config, i, layout)]


def pair_numbers(config: SessaConfig, layout: str) -> list[range]:
    """Numbers of each layer's pairs, which count on from layer to layer."""
    sizes = [len(layer_pairs(config, i, layout)) for i in range(config.num_hidden_layers)]
    return [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
