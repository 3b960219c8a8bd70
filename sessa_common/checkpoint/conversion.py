"""Checkpoints from one form to another: read, cast or quantise, write, read back and compare."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sessa_common.checkpoint.adapters import merge_adapter, read_adapter
from sessa_common.checkpoint.folder import (
    NUMPY_DTYPES,
    SHARD_SIZE,
    channels_last,
    is_model_file,
    read_tensors,
    require_own_file,
    save_weights,
)
from sessa_common.checkpoint.hub import local_source
from sessa_common.checkpoint.lazy_tensors import LazyTensors, Spec, spec_of
from sessa_common.checkpoint.llama_names import their_config, their_tensors
from sessa_common.checkpoint.manifest import SAVES, read_manifest
from sessa_common.checkpoint.model_card import CARD, CardFacts, is_own_card, write_model_card
from sessa_common.checkpoint.quantization import (
    GROUP_SIZE,
    quantize_lazily,
    undivided,
)
from sessa_common.checkpoint.remote_code import CODE_FILES
from sessa_common.checkpoint.run_files import (
    CHAT_TEMPLATE,
    LOSS_PICTURE,
    METRICS,
    RESULT,
    STATE,
    STATE_INDEX,
    TENSORBOARD,
    TRACKING,
    TRAINING,
    WANDB,
)
from sessa_common.checkpoint.sharded_state import is_shard
from sessa_common.checkpoint.sources import Source, read_llama, read_source, state_file
from sessa_common.checkpoint.upcycling import add_feedback, parse_layers, remove_feedback
from sessa_common.config import DTYPES, FOREIGN_KEYS, SessaConfig, parameter_count
from sessa_common.errors import SessaError, expect
from sessa_common.fields import split_fields
from sessa_common.input_files import require_regular
from sessa_common.json_files import read_json
from sessa_common.storage import MANIFEST, check_new_folder, new_folder, write_json

Tensors = Mapping[str, np.ndarray]

FRAMEWORKS = {"torch": "pt", "mlx": "mlx", "llama": "pt"}
UNITS = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1, "": 1}


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of a conversion: what was written and what reading it back proved."""

    source: str
    tensors: int
    parameters: int
    bytes: int
    dtype: str
    files: list[str]
    notes: list[str]
    exact: bool
    largest_difference: float
    relative_difference: float  # to the largest magnitude of the tensor where it occurs
    where: str

    def proof(self) -> str:
        """One line that says what was compared and how it came out."""
        if not self.files:
            return "no weight was written"
        if self.exact:
            return f"bit-exact: all {self.parameters:,} parameters read back equal to the source"
        return (
            f"stored exactly; largest rounding difference from the source "
            f"{self.largest_difference:.3g} in {self.where} "
            f"({100 * self.relative_difference:.2g}% of its largest magnitude)"
        )


def cast(weights: Mapping[str, np.ndarray], dtype: str) -> LazyTensors:
    """Round every tensor to `dtype`; reading one whose finite number becomes infinite fails.

    There are no exceptions: gains, A_log, dt_bias and D too are stored in `dtype`. The layers
    compute with them in float32. The error is a SessaError.
    """
    out, target = LazyTensors(), NUMPY_DTYPES[dtype]
    for name in weights:
        spec = Spec(spec_of(weights, name).shape, target)
        out.defer(name, spec, partial(_cast_one, weights, name, dtype))
    return out


def _cast_one(weights: Mapping[str, np.ndarray], name: str, dtype: str) -> np.ndarray:
    value = weights[name]
    with np.errstate(over="ignore"):
        rounded = value.astype(NUMPY_DTYPES[dtype])
    if not np.isfinite(rounded)[np.isfinite(value)].all():
        raise SessaError(f"{name} has numbers beyond {dtype}; choose float32 or bfloat16")
    return rounded


def convert(
    source: Source | Path | str,
    target: Path | str,
    *,
    framework: str | None = None,
    dtype: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    shard_size: int | str = SHARD_SIZE,
    config: Mapping[str, Any] | Path | str | None = None,
    feedback: str | None = None,
    merge: Path | str | None = None,
    seed: int = 0,
    force: bool = False,
    **fields: Any,
) -> Report:
    """Write `source` as a checkpoint folder, read it back and compare it with the source.

    The source is a checkpoint folder, a weight file, or "hf:owner/name" on the Hugging Face hub.
    framework is "torch" or "mlx", which decides
    the layout of convolutions (by default mlx with `bits`, else torch), or "llama" for a folder of
    transformers' Llama family; dtype None keeps each tensor's; bits quantises in MLX's affine
    format with one scale for group_size numbers (64); shard_size is in bytes, or a text such as
    "500MB". For a weight file, config (or the path of a
    config.json) and further keyword arguments are fields of SessaConfig that the weights do not
    settle, and seed draws a missing embedding. `feedback` ("all", "every:2", "3,7") adds feedback
    with a gain of 0 to these layers, with `feedback_key_dim` as the width of its keys; seed draws
    its projections. `merge` is the folder of an adapter, which becomes part of the weights. Raises
    SessaError before the folder appears.
    """
    target, size = Path(target), parse_size(shard_size)
    if not isinstance(source, Source):
        source = local_source(source)
    expect(framework in (None, *FRAMEWORKS), "`framework`", framework, f"{' or '.join(FRAMEWORKS)}")
    expect(dtype in (None, *DTYPES), "`dtype`", dtype, f"one of {', '.join(DTYPES)}")
    if group_size is not None and not bits:
        raise SessaError("`group_size` says how weights are quantised; give the number of bits too")
    group_size = group_size if group_size is not None else GROUP_SIZE
    framework = framework or ("mlx" if bits else "torch")
    inputs = [Path(name) for name in (source, config, merge) if isinstance(name, (Path, str))]
    inputs = [path for path in inputs if path.resolve() != target.resolve()]
    check_new_folder(target, force=force, inputs=inputs)
    key_dim = fields.pop("feedback_key_dim", None) if feedback is not None else None
    if not isinstance(source, Source):
        (given,) = split_fields(fields, SessaConfig)
        keys = read_json(Path(config)) if isinstance(config, (Path, str)) else dict(config or {})
        source = read_source(Path(source), keys | given, seed)
    if feedback is not None:
        source = _with_feedback(source, feedback, key_dim, seed)
    if merge is not None:
        source = _merged(source, Path(merge))
    if framework == "llama":
        source = _without_feedback(source)
    in_place = source.folder is not None and source.folder.resolve() == target.resolve()
    _refuse_overlap(source.folder, target)
    weights = cast(source.weights, dtype) if dtype else source.weights
    stored_config = dataclasses.replace(source.config, dtype=dtype or source.config.dtype)
    theirs = their_config(stored_config) if framework == "llama" else None
    stored, quantization = _as_stored(stored_config, weights, framework, bits, group_size)
    extra = {k: v for k, v in source.settings.items() if k in FOREIGN_KEYS and k not in _REWRITTEN}
    if bits and (kept := undivided(weights, group_size)):
        source.notes.append(
            f"not quantised, because their columns do not divide into groups of {group_size}: "
            f"{len(kept)} matrices such as {kept[0]}"
        )
    with new_folder(target, force=force, inputs=inputs) as scratch:
        with_state = not (dtype or bits or theirs or feedback or merge)
        left_out = {STATE: not with_state, SAVES: not in_place or merge is not None}
        left_out |= dict.fromkeys((TENSORBOARD, WANDB, TRACKING), not in_place)
        # A merged model is none of the run that made its base.
        left_out |= dict.fromkeys((TRAINING, METRICS, LOSS_PICTURE, RESULT), merge is not None)
        carried = _carry_files(source, scratch, left_out)
        if merge is not None and (Path(merge) / CHAT_TEMPLATE).is_file():
            shutil.copyfile(Path(merge) / CHAT_TEMPLATE, scratch / CHAT_TEMPLATE)
        generation = scratch / "generation_config.json"
        if source.end_ids and not generation.exists():
            write_json(generation, {"eos_token_id": source.end_ids})
        save_weights(
            scratch,
            stored_config,
            stored,
            shard_size=size,
            framework=FRAMEWORKS[framework],
            extra_config=extra | quantization,
            more_files=[name for name in carried if name == STATE],
        )
        _compare_stored(read_tensors(scratch, mapped=True), stored, target)
        if theirs:
            write_json(scratch / "config.json", theirs)
            for name in CODE_FILES:
                (scratch / name).unlink()
        back = read_llama(scratch, theirs) if theirs else read_source(scratch)
        origin = f"Converted from {source.kind}" + "".join(f"; {note}" for note in source.notes)
        facts = CardFacts(
            config=stored_config,
            origin=[f"{origin}."],
            clients=_clients(stored_config, framework, bits),
        )
        write_model_card(scratch, facts, target)
        files = sorted(path.name for path in scratch.iterdir() if path.name not in carried)
    return _report(source, back.weights, stored, files, carried)


def _clients(config: SessaConfig, framework: str, bits: int | None) -> tuple[str, ...]:
    """The clients that load a converted folder, by their names in a model card."""
    if framework == "llama":
        return ("llama",)
    # MLX packs quantised matrices, and lays out convolutions in another order.
    only_mlx = bits or (framework == "mlx" and any(not kind.attends for kind in config.kinds))
    return ("sessa", "mlx-lm") if only_mlx else ("sessa", "transformers", "mlx-lm")


def _with_feedback(source: Source, feedback: str, key_dim: int | None, seed: int) -> Source:
    layers = parse_layers(feedback, source.config.num_hidden_layers)
    config, weights = add_feedback(source.config, source.weights, layers, key_dim, seed)
    listed = ", ".join(map(str, layers))
    notes = [*source.notes, f"added feedback with a gain of 0 to the layers {listed}"]
    return dataclasses.replace(source, config=config, weights=weights, notes=notes)


def _merged(source: Source, folder: Path) -> Source:
    adapter = read_adapter(folder)
    weights = merge_adapter(source.config, source.weights, adapter)
    notes = [*source.notes, f"merged the adapter {folder}"]
    return dataclasses.replace(source, weights=weights, notes=notes)


def _without_feedback(source: Source) -> Source:
    config, weights = remove_feedback(source.config, source.weights)
    notes = list(source.notes)
    if source.config.feeds_back:
        notes.append("left out the feedback, whose gain is 0 in every layer")
    return dataclasses.replace(source, config=config, weights=weights, notes=notes)


def _as_stored(
    config: SessaConfig, weights: Tensors, framework: str, bits: int | None, group_size: int
) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of the new folder, and what its config.json says of their quantisation."""
    if framework == "mlx" and any(spec_of(weights, name).dtype == np.float64 for name in weights):
        raise SessaError("MLX cannot read float64 from safetensors; choose `dtype` float32")
    if bits and framework != "mlx":
        raise SessaError("quantised weights are MLX's format; choose `framework` mlx")
    if framework != "mlx":
        return their_tensors(config, weights) if framework == "llama" else weights, {}
    if not bits:
        return channels_last(weights), {}
    settings = {"group_size": group_size, "bits": bits, "mode": "affine"}
    packed = channels_last(quantize_lazily(weights, bits, group_size))
    return packed, {"quantization": settings, "quantization_config": settings}


def parse_size(size: int | str, name: str = "shard_size") -> int:
    """Bytes of a size such as "5GB", "500MB" or 1000000; SessaError for anything else."""
    text = str(size).strip().upper()
    number = text.rstrip("KMGB")
    try:
        found = int(float(number) * UNITS[text[len(number) :]])
    except (KeyError, ValueError, OverflowError):
        found = 0
    expect(found >= 1, f"`{name}`", size, "a size such as 5GB or 500MB")
    return found


_REWRITTEN = {"architectures", "torch_dtype", "quantization", "quantization_config"}


def _refuse_overlap(folder: Path | None, target: Path) -> None:
    if folder is None:
        return
    one, other = folder.resolve(), target.resolve()
    if one != other and (one in other.parents or other in one.parents):
        raise SessaError(f"{target}: lies inside {folder} or the reverse; choose another folder")


def _carry_files(source: Source, scratch: Path, left_out: Mapping[str, bool]) -> list[str]:
    """Copy what is neither weights nor config, without the names that `left_out` says.

    A training state goes only with unchanged weights, the kept saves of a run only when the run
    itself is converted in place.
    """
    if (folder := source.folder) is None:
        return []
    written_anew = dict.fromkeys((MANIFEST, STATE_INDEX, "config.json", *CODE_FILES), True)
    left_out = {**written_anew, CARD: is_own_card(folder / CARD), **left_out}
    carried = []
    for path in sorted(folder.iterdir()):
        weights = is_model_file(path.name) or is_shard(path.name) or path.match("*weight*.npz")
        if weights or left_out.get(path.name) or path.name.startswith("."):
            continue
        for inside in (path, *path.rglob("*")):
            require_own_file(folder, inside)
        if path.is_dir():
            shutil.copytree(path, scratch / path.name)
        else:
            require_regular(path)
            file = state_file(folder) if path.name == STATE else path
            shutil.copyfile(file, scratch / path.name)
        carried.append(path.name)
    if read_manifest(folder) != source.manifest:
        raise SessaError(f"{folder}: was saved anew while it was read; convert it again")
    return carried


def _compare_stored(back: Tensors, stored: Tensors, target: Path) -> None:
    wrong = [name for name in stored if name not in back or not _same(back[name], stored[name])]
    if wrong or back.keys() != stored.keys():
        raise SessaError(f"{target}: {wrong or 'extra tensors'} read back differently; not written")


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Return True for arrays of the same type and bits."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    first, second = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (one, other))
    return np.array_equal(first, second)


def _largest_difference(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference of two arrays, computed row by row in float64."""
    rows = zip(np.atleast_1d(one), np.atleast_1d(other), strict=True)
    return max(
        (float(np.abs(a.astype(np.float64) - b).max(initial=0.0)) for a, b in rows), default=0.0
    )


def report_unchanged(source: Source, note: str) -> Report:
    """The report on a folder whose weights were read and not written."""
    source.notes.append(note)
    return _report(source, source.weights, source.weights, [], [])


def _report(
    source: Source, back: Tensors, stored: Tensors, files: list[str], carried: list[str]
) -> Report:
    worst, scale, where, exact = 0.0, 1.0, "", True
    for name, value in source.weights.items():
        found = back[name]
        if _same(found, value):
            continue
        difference, exact = _largest_difference(found, value), False
        if difference > worst:
            worst, scale, where = difference, float(np.abs(value).max()), name
    specs = [spec_of(stored, name) for name in stored]
    dtypes = sorted({str(spec.dtype) for spec in specs})
    notes = list(source.notes)
    if carried:
        notes.append(f"carried along: {', '.join(carried)}")
    return Report(
        source=source.kind,
        tensors=len(stored),
        parameters=parameter_count(source.config),
        bytes=sum(spec.nbytes for spec in specs),
        dtype=", ".join(dtypes),
        files=files,
        notes=notes,
        exact=exact,
        largest_difference=worst,
        relative_difference=worst / scale,
        where=where,
    )
