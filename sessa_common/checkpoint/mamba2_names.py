"""Mamba-2 folders as transformers' Mamba2ForCausalLM writes them: names and keys as ours."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sessa_common.errors import SessaError

# Our key, theirs, and what theirs is when a folder leaves it out.
KEYS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 32768),
    "hidden_size": ("hidden_size", 4096),
    "num_hidden_layers": ("num_hidden_layers", 64),
    "layer_norm_eps": ("layer_norm_epsilon", 1e-5),
    "tie_word_embeddings": ("tie_word_embeddings", False),
    "bos_token_id": ("bos_token_id", 0),
    "eos_token_id": ("eos_token_id", 2),
    "pad_token_id": ("pad_token_id", 1),
    "mamba_d_state": ("state_size", 128),
    "mamba_d_conv": ("conv_kernel", 4),
    "mamba_expand": ("expand", 2),
    "mamba_d_head": ("head_dim", 64),
}
# The one form of the layer that this project computes, and their default.
REQUIRED: dict[str, tuple[Any, Any]] = {
    "n_groups": (1, 8),
    "hidden_act": ("silu", "silu"),
    "rms_norm": (True, True),
    "use_bias": (False, False),
    "use_conv_bias": (True, True),
}
NAMES = {
    r"(?:backbone|model)\.layers\.(\d+)\.norm\.weight": r"model.layers.\1.ln.weight",
    r"(?:backbone|model)\.layers\.(.+)": r"model.layers.\1",
    r"backbone\.embeddings?\.weight": "model.embed_tokens.weight",
    r"backbone\.norm_f\.weight": "model.norm.weight",
}
CONTEXT = 2048


def mamba2_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors by our names; a name that is not theirs stays as it is."""
    return {_rename(name): value for name, value in tensors.items()}


def _rename(name: str) -> str:
    for pattern, ours in NAMES.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    return name


def mamba2_config(
    settings: Mapping[str, Any], given: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], list[str]]:
    """Our keys for their config.json with `given` over them, and what had to be assumed.

    Raises SessaError that names the setting for a form of the layer that this project has not.
    """
    for key, (expected, default) in REQUIRED.items():
        if (value := settings.get(key, default)) != expected:
            raise SessaError(f"{where}: {key} is {value!r}; only {expected!r} can be converted")
    lowest, highest = settings.get("time_step_limit") or (0.0, math.inf)
    # Some versions write infinity as an object.
    if lowest != 0 or (isinstance(highest, (int, float)) and math.isfinite(highest)):
        raise SessaError(
            f"{where}: time_step_limit is {[lowest, highest]}; only steps without a "
            "limit can be converted"
        )
    keys = {ours: settings.get(key, default) for ours, (key, default) in KEYS.items()}
    dtype = settings.get("dtype") or settings.get("torch_dtype") or "float32"
    keys |= {
        "layer_kinds": "mamba2",
        "num_attention_heads": 1,
        "use_forward_rope": False,
        "dtype": dtype,
    }
    notes = []
    if "max_position_embeddings" not in given:
        notes.append(
            f"assumed max_position_embeddings = {CONTEXT}; the layers have no limit "
            "(`config` sets another)"
        )
    return {**keys, "max_position_embeddings": CONTEXT, **given}, notes
