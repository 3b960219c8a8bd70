"""Folders of the Llama family as transformers writes them: keys, names and rotary pairs as ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sessa_common.checkpoint.lazy_tensors import LazyTensors, spec_of
from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError, expect, require
from sessa_common.rope import with_rope_scaling


@dataclass(frozen=True, kw_only=True)
class Family:
    """Properties that the code of a family fixes, and the keys that a folder of it may leave out.

    A bias of None follows the key `attention_bias`.
    """

    qkv_bias: bool | None = None
    out_proj_bias: bool | None = None
    qk_norm: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
MISTRAL = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    **ENDS,
}
FAMILIES = {
    "llama": Family(defaults=ENDS),
    "mistral": Family(qkv_bias=False, out_proj_bias=False, defaults=MISTRAL),
    "qwen2": Family(qkv_bias=True, out_proj_bias=False, defaults=QWEN),
    "qwen3": Family(qk_norm=True, defaults={**QWEN, "head_dim": 128}),
}
# Our key, theirs, and what theirs is when it is null or left out; "" when it must be there.
KEYS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", ""),
    "hidden_size": ("hidden_size", ""),
    "intermediate_size": ("intermediate_size", ""),
    "num_hidden_layers": ("num_hidden_layers", ""),
    "num_attention_heads": ("num_attention_heads", ""),
    "num_key_value_heads": ("num_key_value_heads", 0),
    "head_dim": ("head_dim", 0),
    "max_position_embeddings": ("max_position_embeddings", 2048),
    "layer_norm_eps": ("rms_norm_eps", 1e-6),
    "rope_theta": ("rope_theta", 10000.0),
    "rope_scaling": ("rope_scaling", None),
    "tie_word_embeddings": ("tie_word_embeddings", False),
    "mlp_bias": ("mlp_bias", False),
    "bos_token_id": ("bos_token_id", None),
    "pad_token_id": ("pad_token_id", None),
}
NAMES = {
    r"model\.layers\.(\d+)\.input_layernorm\.weight": r"model.layers.\1.ln.weight",
    r"model\.layers\.(\d+)\.post_attention_layernorm\.weight": r"model.layers.\1.ln_mlp.weight",
    r"model\.layers\.(\d+)\.self_attn\.o_proj\.(.+)": r"model.layers.\1.mixer.out_proj.\2",
    r"model\.layers\.(\d+)\.self_attn\.(.+)": r"model.layers.\1.mixer.\2",
}
THEIR_NAMES = {
    r"model\.layers\.(\d+)\.ln\.weight": r"model.layers.\1.input_layernorm.weight",
    r"model\.layers\.(\d+)\.ln_mlp\.weight": r"model.layers.\1.post_attention_layernorm.weight",
    r"model\.layers\.(\d+)\.mixer\.out_proj\.(.+)": r"model.layers.\1.self_attn.o_proj.\2",
    r"model\.layers\.(\d+)\.mixer\.(.+)": r"model.layers.\1.self_attn.\2",
}
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ROTATED = re.compile(r".*\.mixer\.(?:[qk]_proj|[qk]_norm)\.(?:weight|bias)")


def is_llama_family(settings: Mapping[str, Any]) -> bool:
    """Return True for the config.json of a family whose block this project has."""
    return settings.get("model_type") in FAMILIES


def llama_config(settings: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Our keys for their config.json, and what had to be assumed.

    Raises SessaError that names the setting for a model that this project does not compute.
    """
    try:
        return _llama_config(settings)
    except SessaError as error:
        raise SessaError(f"{where}: {error}") from None


def _llama_config(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    name = settings.get("model_type")
    expect(name in FAMILIES, "model_type", name, f"one of {', '.join(FAMILIES)}")
    family = FAMILIES[str(name)]
    settings = with_rope_scaling({**family.defaults, **settings})
    activation = settings.get("hidden_act", "silu")
    expect(activation == "silu", "hidden_act", activation, "'silu'")
    share = settings.get("partial_rotary_factor", 1.0)
    expect(share == 1, "partial_rotary_factor", share, "1, because all of a head is rotated")
    _refuse_windows(settings)
    keys = {}
    for ours, (theirs, default) in KEYS.items():
        value = settings.get(theirs)
        keys[ours] = default if value is None else value
        expect(keys[ours] != "", theirs, None, "a number")
    bias = settings.get("attention_bias", False)
    keys |= {
        "layer_kinds": "transformer",
        "norm_type": "rms",
        "mlp_type": "swiglu",
        "qkv_bias": bias if family.qkv_bias is None else family.qkv_bias,
        "out_proj_bias": bias if family.out_proj_bias is None else family.out_proj_bias,
        "qk_norm": family.qk_norm,
        "dtype": settings.get("dtype") or settings.get("torch_dtype") or "float32",
    }
    end, notes = settings.get("eos_token_id"), []
    if several := end_ids(settings):
        end = several[0]
        notes.append(f"config.json has the first of the end tokens {several}")
    return {**keys, "eos_token_id": end}, notes


def end_ids(settings: Mapping[str, Any]) -> list[int]:
    """The ids that end a text where their config.json has several, else none."""
    given = settings.get("eos_token_id")
    return list(given) if isinstance(given, list) else []


def _refuse_windows(settings: Mapping[str, Any]) -> None:
    """Raise SessaError where a layer sees only the newest tokens."""
    layers = settings.get("layer_types") or []
    window, used = settings.get("sliding_window"), settings.get("use_sliding_window", True)
    # Qwen2 and Qwen3 begin their windows at the layer `max_window_layers`.
    first = settings.get("max_window_layers", 0)
    begins = first < settings.get("num_hidden_layers", first + 1)
    windowed = window is not None and used and begins
    if any(kind != "full_attention" for kind in layers) or (windowed and not layers):
        raise SessaError(
            f"sliding_window is {window}: layers that see only the newest tokens are not "
            "supported; set use_sliding_window to false if the model was trained without"
        )


def llama_tensors(config: SessaConfig, tensors: Mapping[str, np.ndarray]) -> LazyTensors:
    """Tensors by our names, with the rotary pairs of queries and keys side by side.

    The family rotates the rows i and i + d/2 of a head, this project 2i and 2i + 1. A buffer of
    frequencies is left out, and so is a head that only repeats the tied embedding.
    """
    found = LazyTensors()
    for name in tensors:
        ours = _rename(name, NAMES)
        repeats = ours == "lm_head.weight" and config.tie_word_embeddings
        if not repeats and not ours.endswith(".rotary_emb.inv_freq"):
            _add(found, ours, tensors, name, interleave_halves, config.head_dim)
    return found


def their_tensors(config: SessaConfig, weights: Mapping[str, np.ndarray]) -> LazyTensors:
    """Weights by the names of the family, with its rotary halves; undoes `llama_tensors`."""
    found = LazyTensors()
    for name in weights:
        _add(found, _rename(name, THEIR_NAMES), weights, name, separate_pairs, config.head_dim)
    return found


def _add(
    found: LazyTensors,
    name: str,
    tensors: Mapping[str, np.ndarray],
    there: str,
    turn: Callable[[np.ndarray, int], np.ndarray],
    head_dim: int,
) -> None:
    """Add a tensor under a new name, with its rows turned where RoPE rotates them."""
    if ROTATED.fullmatch(name) or ROTATED.fullmatch(there):
        found.defer(name, spec_of(tensors, there), lambda: turn(tensors[there], head_dim))
    else:
        found.link(name, tensors, there)


def their_config(config: SessaConfig) -> dict[str, Any]:
    """The config.json of the family that computes this model; undoes `llama_config`.

    Raises SessaError that names the first thing which no family has.
    """
    for name, expected in (
        ("layer_kinds", "transformer"),
        ("norm_type", "rms"),
        ("mlp_type", "swiglu"),
        ("use_forward_rope", True),
    ):
        value = getattr(config, name)
        require(
            value == expected,
            f"{name} is {value!r}, which the Llama family does not have; expected {expected!r}",
        )
    family = _family_of(config)
    keys = {theirs: getattr(config, ours) for ours, (theirs, _) in KEYS.items()}
    scaling, theta = keys.pop("rope_scaling"), keys.pop("rope_theta")
    rope = {"rope_type": "default"} if scaling is None else scaling.to_dict()
    return {
        "architectures": [CLASSES[family]],
        "model_type": family,
        **keys,
        "rope_parameters": {"rope_theta": theta, **rope},
        "eos_token_id": config.eos_token_id,
        "hidden_act": "silu",
        "attention_bias": config.qkv_bias,
        "dtype": config.dtype,
    }


def _family_of(config: SessaConfig) -> str:
    same, name = config.qkv_bias == config.out_proj_bias, "llama"
    if config.qk_norm:
        name = "qwen3"
    elif config.qkv_bias and not config.out_proj_bias:
        same, name = True, "qwen2"
    fits = same and not (config.mlp_bias and name != "llama")
    require(
        fits,
        f"no member of the Llama family has qkv_bias {config.qkv_bias}, out_proj_bias "
        f"{config.out_proj_bias}, mlp_bias {config.mlp_bias} and qk_norm {config.qk_norm} together",
    )
    return name


def _rename(name: str, names: Mapping[str, str]) -> str:
    for pattern, replacement in names.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return name


def interleave_halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Move the rows i and i + d/2 of every head to 2i and 2i + 1, rows (heads d, ...)."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def separate_pairs(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Undo `interleave_halves`."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
