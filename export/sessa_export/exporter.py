"""The exported folder: model, tokenizer and the files of its clients, checked before it appears."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sessa_common.checkpoint.folder import load_config, load_weights, require_own_file
from sessa_common.config import SessaConfig
from sessa_common.data.sources import local_paths
from sessa_common.errors import SessaError
from sessa_common.fields import build, split_fields
from sessa_common.json_files import read_json
from sessa_common.reference.parity import Result, compare, make_cases, require_ok, tolerance_of
from sessa_common.storage import new_folder, write_json
from sessa_export.cache_layout import require_supported
from sessa_export.perplexity import Cost, Document, measure_cost, read_text, require_cost
from sessa_export.runtime import MODEL_FILE, load_decoder, require_onnx
from sessa_export.sessions import LARGE_BLOCK

COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
)

Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The form of an exported model.

    dtype is "fp32", "fp16", "int8" or "int4"; layout (of the caches) "natural", "uniform" or
    "buffer"; clients are "ort", "cuda", "genai", "web" and "transformers-js"; native adds the
    compiled operator; opset is the version of the standard operators. data are texts, named as in
    training, on which the cost of fewer bits is measured. Weights of more than external_data_bytes
    (2e9 if None) go to a file of their own.
    """

    dtype: str = "fp32"
    layout: str = "natural"
    clients: Sequence[str] = ("ort",)
    native: bool = False
    opset: int = 23
    data: Sequence[str] = ("pydoc",)
    external_data_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Agreement of the exported model with its checkpoint, and the cost of its dtype."""

    results: dict[str, list[Result]]  # one list for each way to run the operator
    cost: Cost | None = None  # None with float32 weights, and without a tokenizer


def write_model(
    path: Path,
    config: SessaConfig,
    weights: Weights,
    options: Options,
    *,
    dtype: str | None = None,
) -> None:
    """Write the model file of a checkpoint, in `dtype` where it is not the one of the options."""
    from sessa_export.graph import EXTERNAL_DATA_BYTES, build_model, save_model
    from sessa_export.quantization import prepare, shrink

    dtype = dtype or options.dtype
    limit = options.external_data_bytes
    model = build_model(
        *prepare(config, weights, dtype),
        opset=options.opset,
        layout=options.layout,
        large_block=LARGE_BLOCK if "cuda" in options.clients else None,
    )
    path.parent.mkdir(exist_ok=True)
    save_model(
        shrink(model, dtype),
        path,
        external_data_bytes=EXTERNAL_DATA_BYTES if limit is None else limit,
    )


def export(source: Path | str, target: Path | str, *, force: bool = False, **fields: Any) -> Report:
    """Export a checkpoint folder to a new ONNX folder, checked before it appears.

    Keyword arguments are fields of Options, as in export("runs/a", "onnx", dtype="int8").
    `force` replaces a folder that is there. Returns and raises what `export_checkpoint` does.
    """
    (given,) = split_fields(fields, Options)
    return export_checkpoint(source, target, build(Options, given), force=force)


def export_checkpoint(
    source: Path | str, target: Path | str, options: Options | None = None, *, force: bool = False
) -> Report:
    """Export a checkpoint folder to a new folder and return how well ONNX Runtime agrees with it.

    Raises SessaError, and leaves nothing behind, when the checkpoint or the target cannot be used,
    when a layer is Mamba-2, when onnx or onnxruntime is missing, when an option is unknown, or when
    the exported logits are not the checkpoint's (`reference.parity.TOLERANCES`).
    """
    require_onnx()
    options = options or Options()
    source, target = Path(source), Path(target)
    if target.resolve() == source.resolve():
        raise SessaError(f"{target}: is the checkpoint itself; choose another folder")
    require_supported(load_config(source))
    if options.dtype == "fp32" and options.data != Options.data:
        raise SessaError("`data` measures the cost of fewer bits; choose another `dtype` than fp32")
    inputs = [source, *local_paths(options.data)]
    with new_folder(target, force=force, inputs=inputs) as scratch:
        config, weights = load_weights(source)
        text = [] if options.dtype == "fp32" else read_text(source, config, options.data)
        _write_folder(source, scratch, config, weights, options)
        return _judge(scratch, config, weights, options, text, str(target))


def _write_folder(
    source: Path, folder: Path, config: SessaConfig, weights: Weights, options: Options
) -> None:
    from sessa_export import native
    from sessa_export import runtime_configs as clients

    asked = clients.choose_clients(options.clients, options.layout)
    clients.require_equal_widths(config, asked, options.layout)
    stop = clients.require_tokenizer(source, config, asked)
    library = native.build() if options.native else None
    path = clients.model_path(asked, options.dtype)
    write_model(folder / path, config, weights, options)
    _copy_files(source, folder)
    if library:
        shutil.copyfile(library, folder / library.name)
    exported = clients.Exported(
        config=config,
        model=path,
        dtype=options.dtype,
        layout=options.layout,
        stop=stop,
        library=library.name if library else None,
    )
    clients.write_client_files(folder, asked, exported)


def _copy_files(source: Path, folder: Path) -> None:
    """Copy what clients read beside the graph; config.json without the keys that name a program.

    The programs load weights, which an exported folder has not.
    """
    for pattern in COPIED:
        for file in filter(Path.is_file, source.glob(pattern)):
            require_own_file(source, file)
            shutil.copyfile(file, folder / file.name)
    settings = read_json(folder / "config.json")
    kept = {key: value for key, value in settings.items() if key not in ("auto_map", "model_file")}
    write_json(folder / "config.json", kept)


def _judge(
    folder: Path,
    config: SessaConfig,
    weights: Weights,
    options: Options,
    text: Sequence[Document],
    where: str,
) -> Report:
    """Compare the written folder with the reference and, where bits were dropped, with itself."""
    cases = make_cases(config, weights)
    found = {"standard operators": load_decoder(folder)}
    if options.native:
        found["native operator"] = load_decoder(folder, native=True)
    results = {}
    for name, decoder in found.items():
        results[name] = compare(decoder, cases, tolerance_of(decoder))
        require_ok(results[name], f"{where}, {name}")
    if options.dtype == "fp32":
        return Report(results=results)
    with tempfile.TemporaryDirectory(prefix="sessa-export-") as plain:
        write_model(Path(plain) / MODEL_FILE, config, weights, options, dtype="fp32")
        before = load_decoder(plain)
        require_ok(compare(before, cases), f"{where}, before {options.dtype}")
        if not text:
            return Report(results=results)
        cost = measure_cost(before, load_decoder(folder), text, options.data)
    require_cost(cost, options.dtype, where)
    return Report(results=results, cost=cost)
