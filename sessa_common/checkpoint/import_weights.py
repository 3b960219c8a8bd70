"""Import of weights under other names: the author's release, one layer or a stack, MLX files."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sessa_common.checkpoint.folder import NUMPY_DTYPES, channels_first, read_safetensors
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.checkpoint.quantization import dequantize_weights, is_quantized
from sessa_common.config import SessaConfig, parameter_shapes
from sessa_common.errors import SessaError
from sessa_common.extras import install
from sessa_common.frameworks import framework, is_installed
from sessa_common.input_files import require_modest_archive
from sessa_common.layer_kinds import LayerKind, infer_kind

Tensors = dict[str, np.ndarray]

# Files that torch.save wrote.
TORCH_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt"}
LAYER = re.compile(
    r"(?:(?P<prefix>.*?)\.)??(?P<tensor>(?:ln|ln_mlp|W_in|W_out|mlp\.(?:gate|up|down)_proj"
    r"|mixer\.(?:[qkv]_proj|proj_fb|out_proj|conv1d))\.(?:weight|bias)"
    r"|mixer\.(?:gamma_ctx|in_proj|norm|q_norm|k_norm)\.weight|mixer\.(?:gamma_bias|dt_bias|A_log|D)"
    r"|mixer\.(?:rope_inv_freq|causal_mask_\w+))"
)
BUFFER = re.compile(r"mixer\.(?:rope_inv_freq|causal_mask_\w+)")
OUTSIDE = {
    r"(?:.*\.)?(?:embed_tokens|embedding|embed|tok_emb|wte)\.weight": "model.embed_tokens.weight",
    r"(?:.*\.)?(?:norm|norm_f|ln_f|final_norm)\.(weight|bias)": r"model.norm.\1",
    r"(?:.*\.)?(?:lm_head|head)\.weight": "lm_head.weight",
}

# The tensors of a layer whose shapes settle keys of config.json.
SHAPE_KEYS = {
    "attention": ("ln.weight", "mixer.k_proj.weight"),
    "sessa": ("ln.weight", "mixer.k_proj.weight"),
    "mamba2": ("ln.weight", "mixer.norm.weight", "mixer.A_log", "mixer.conv1d.weight"),
}


@dataclass
class ImportedWeights:
    """Weights by our names, the release's buffers of layer 0, and notes on assumed values."""

    weights: Tensors
    buffers: Tensors
    notes: list[str] = field(default_factory=list)


def read_arrays(path: Path) -> Tensors:
    """Every array of a .safetensors, .npz or PyTorch file, as it is stored."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        if not is_installed("torch"):
            raise SessaError(f"{path}: reading it needs PyTorch; {install('torch')}")
        return framework("torch", "state_dict_file").read_state_dict(path)
    if path.suffix != ".npz":
        raise SessaError(f"{path}: expected a checkpoint folder, .safetensors, .npz, .pt or .pth")
    require_modest_archive(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            # MLX writes bfloat16 as two bytes without a type.
            return {
                name: a.view(ml_dtypes.bfloat16) if a.dtype == np.dtype("V2") else a
                for name, a in file.items()
            }
    except Exception as error:  # every kind of damage has its own, down to errors of Python syntax
        raise SessaError(f"{path}: not a readable .npz file ({error})") from None


def map_names(
    tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any], where: str
) -> ImportedWeights:
    """Give every tensor its name in `parameter_shapes`, dequantised; buffers are set apart.

    settings is the content of config.json, for its "quantization". Raises SessaError for a name
    that is neither the release's nor ours, for two tensors of one name and for a gap in the layers.
    """
    if is_quantized(tensors):
        norms = [value for name, value in tensors.items() if re.search(r"(^|\.)ln\.weight$", name)]
        width = norms[0].size if norms else 0
        tensors = dequantize_weights(tensors, settings.get("quantization"), width, where)
    layers: dict[int, Tensors] = defaultdict(dict)
    found = ImportedWeights({}, {})
    for name, value in tensors.items():
        if match := LAYER.fullmatch(name):
            _put(layers[_layer_number(match["prefix"])], match["tensor"], value, name, where)
        else:
            _put(found.weights, _outside_name(name, where), value, name, where)
    if not layers:
        raise SessaError(f"{where}: no Sessa layer in it (looked for names such as ln.weight)")
    if sorted(layers) != list(range(len(layers))):
        raise SessaError(f"{where}: layers {sorted(layers)} do not count from 0 without a gap")
    for i, layer in sorted(layers.items()):
        for name, value in layer.items():
            if not BUFFER.fullmatch(name):
                found.weights[f"model.layers.{i}.{name}"] = value
            elif i == 0:
                found.buffers[name.removeprefix("mixer.")] = value
    found.weights = dict(channels_first(found.weights))
    return found


def _put(into: Tensors, name: str, value: np.ndarray, given: str, where: str) -> None:
    if name in into:
        raise SessaError(f"{where}: {given} is a second tensor for {name}")
    if not BUFFER.fullmatch(name) and value.dtype not in NUMPY_DTYPES.values():
        raise SessaError(f"{where}: {given} is {value.dtype}, expected a floating type")
    into[name] = value


def _layer_number(prefix: str | None) -> int:
    last = (prefix or "").rpartition(".")[2]
    return int(last) if last.isdecimal() and len(last) < 10 else 0


def _outside_name(name: str, where: str) -> str:
    for pattern, ours in OUTSIDE.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    raise SessaError(f"{where}: tensor {name} is not part of a Sessa model")


def find_config(found: ImportedWeights, given: Mapping[str, Any], where: str) -> SessaConfig:
    """The configuration that shapes and buffers determine, with the keys `given` over it.

    Raises SessaError that says which key is missing: neither the number of heads nor RoPE can be
    read from the weights alone. Keys that get the release's defaults are listed in the notes.
    """
    weights = found.weights
    told = infer_config(found, where)
    for key in told.keys() & given.keys() - {"dtype", "max_position_embeddings", "layer_kinds"}:
        if told[key] != given[key]:
            raise SessaError(f"{where}: {key} is {told[key]} in the weights, given {given[key]}")
    config = {**told, **given}
    keys = [value for name, value in weights.items() if name.endswith("k_proj.weight")]
    if not keys:
        config = {"num_attention_heads": 1, "use_forward_rope": False, **config}
    missing = []
    if "num_attention_heads" not in config:
        missing.append("`num_attention_heads`")
    if "use_forward_rope" not in config:
        missing.append("`use_forward_rope`")
    if "vocab_size" not in config:
        missing.append("`vocab_size` (it has no embedding: one is drawn from `seed`)")
    if missing:
        raise SessaError(
            f"{where}: the weights do not say everything; add {', '.join(missing)}, "
            "or a config.json as `config`"
        )
    heads = _positive(config, "num_attention_heads")
    if keys:
        rows = keys[0].shape[0]
        config.setdefault("num_key_value_heads", rows * heads // config["hidden_size"])
    unused = {
        "gamma_max": not any(kind.feeds_back for kind in _kinds(_layers(weights))),
        "rope_theta": not config["use_forward_rope"],
    }
    for key in ("gamma_max", "layer_norm_eps", "rope_theta"):
        if key not in config and not unused.get(key):
            found.notes.append(
                f"assumed {key} = {getattr(SessaConfig, key)}, the release's default"
            )
    whole = SessaConfig.from_dict(config, where)
    if whole.layer_kinds != told["layer_kinds"]:
        raise SessaError(
            f"{where}: layer_kinds is {told['layer_kinds']} in the weights, "
            f"given {whole.layer_kinds}"
        )
    return whole


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config[key]
    if not isinstance(value, int) or value < 1:
        raise SessaError(f"{key} is {value!r}, expected a positive integer")
    return value


def infer_config(found: ImportedWeights, where: str) -> dict[str, Any]:
    """The keys of config.json that shapes and the release's buffers settle."""
    return _told_by_shapes(found.weights, where) | _told_by_buffers(found, where)


def _told_by_shapes(weights: Tensors, where: str) -> dict[str, Any]:
    layers = _layers(weights)
    kinds = _kinds(layers)
    for i, kind in enumerate(kinds):
        missing = [name for name in SHAPE_KEYS[kind.mixer] if not np.ndim(layers[i].get(name, 0))]
        if missing:
            raise SessaError(f"{where}: tensor {missing[0]} of layer {i} is missing")
    dtypes, names = {str(v.dtype) for v in weights.values()}, tuple(kind.name for kind in kinds)
    config: dict[str, Any] = {
        "hidden_size": layers[0]["ln.weight"].shape[0],
        "num_hidden_layers": len(layers),
        "layer_kinds": names[0] if len(set(names)) == 1 else names,
        "dtype": dtypes.pop() if len(dtypes) == 1 else "float32",
    }
    for layer, kind in zip(layers, kinds, strict=True):
        config |= _told_by_layer(layer, kind, config["hidden_size"])
    embedding, head = (weights.get(n) for n in ("model.embed_tokens.weight", "lm_head.weight"))
    if embedding is not None:
        config["vocab_size"] = embedding.shape[0]
        config["tie_word_embeddings"] = head is None or np.array_equal(embedding, head)
    return config


def _layers(weights: Tensors) -> list[Tensors]:
    layers: dict[int, Tensors] = defaultdict(dict)
    for name, value in weights.items():
        if name.startswith("model.layers."):
            number, _, inside = name.removeprefix("model.layers.").partition(".")
            layers[int(number)][inside] = value
    return [layers[i] for i in range(len(layers))]


def _kinds(layers: list[Tensors]) -> list[LayerKind]:
    return [infer_kind(layer) for layer in layers]


def _told_by_layer(layer: Tensors, kind: LayerKind, width: int) -> dict[str, Any]:
    if kind.mixer == "mamba2":
        inner, heads = layer["mixer.norm.weight"].size, layer["mixer.A_log"].size
        shape = layer["mixer.conv1d.weight"].shape
        return {
            "mamba_expand": inner // max(width, 1),
            "mamba_d_head": inner // max(heads, 1),
            "mamba_d_state": (shape[0] - inner) // 2,
            "mamba_d_conv": shape[-1],
        }
    told: dict[str, Any] = {}
    if kind.block == "standard":
        told["intermediate_size"] = layer["mlp.up_proj.weight"].shape[0]
    # The release has no out_proj with one head.
    if "mixer.out_proj.weight" not in layer:
        told["num_attention_heads"] = 1
    return told


def _told_by_buffers(found: ImportedWeights, where: str) -> dict[str, Any]:
    config: dict[str, Any] = {}
    frequencies = found.buffers.get("rope_inv_freq")
    masks = [v for name, v in found.buffers.items() if name.startswith("causal_mask")]
    if masks:
        # The release registers both kinds of buffer at once, so no frequencies means no RoPE.
        config |= {"max_position_embeddings": masks[0].shape[0], "use_forward_rope": False}
    if frequencies is not None:
        width, d = found.weights["model.layers.0.ln.weight"].shape[0], 2 * frequencies.size
        want = 10000.0 ** (-np.arange(0, d, 2) / d)
        if not np.allclose(frequencies.astype(np.float64), want, rtol=1e-2):
            raise SessaError(f"{where}: rope_inv_freq is not of base 10000, the release's only one")
        config |= {"use_forward_rope": True, "num_attention_heads": width // d, "rope_theta": 1e4}
    return config


def complete(found: ImportedWeights, config: SessaConfig, seed: int) -> None:
    """Add the tensors that a bare stack of layers lacks for a language model, and note them.

    The embedding is drawn as for a new model, the final norm is 1 and 0, in the weights' dtype.
    """
    weights = found.weights
    if config.tie_word_embeddings and weights.pop("lm_head.weight", None) is not None:
        found.notes.append("dropped lm_head.weight, which is tied to the embedding")
    outside = [name for name in parameter_shapes(config) if not name.startswith("model.layers.")]
    missing = [name for name in outside if name not in weights]
    if not missing:
        return
    drawn = initial_weights(config, seed)
    for name in missing:
        weights[name] = drawn[name].astype(NUMPY_DTYPES[config.dtype])
        how = (
            "1"
            if name == "model.norm.weight"
            else "0"
            if name == "model.norm.bias"
            else (f"random numbers, seed {seed}: train before use")
        )
        found.notes.append(f"invented {name} {weights[name].shape}: {how}")
