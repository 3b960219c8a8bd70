"""Options of the standard block that make it the block of a family, on a width of 24."""

from __future__ import annotations

from typing import Any

LLAMA: dict[str, Any] = {
    "layer_kinds": "transformer",
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "norm_type": "rms",
    "mlp_type": "swiglu",
    "qkv_bias": False,
    "out_proj_bias": False,
    "mlp_bias": False,
}
CONTEXT = {"original_max_position_embeddings": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "qwen2": {
        **LLAMA,
        "layer_kinds": "sessa_transformer",
        "qkv_bias": True,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, **CONTEXT},
    },
    "qwen3": {
        **LLAMA,
        "layer_kinds": ("sessa_transformer", "transformer"),
        "qk_norm": True,
        "head_dim": 10,
        "feedback_key_dim": 7,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, **CONTEXT},
    },
}
