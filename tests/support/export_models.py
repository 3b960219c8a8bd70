"""Small random checkpoints and exported models for the tests of export, generation and parity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from support.block_options import FAMILIES

from sessa_common.checkpoint.folder import save_weights
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.config import SessaConfig
from sessa_common.data.tokenizer import byte_tokenizer, write_tokenizer

Weights = dict[str, np.ndarray]

MAMBA: dict[str, dict] = {
    "mamba2": {"layer_kinds": "mamba2", "mamba_d_state": 12, "mamba_d_head": 16},
    "mamba2_hybrid": {
        "layer_kinds": ("transformer", "mamba2", "sessa"),
        "num_hidden_layers": 3,
        "mamba_d_state": 12,
        "mamba_d_head": 16,
        "mamba_d_conv": 3,
    },
}
# What can be exported.
VARIANTS: dict[str, dict] = {
    "heads": {},
    "grouped": {"num_key_value_heads": 2},
    "one_key_head": {"num_key_value_heads": 1},
    "single_head": {"num_attention_heads": 1},
    "norope": {"use_forward_rope": False},
    "untied": {"tie_word_embeddings": False},
    "weak_gamma": {"gamma_max": 0.5, "rope_theta": 500.0, "layer_norm_eps": 1e-3},
    "attention": {"layer_kinds": "transformer", "intermediate_size": 72, "num_key_value_heads": 2},
    "attention_one_head": {"layer_kinds": "transformer", "num_attention_heads": 1},
    "attention_gated": {"layer_kinds": "gated_attention"},
    # The middle layer has one pair of caches, the others have two.
    "hybrid": {
        "layer_kinds": ("sessa", "transformer", "sessa"),
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
    },
    "hybrid_gated": {"layer_kinds": ("gated_attention", "sessa"), "use_forward_rope": False},
    "sessa_transformer": {
        "layer_kinds": "sessa_transformer",
        "intermediate_size": 72,
        "num_key_value_heads": 2,
    },
    "sessa_transformer_one_head": {
        "layer_kinds": ("transformer", "sessa_transformer"),
        "num_attention_heads": 1,
    },
    # Every option of the standard block; the feedback's rows do not fill whole pairs.
    "options": {**FAMILIES["qwen3"], "rope_scaling": FAMILIES["qwen2"]["rope_scaling"]},
}


def small_config(variant: str = "heads", **changes: object) -> SessaConfig:
    """Two layers of width 40 on 257 tokens, with the changes of a variant."""
    base = {
        "vocab_size": 257,
        "hidden_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 300,
        "bos_token_id": 256,
        "eos_token_id": 256,
    }
    return SessaConfig(**{**base, **(VARIANTS | MAMBA)[variant], **changes})


def lively_weights(config: SessaConfig, seed: int = 0) -> Weights:
    """Initial weights made uneven: biases everywhere, sharper feedback, gains of both signs."""
    rng = np.random.default_rng([seed, 1])
    weights = initial_weights(config, seed)
    for name, value in weights.items():
        if name.endswith("bias"):
            weights[name] = (value + rng.normal(0, 0.3, value.shape)).astype(np.float32)
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            weights[name] = value * np.float32(25)
        elif config.norm_type == "rms" and name.endswith("norm.weight"):
            weights[name] = (value + rng.normal(0, 0.2, value.shape)).astype(np.float32)
        elif name.endswith(("proj_fb.weight", "gamma_ctx.weight")):
            weights[name] = value * np.float32(2)
    return weights


def write_checkpoint(
    folder: Path, config: SessaConfig, weights: Weights | None = None
) -> tuple[Path, Weights]:
    """A checkpoint folder with a byte tokenizer, and its weights."""
    weights = lively_weights(config) if weights is None else weights
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder, config, weights)
    write_tokenizer(folder, byte_tokenizer(), 256, config.max_position_embeddings)
    return folder, weights
