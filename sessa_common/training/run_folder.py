"""The run folder: the one place that makes it, saves into it and reads it to resume."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sessa_common.checkpoint.adapters import (
    Shapes,
    adapter_config,
    write_adapter,
)
from sessa_common.checkpoint.finite import require_finite_weights
from sessa_common.checkpoint.folder import (
    SHARD_SIZE,
    load_config,
    require_own_file,
    write_safetensors,
    write_weights,
)
from sessa_common.checkpoint.lazy_tensors import spec_of
from sessa_common.checkpoint.manifest import is_undamaged, verify, write_manifest
from sessa_common.checkpoint.model_card import CardFacts, write_model_card
from sessa_common.checkpoint.remote_code import write_config
from sessa_common.checkpoint.run_files import (
    ADAPTER_CONFIG,
    CHAT_TEMPLATE,
    RESULT,
    STATE,
    STATE_INDEX,
    TOKENIZER_FILES,
    TRAINING,
)
from sessa_common.checkpoint.saves import (
    add_save,
    finish_save,
    list_saves,
    open_save,
    write_save_manifest,
)
from sessa_common.checkpoint.sharded_state import is_sharded
from sessa_common.checkpoint.stored_types import as_stored
from sessa_common.config import SessaConfig, parameter_count, parameter_shapes
from sessa_common.data.batches import BatchSource
from sessa_common.data.stream import StreamBatches
from sessa_common.data.tokenizer import write_tokenizer
from sessa_common.errors import SessaError
from sessa_common.json_files import read_json
from sessa_common.storage import lock_folder, new_folder, write_json, write_text
from sessa_common.train_config import TrainConfig
from sessa_common.training.backend import ShardedState, TrainBackend
from sessa_common.training.metrics import last_metrics, read_metrics, tokens_per_second
from sessa_common.training.muon import state_shapes
from sessa_common.training.saved_state import (
    has_state,
    read_about,
    read_state,
    read_state_metadata,
)
from sessa_common.training.trained_parameters import trained_shapes, trains_adapter


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run with everything that it needs besides a backend.

    `weights` are the float32 weights to build the backend with, LoRA's matrices among them.
    `resumed` says that the folder exists and holds a saved state to go on from. `base` is the
    folder of the model that is fine-tuned, whose tokenizer the new folder gets as it is, with
    `chat_template` if the data needed one and that folder has none.
    """

    folder: Path
    config: SessaConfig
    settings: TrainConfig
    weights: Mapping[str, np.ndarray]
    source: BatchSource
    tokenizer: Tokenizer
    end_id: int
    begin_ids: Sequence[int] = ()  # before every text
    resumed: bool = False
    base: Path | None = None
    chat_template: str | None = None

    @functools.cached_property
    def data_fingerprint(self) -> str:
        """A hash of the data, and of the model that an adapter is trained for."""
        if not trains_adapter(self.settings):
            return self.source.fingerprint
        digest = hashlib.blake2b(self.source.fingerprint.encode(), digest_size=16)
        for name in parameter_shapes(self.config):
            digest.update(np.ascontiguousarray(self.weights[name], np.float32).data)
        return digest.hexdigest()

    def about(self, step: int) -> dict[str, Any]:
        """The step of a save, the fingerprint of the data, and the place in a stream."""
        about = {"step": step, "fingerprint": self.data_fingerprint}
        if isinstance(self.source, StreamBatches):
            about["stream"] = self.source.place(step * self.settings.gradient_accumulation_steps)
        return about


def create_run_folder(
    run: Run,
    state: Mapping[str, np.ndarray] | ShardedState,
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
        _write_tokenizer(scratch, run)
        if trains_adapter(run.settings):
            write_json(scratch / ADAPTER_CONFIG, _adapter_config(run))
        else:
            write_config(scratch, config)
        write_json(scratch / TRAINING, run.settings.to_dict())
        _write_card(scratch, run, run.folder)
        if isinstance(state, Mapping):
            write_manifest(scratch, _write_save(scratch, run, state, 0, dtype), step=0)
        else:
            with open_save(scratch, 0, 1) as save:
                finish_shards(save, state.start(save).result(), run.about(0))


def _write_card(folder: Path, run: Run, target: Path | None = None) -> None:
    has_config = (folder / "config.json").is_file()
    facts = CardFacts(
        config=load_config(folder) if has_config else run.config,
        base=run.settings.base,
        metrics=last_metrics(read_metrics(folder)),
    )
    write_model_card(folder, facts, target)


def _write_tokenizer(folder: Path, run: Run) -> None:
    """Write the tokenizer and what belongs to it: names of tokens, ends of texts, chat template."""
    if run.base is None:
        length = run.config.max_position_embeddings
        write_tokenizer(folder, run.tokenizer, run.end_id, length, run.begin_ids)
        return
    for path in (path for name in TOKENIZER_FILES for path in run.base.glob(name)):
        require_own_file(run.base, path)
        shutil.copyfile(path, folder / path.name)
    if run.chat_template is not None:
        write_text(folder / CHAT_TEMPLATE, run.chat_template)


def _adapter_config(run: Run) -> dict[str, Any]:
    settings, names = run.settings, list(trained_shapes(run.config, run.settings))
    base = str((run.base or run.folder).resolve())
    return adapter_config(names, base, settings.lora_rank, settings.lora_alpha)


@contextmanager
def open_run_folder(folder: Path) -> Iterator[None]:
    """Lock the folder of a run to go on with; what a killed save left half done is finished.

    Raises SessaError when another process writes there, and when the saved weights or the saved
    state are damaged.
    """
    with lock_folder(folder):
        finish_save(folder)
        try:
            if has_state(folder):
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
    dtype = "float32" if trains_adapter(run.settings) else load_config(run.folder).dtype
    add_save(
        run.folder,
        lambda scratch: _write_save(scratch, run, state, step, dtype),
        step=step,
        validation_loss=validation_loss,
        keep=run.settings.keep_checkpoints,
    )
    _write_card(run.folder, run)


def finish_shards(
    save: Path,
    shards: list[str],
    about: Mapping[str, Any],
    validation_loss: float | None = None,
) -> None:
    """Complete the folder of a save whose shards are written: `Run.about` and the manifest.

    Raises SessaError when a shard is not there.
    """
    if missing := [name for name in shards if not (save / name).is_file()]:
        raise SessaError(
            f"{missing[0]} was written, but the main process does not see it; all machines must "
            "write to one shared file system"
        )
    write_json(save / STATE_INDEX, about)
    write_save_manifest(save, [*shards, STATE_INDEX], about["step"], validation_loss)


def _write_save(
    folder: Path, run: Run, state: Mapping[str, np.ndarray], step: int, dtype: str
) -> list[str]:
    """Write the weights in the type of config.json, and the training state in float32."""
    require_finite_weights(state, f"step {step}")
    about = json.dumps(run.about(step))
    trained = trained_shapes(run.config, run.settings)
    arrays = {name: state[f"weights.{name}"] for name in trained}
    if trains_adapter(run.settings):
        names = write_adapter(folder, arrays)
    else:
        stored = as_stored(arrays, dtype)
        names = write_weights(folder, stored, shard_size=SHARD_SIZE, framework="pt")
    write_safetensors(folder / STATE, state, {"training": about})
    return [*names, STATE]


def restore_run(run: Run, backend: TrainBackend) -> int:
    """Give the backend the saved state of a run and return its step.

    Raises SessaError when the state is not finite or belongs to another architecture or other data.
    """
    path = run.folder / (STATE_INDEX if is_sharded(run.folder) else STATE)
    state = read_state(run.folder)
    step, fingerprint = read_state_metadata(run.folder)
    trained = trained_shapes(run.config, run.settings)
    _check_state(state, state_shapes(trained, run.settings), path)
    # Those in shards were checked when they were saved, and no process is to read all of them.
    if path.name != STATE_INDEX:
        require_finite_weights(state, str(path))
    if fingerprint != run.data_fingerprint:
        model = f" or the model in {run.base}" if trains_adapter(run.settings) else ""
        raise SessaError(
            f"{run.folder}: the data{model} are not those that this run began with; give it the "
            "same `data` or `task`, or start a new run with `init`"
        )
    if isinstance(run.source, StreamBatches):
        first = step * run.settings.gradient_accumulation_steps
        run.source.seek(first, read_about(run.folder)["stream"])
    backend.restore(state, step)
    return step


def _check_state(state: Mapping[str, np.ndarray], expected: Shapes, path: Path) -> None:
    for name in sorted(expected.keys() | state.keys()):
        found = spec_of(state, name).shape if name in state else "missing"
        if found != expected.get(name):
            raise SessaError(
                f"{path}: saved by another architecture: {name} is {found}, "
                f"config.json expects {expected.get(name, 'no such tensor')}"
            )


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
