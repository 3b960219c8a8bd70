"""Adapters: what fine-tuning adds to a model, in one folder that PEFT and mlx-lm read too.

A linear layer with LoRA computes W x + scale * B (A x), with A (rank, in) and B (out, rank). An
adapter may also hold whole parameters, which replace those of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sessa_common.checkpoint.finite import require_finite_weights
from sessa_common.checkpoint.folder import (
    load_weights,
    read_safetensors,
    weight_files,
    write_safetensors,
)
from sessa_common.checkpoint.lazy_tensors import LazyTensors, Spec, spec_of
from sessa_common.checkpoint.run_files import ADAPTER_CONFIG
from sessa_common.config import SessaConfig, parameter_shapes
from sessa_common.errors import SessaError
from sessa_common.json_files import read_json

# The same arrays twice: PEFT's names and mlx-lm's, whose matrices are transposed.
PEFT_FILE, MLX_LM_FILE = "adapter_model.safetensors", "adapters.safetensors"
A, B = ".lora_A.weight", ".lora_B.weight"
MLX_LM_NAMES = {A: ".lora_a", B: ".lora_b"}
PEFT_PREFIX = "base_model.model."
# Options of PEFT's LoRA that change what it computes, with the values that leave it as above.
PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
}

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Arrays by name: LoRA's "<layer>.lora_A.weight" and "<layer>.lora_B.weight", and parameters.

    `base` is the model that it was made for, as its file says; None where it says nothing.
    """

    arrays: dict[str, np.ndarray]
    scale: float
    base: str | None = None
    where: str = "the adapter"


def lora_shapes(config: SessaConfig, rank: int, targets: Sequence[str] = ()) -> Shapes:
    """Name and shape of the LoRA matrices of a model, A before B, in the order of its layers.

    `targets` are names of linear layers inside a block, or their last parts; none means all.
    Raises SessaError for a target that the model does not have.
    """
    layers = {
        name.removesuffix(".weight"): shape
        for name, shape in parameter_shapes(config).items()
        if name.startswith("model.layers.") and len(shape) == 2 and "gamma_ctx" not in name
    }
    for target in targets:
        if not any(_is_target(name, (target,)) for name in layers):
            known = sorted({inside_layer(name) for name in layers})
            raise SessaError(
                f"lora_targets has {target!r}, which is no linear layer of this model; it has "
                f"{', '.join(known)}"
            )
    shapes: Shapes = {}
    for name, (out, width) in layers.items():
        if not targets or _is_target(name, targets):
            shapes[name + A], shapes[name + B] = (rank, width), (out, rank)
    return shapes


def inside_layer(name: str) -> str:
    """The name inside its block of what has the name model.layers.I.name."""
    return name.split(".", 3)[3]


def _is_target(name: str, targets: Sequence[str]) -> bool:
    return any(f".{name}".endswith(f".{target}") for target in targets)


def initial_lora(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, np.ndarray]:
    """Draw LoRA matrices in float32: A uniform within in^-1/2, B zero, as PEFT and mlx-lm do."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.uniform(-(shape[1] ** -0.5), shape[1] ** -0.5, shape).astype(np.float32)
        if name.endswith(A)
        else np.zeros(shape, np.float32)
        for name, shape in shapes.items()
    }


def adapter_config(names: Sequence[str], base: str, rank: int, alpha: float) -> dict[str, Any]:
    """The keys of adapter_config.json for arrays of these names, for PEFT and mlx-lm at once.

    Without LoRA matrices there is nothing that PEFT could load, so its keys are left out.
    """
    keys = sorted({inside_layer(name.removesuffix(A)) for name in names if name.endswith(A)})
    about = {"base_model_name_or_path": base, "num_layers": -1}
    if not keys:
        return {**about, "fine_tune_type": "full", "lora_parameters": {}}
    return {
        **about,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": keys,
        "bias": "none",
        "inference_mode": True,
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": rank, "scale": alpha / rank, "dropout": 0.0, "keys": keys},
    }


def write_adapter(folder: Path, arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Write the two weight files of an adapter; the names of the files."""
    peft = {PEFT_PREFIX + name: value for name, value in arrays.items()}
    write_safetensors(folder / PEFT_FILE, peft, {"format": "pt"})
    write_safetensors(folder / MLX_LM_FILE, _mlx_lm_arrays(arrays), {"format": "mlx"})
    return [PEFT_FILE, MLX_LM_FILE]


def _mlx_lm_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {}
    for name, value in arrays.items():
        ending = next((e for e in MLX_LM_NAMES if name.endswith(e)), None)
        if ending is None:
            found[name] = value
        else:
            found[name.removesuffix(ending) + MLX_LM_NAMES[ending]] = value.T
    return found


def is_adapter(folder: Path) -> bool:
    """Return True for a folder with an adapter_config.json."""
    return (folder / ADAPTER_CONFIG).is_file()


def read_adapter(folder: Path | str) -> Adapter:
    """Read an adapter of this project, of PEFT (LoRA) or of mlx-lm (LoRA).

    Raises SessaError for a folder that is none, and for kinds of adapters that are more than LoRA.
    """
    folder = Path(folder)
    path = folder / ADAPTER_CONFIG
    if not folder.is_dir():
        raise SessaError(f"{folder}: no such adapter folder")
    settings = read_json(path)
    if (folder / PEFT_FILE).is_file():
        arrays, scale = _read_peft(folder, settings)
    else:
        arrays, scale = _read_mlx_lm(folder, settings)
    require_finite_weights(arrays, str(folder))
    base = settings.get("base_model_name_or_path") or settings.get("model")
    return Adapter(arrays=arrays, scale=scale, base=base, where=str(folder))


def _read_peft(folder: Path, settings: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], float]:
    path = folder / ADAPTER_CONFIG
    scale = 0.0
    if settings.get("fine_tune_type") != "full":
        for name, plain in PLAIN_LORA.items():
            if name in settings and settings[name] not in plain:
                raise SessaError(
                    f"{path}: {name} is {settings[name]!r}, which is not plain LoRA; merge the "
                    "adapter with PEFT and save the model"
                )
        scale = _number(settings, "lora_alpha", path) / _number(settings, "r", path)
    found = read_safetensors(folder / PEFT_FILE)
    return {name.removeprefix(PEFT_PREFIX): value for name, value in found.items()}, scale


def _read_mlx_lm(folder: Path, settings: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], float]:
    path = folder / ADAPTER_CONFIG
    kind = settings.get("fine_tune_type", "lora")
    if kind not in ("lora", "full"):
        raise SessaError(f"{path}: fine_tune_type is {kind!r}; fuse the adapter with mlx_lm.fuse")
    given = settings.get("lora_parameters") or {}
    scale = _number(given, "scale", path) if kind == "lora" else 0.0
    arrays = {}
    for name, value in read_safetensors(folder / MLX_LM_FILE).items():
        ending = next((e for e in MLX_LM_NAMES if name.endswith(MLX_LM_NAMES[e])), None)
        if ending is None:
            arrays[name] = value
        else:
            arrays[name.removesuffix(MLX_LM_NAMES[ending]) + ending] = value.T
    return arrays, scale


def _number(settings: Mapping[str, Any], name: str, path: Path) -> float:
    value = settings.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        raise SessaError(f"{path}: {name} is {value!r}, expected a number above 0")
    return float(value)


def load_merged(folder: Path | str, adapter: Path | str) -> tuple[SessaConfig, LazyTensors]:
    """Read a checkpoint folder with an adapter in its weights; those that it changes in float32."""
    config, weights = load_weights(folder)
    return config, merge_adapter(config, weights, read_adapter(adapter), np.dtype(np.float32))


def adapted_files(folder: Path, adapter: Path | str | None) -> list[Path]:
    """The weight files of a checkpoint folder, and of an adapter for it if there is one."""
    found = [] if adapter is None else [Path(adapter) / PEFT_FILE, Path(adapter) / MLX_LM_FILE]
    return [*weight_files(folder), *[path for path in found if path.is_file()][:1]]


def text_folder(folder: Path | str, adapter: Path | str | None) -> Path:
    """The folder with the tokenizer to use: that of the adapter, if it has one."""
    own = adapter is not None and (Path(adapter) / "tokenizer.json").is_file()
    return Path(adapter) if adapter is not None and own else Path(folder)


def merge_adapter(
    config: SessaConfig,
    weights: Mapping[str, np.ndarray],
    adapter: Adapter,
    dtype: np.dtype | None = None,
) -> LazyTensors:
    """Return the weights of a model with an adapter in them: W + scale * B A.

    A sum is computed in float64 when it is read, and has the type `dtype`, by default that of W.
    Raises SessaError when an array of the adapter has no place in the model, or another shape than
    that.
    """
    merged, shapes = LazyTensors(weights), parameter_shapes(config)
    for target, change in _changes(adapter).items():
        if change.shape != shapes.get(target):
            there = shapes.get(target, "no such tensor")
            raise SessaError(
                f"{adapter.where}: changes {target} by {change.shape}, but the model has {there}; "
                f"the adapter is for {adapter.base or 'another model'}"
            )
        spec = Spec(change.shape, dtype or spec_of(weights, target).dtype)
        merged.defer(target, spec, partial(_changed, weights, target, change, spec.dtype))
    return merged


@dataclass(frozen=True, kw_only=True)
class _Change:
    """A change of one parameter: by the product of two matrices, or by an array in its place."""

    left: np.ndarray
    right: np.ndarray | None = None
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.left.shape if self.right is None else (len(self.left), self.right.shape[1])


def _changed(
    weights: Mapping[str, np.ndarray], name: str, change: _Change, dtype: np.dtype
) -> np.ndarray:
    if change.right is None:
        return change.left.astype(dtype)
    whole = change.left.astype(np.float64) @ change.right.astype(np.float64)
    whole *= change.scale
    whole += weights[name].astype(np.float64)
    return whole.astype(dtype)


def _changes(adapter: Adapter) -> dict[str, _Change]:
    """The change of each parameter that an adapter changes."""
    changes: dict[str, _Change] = {}
    for name, value in adapter.arrays.items():
        layer = next((name.removesuffix(end) for end in (A, B) if name.endswith(end)), None)
        if layer is None:
            changes[name] = _Change(left=value)
        elif f"{layer}.weight" not in changes:
            changes[f"{layer}.weight"] = _lora_change(layer, adapter)
    return changes


def _lora_change(layer: str, adapter: Adapter) -> _Change:
    """The change scale * B A of a layer."""
    a, b = (adapter.arrays.get(layer + ending) for ending in (A, B))
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
        raise SessaError(f"{adapter.where}: the LoRA matrices of {layer} do not go together")
    return _Change(left=b, right=a, scale=adapter.scale)
