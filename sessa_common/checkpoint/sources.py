"""Models in any form that this project reads: folders and weight files of many tools."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sessa_common.checkpoint.finite import require_finite_weights
from sessa_common.checkpoint.folder import (
    channels_first,
    check_weights,
    read_tensors,
)
from sessa_common.checkpoint.import_weights import (
    complete,
    find_config,
    map_names,
    read_arrays,
)
from sessa_common.checkpoint.llama_names import (
    end_ids,
    is_llama_family,
    llama_config,
    llama_tensors,
)
from sessa_common.checkpoint.mamba2_names import mamba2_config, mamba2_names
from sessa_common.checkpoint.manifest import Manifest, read_manifest, read_settled, verify
from sessa_common.checkpoint.quantization import dequantize_lazily, is_quantized
from sessa_common.checkpoint.run_files import STATE
from sessa_common.checkpoint.sharded_state import is_sharded, sharded_weights
from sessa_common.checkpoint.stored_types import as_stored
from sessa_common.config import FOREIGN_KEYS, SessaConfig, parameter_shapes
from sessa_common.errors import SessaError
from sessa_common.json_files import read_json
from sessa_common.layer_kinds import with_layer_kinds


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model read from any form: its weights by our names and what was said on the way.

    Weights of a folder may lie in its files or be computed when they are read.
    """

    config: SessaConfig
    weights: Mapping[str, np.ndarray]
    kind: str
    notes: list[str] = field(default_factory=list)
    folder: Path | None = None  # whose other files belong to the checkpoint
    manifest: Manifest | None = None  # of that folder, when it was read
    settings: dict[str, Any] = field(default_factory=dict)  # its config.json
    end_ids: list[int] = field(default_factory=list)  # where there are several


def read_source(path: Path, given: Mapping[str, Any] | None = None, seed: int = 0) -> Source:
    """Read a checkpoint folder or a weight file in any form that this project knows.

    given are keys of config.json that the weights do not settle; seed draws a missing embedding.
    Raises SessaError that names the file and what is wrong or missing.
    """
    given = with_layer_kinds(given or {})
    if path.is_dir():
        return _read_verified(path, given)
    if not path.is_file():
        raise SessaError(f"{path}: no such file or folder")
    settings = _settings_beside(path)
    found = map_names(read_arrays(path), settings, str(path))
    known = {key: value for key, value in settings.items() if key not in FOREIGN_KEYS}
    config = find_config(found, {**known, **given}, str(path))
    complete(found, config, seed)
    check_weights(config, found.weights, str(path))
    require_finite_weights(found.weights, str(path))
    kind = f"{path.suffix} file of {config.num_hidden_layers} layers"
    return Source(config=config, weights=found.weights, kind=kind, notes=found.notes)


def _read_verified(folder: Path, given: Mapping[str, Any]) -> Source:
    """Read a folder after its hashes are checked, where it has some."""

    def read() -> Source:
        verify(folder, lambda name: name != STATE or state_file(folder).is_file())
        return dataclasses.replace(_read_folder(folder, given), manifest=read_manifest(folder))

    return read_settled(folder, read)


def state_file(folder: Path) -> Path:
    """The training state that goes with the weights of a folder."""
    manifest = read_manifest(folder)
    return folder / (manifest.folder if manifest else ".") / STATE


def _read_folder(folder: Path, given: Mapping[str, Any]) -> Source:
    settings = read_json(folder / "config.json")
    if settings.get("model_type") == "mamba2":
        return _read_mamba2(folder, settings, given)
    if is_llama_family(settings):
        return read_llama(folder, settings, given)
    settings = with_layer_kinds(settings)
    config = SessaConfig.from_dict(settings, str(folder / "config.json"))
    _require_agreement(config, settings, given, folder)
    tensors: Mapping[str, np.ndarray]
    if is_sharded(folder):
        tensors, kind = as_stored(sharded_weights(folder), config.dtype), "training run in shards"
        return _checked(
            Source(config=config, weights=tensors, kind=kind, folder=folder, settings=settings)
        )
    arrays = [path for path in sorted(folder.glob("*.npz")) if "weight" in path.stem]
    if arrays and not any(folder.glob("model*.safetensors")):
        tensors, kind = read_arrays(arrays[0]), "MLX .npz folder"
    else:
        tensors, kind = read_tensors(folder, mapped=True), "checkpoint folder"
    if not tensors.keys() & parameter_shapes(config).keys():
        tensors = map_names(tensors, settings, str(folder)).weights
    if is_quantized(tensors):
        kind = "MLX-quantised folder"
        quantization = settings.get("quantization")
        tensors = dequantize_lazily(tensors, quantization, config.hidden_size, str(folder))
    tensors = channels_first(tensors)
    check_weights(config, tensors, str(folder))
    require_finite_weights(tensors, str(folder))
    return Source(config=config, weights=tensors, kind=kind, folder=folder, settings=settings)


def _require_agreement(
    config: SessaConfig, settings: Mapping[str, Any], given: Mapping[str, Any], folder: Path
) -> None:
    """Raise SessaError for a given key that differs from the folder or its default."""
    for key, value in given.items():
        stated = getattr(config, key, "no such key")
        if key not in FOREIGN_KEYS and value not in (stated, settings.get(key, stated)):
            raise SessaError(f"{folder}: its config.json has {key} {stated}, given {value}")


def _read_mamba2(folder: Path, settings: Mapping[str, Any], given: Mapping[str, Any]) -> Source:
    """A folder of transformers' Mamba2ForCausalLM."""
    keys, notes = mamba2_config(settings, given, str(folder / "config.json"))
    config = SessaConfig.from_dict(keys, str(folder / "config.json"))
    weights = map_names(mamba2_names(read_tensors(folder)), {}, str(folder)).weights
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    kind = "transformers mamba2 folder"
    return _checked(Source(config=config, weights=weights, kind=kind, notes=notes, folder=folder))


def read_llama(
    folder: Path, settings: Mapping[str, Any], given: Mapping[str, Any] | None = None
) -> Source:
    """Read a folder of transformers' Llama family, also quantised by mlx-lm.

    settings is its config.json; arguments and errors are those of `read_source`.
    """
    keys, notes = llama_config(settings, str(folder / "config.json"))
    config = SessaConfig.from_dict(keys, str(folder / "config.json"))
    _require_agreement(config, keys, given or {}, folder)
    tensors: Mapping[str, np.ndarray] = read_tensors(folder, mapped=True)
    kind = f"transformers {settings['model_type']} folder"
    if is_quantized(tensors):
        kind = f"MLX-quantised {settings['model_type']} folder"
        quantization = settings.get("quantization")
        tensors = dequantize_lazily(tensors, quantization, config.hidden_size, str(folder))
    source = Source(
        config=config,
        weights=llama_tensors(config, tensors),
        kind=kind,
        notes=notes,
        folder=folder,
        end_ids=end_ids(settings),
    )
    return _checked(source)


def _checked(source: Source) -> Source:
    """The source, after every tensor was found to be there, to fit and to be finite."""
    check_weights(source.config, source.weights, str(source.folder))
    require_finite_weights(source.weights, str(source.folder))
    return source


def _settings_beside(path: Path) -> dict[str, Any]:
    beside = path.with_name("config.json")
    settings = read_json(beside) if beside.is_file() else {}
    return with_layer_kinds(settings) if settings.get("model_type") == "sessa" else {}
