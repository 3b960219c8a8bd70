"""The run folder: the one place that makes it, saves into it and reads it to resume."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sessa_common.checkpoint.finite import require_finite_weights
from sessa_common.checkpoint.folder import (
    SHARD_SIZE,
    load_config,
    open_safetensors,
    read_safetensors,
    write_safetensors,
    write_weights,
)
from sessa_common.checkpoint.manifest import is_undamaged, verify, write_manifest
from sessa_common.checkpoint.remote_code import write_config
from sessa_common.checkpoint.run_files import RESULT, STATE, TRAINING
from sessa_common.checkpoint.saves import add_save, finish_save, list_saves
from sessa_common.checkpoint.stored_types import as_stored
from sessa_common.config import SessaConfig, parameter_count, parameter_shapes
from sessa_common.data.batches import BatchSource
from sessa_common.data.tokenizer import write_tokenizer
from sessa_common.errors import SessaError
from sessa_common.json_files import parse_json, read_json
from sessa_common.storage import lock_folder, new_folder, write_json
from sessa_common.train_config import TrainConfig
from sessa_common.training.backend import MOMENTS, TrainBackend
from sessa_common.training.metrics import last_metrics, read_metrics, tokens_per_second


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run with everything that it needs besides a backend.

    `weights` are the float32 weights to build the backend with. `resumed` says that the folder
    exists and holds a saved state to go on from.
    """

    folder: Path
    config: SessaConfig
    settings: TrainConfig
    weights: dict[str, np.ndarray]
    source: BatchSource
    tokenizer: Tokenizer
    end_id: int
    resumed: bool = False


def create_run_folder(
    run: Run,
    state: Mapping[str, np.ndarray],
    precision: str,
    *,
    force: bool = False,
    lock_until: ExitStack | None = None,
) -> None:
    """Make the folder of a new run, whole, with a backend's first state as step 0.

    A model that is trained in bfloat16 is stored in bfloat16; its float32 weights are in the
    training state.

    It appears under its name when everything in it is written, so a failure leaves what was there
    before; it stays locked until `lock_until` is closed. Raises SessaError when the folder is not
    empty, unless `force`.
    """
    dtype = "bfloat16" if precision == "bfloat16" else run.config.dtype
    config = dataclasses.replace(run.config, dtype=dtype)
    with new_folder(run.folder, force=force, lock_until=lock_until) as scratch:
        write_tokenizer(scratch, run.tokenizer, run.end_id, run.config.max_position_embeddings)
        write_config(scratch, config)
        write_json(scratch / TRAINING, run.settings.to_dict())
        write_manifest(scratch, _write_save(scratch, run, state, 0, dtype), step=0)


@contextmanager
def open_run_folder(folder: Path) -> Iterator[None]:
    """Lock the folder of a run to go on with; what a killed save left half done is finished.

    Raises SessaError when another process writes there, and when the saved weights or the saved
    state are damaged.
    """
    with lock_folder(folder):
        finish_save(folder)
        try:
            if (folder / STATE).is_file():
                verify(folder)
        except SessaError as error:
            kept = [path for path in list_saves(folder) if is_undamaged(path)]
            advice = f"; {kept[-1]} is good: go on from it with `init`" if kept else ""
            raise SessaError(f"{error}{advice}") from None
        yield


def save_run(
    run: Run,
    state: Mapping[str, np.ndarray],
    *,
    step: int,
    validation_loss: float | None = None,
) -> None:
    """Add a save of the weights and the training state after `step` steps to the run's folder.

    Raises SessaError, and leaves the last save as it is, when a number is not finite.
    """
    write_json(run.folder / TRAINING, run.settings.to_dict())
    dtype = load_config(run.folder).dtype
    add_save(
        run.folder,
        lambda scratch: _write_save(scratch, run, state, step, dtype),
        step=step,
        validation_loss=validation_loss,
        keep=run.settings.keep_checkpoints,
    )


def _write_save(
    folder: Path, run: Run, state: Mapping[str, np.ndarray], step: int, dtype: str
) -> list[str]:
    """Write the weights in the type of config.json, and the training state in float32."""
    require_finite_weights(state, f"step {step}")
    about = json.dumps({"step": step, "fingerprint": run.source.fingerprint})
    weights = {name: state[f"weights.{name}"] for name in parameter_shapes(run.config)}
    stored = as_stored(weights, dtype)
    names = write_weights(folder, stored, shard_size=SHARD_SIZE, framework="pt")
    write_safetensors(folder / STATE, state, {"training": about})
    return [*names, STATE]


def restore_run(run: Run, backend: TrainBackend) -> int:
    """Give the backend the saved state of a run and return its step.

    Raises SessaError when the state is not finite or belongs to another architecture or other data.
    """
    path = run.folder / STATE
    state = read_safetensors(path)
    step, fingerprint = read_state_metadata(run.folder)
    _check_state(state, run.config, path)
    require_finite_weights(state, str(path))
    if fingerprint != run.source.fingerprint:
        raise SessaError(
            f"{run.folder}: the data are not those that this run began with; give it the same "
            "`data` or `task`, or start a new run with `init`"
        )
    backend.restore(state, step)
    return step


def _check_state(state: Mapping[str, np.ndarray], config: SessaConfig, path: Path) -> None:
    expected = {
        f"{kind}.{name}": shape
        for kind in ("weights", *MOMENTS)
        for name, shape in parameter_shapes(config).items()
    }
    for name in sorted(expected.keys() | state.keys()):
        found = tuple(state[name].shape) if name in state else "missing"
        if found != expected.get(name):
            raise SessaError(
                f"{path}: saved by another architecture: {name} is {found}, "
                f"config.json expects {expected.get(name, 'no such tensor')}"
            )


def read_state_metadata(folder: Path) -> tuple[int, str]:
    """Step and data fingerprint of the saved state, without reading its arrays."""
    path = folder / STATE
    with open_safetensors(path) as file:
        stored = (file.metadata() or {}).get("training", "")
    try:
        about = parse_json(stored)
        return int(about["step"]), str(about["fingerprint"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SessaError(f"{path}: not a training state ({error})") from None


def write_task_result(run: Run, measures: Mapping[str, Any], task: str, options: Any) -> None:
    """Write result.json of a finished run on a task, with its measures on the test examples."""
    records = read_metrics(run.folder)
    last = last_metrics(records)
    names = ("validation_loss", "validation_accuracy")
    result = {
        "task": task,
        "task_options": options,
        "parameters": parameter_count(run.config),
        "tokens_per_second": tokens_per_second(records),
        "steps": run.settings.steps,
        **{name: last[name] for name in names if name in last},
        "test": measures,
    }
    write_json(run.folder / RESULT, result)


def read_task_result(folder: Path, steps: int) -> dict[str, Any] | None:
    """Return result.json of a run of this many steps, or None when there is none."""
    path = folder / RESULT
    result = read_json(path) if path.exists() else {}
    return result if result.get("steps") == steps else None
