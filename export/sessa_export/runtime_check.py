"""Every installed runtime against the float64 reference, on the same tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sessa_common.checkpoint.folder import load_weights
from sessa_common.config import SessaConfig
from sessa_common.frameworks import framework, is_installed
from sessa_common.reference.parity import Case, Result, compare, make_cases, tolerance_of
from sessa_export.exporter import Options, write_model
from sessa_export.runtime import MODEL_FILE, load_decoder

NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class RuntimeCheck:
    """The results of one runtime, a row a case; `skipped` says why there are none."""

    runtime: str
    results: list[Result]
    skipped: str | None = None

    @property
    def ok(self) -> bool:
        """False when the runtime computed something else than the reference."""
        return all(result.ok for result in self.results)


def check(
    checkpoint: Path | str,
    exported: Path | str | None = None,
    *,
    seed: int = 0,
    onnx_device: str | None = None,
) -> list[RuntimeCheck]:
    """Compare PyTorch, MLX and ONNX Runtime with the float64 reference on a checkpoint folder.

    `exported` is the folder that ONNX Runtime runs, a temporary export unless given, and
    `onnx_device` the device it runs it on, the CPU unless given. The tokens are drawn from `seed`.
    A runtime that is not installed, or that cannot run a layer of the model, is skipped. Raises
    SessaError for a folder that cannot be read, and for a device that cannot be used.
    """
    config, weights = load_weights(checkpoint)
    cases = make_cases(config, weights, seed=seed)
    return [
        _check_twin("PyTorch", "torch", checkpoint, cases),
        _check_twin("MLX", "mlx", checkpoint, cases),
        _check_onnx(exported, config, weights, cases, onnx_device),
    ]


def _check_twin(name: str, backend: str, checkpoint: Path | str, cases: list[Case]) -> RuntimeCheck:
    if not is_installed(backend):
        return RuntimeCheck(name, [], NOT_INSTALLED)
    # float32 whatever the checkpoint's dtype: the rounding of the weights is not the question.
    decoder = framework(backend, "decoding").load_decoder(checkpoint, dtype="float32")
    return RuntimeCheck(name, compare(decoder, cases))


def _check_onnx(
    exported: Path | str | None,
    config: SessaConfig,
    weights: Mapping[str, np.ndarray],
    cases: list[Case],
    device: str | None,
) -> RuntimeCheck:
    name = "ONNX Runtime" if device is None else f"ONNX Runtime on {device}"
    if exported is not None:
        decoder = load_decoder(exported, device=device)
        return RuntimeCheck(name, compare(decoder, cases, tolerance_of(decoder)))
    if not (is_installed("onnx") and is_installed("onnxruntime")):
        return RuntimeCheck(name, [], NOT_INSTALLED)
    if missing := [kind.name for kind in config.kinds if not kind.exports]:
        return RuntimeCheck(name, [], f"not supported ({missing[0]})")
    with tempfile.TemporaryDirectory(prefix="sessa-check-") as scratch:
        write_model(Path(scratch) / MODEL_FILE, config, weights, Options())
        return RuntimeCheck(name, compare(load_decoder(scratch, device=device), cases))
