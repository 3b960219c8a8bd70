"""Trainers of runs in folders, without the command and without reading text."""

from __future__ import annotations

from pathlib import Path

from sessa_common.config import SessaConfig
from sessa_common.data.batches import BatchSource
from sessa_common.data.tokenizer import BYTES_END_ID, byte_tokenizer
from sessa_common.train_config import TrainConfig
from sessa_common.training.backend import TrainBackend
from sessa_common.training.run_folder import Run, create_run_folder, restore_run
from sessa_common.training.trainer import Trainer


def open_trainer(
    folder: Path,
    backend: TrainBackend,
    source: BatchSource,
    config: SessaConfig,
    settings: TrainConfig,
) -> Trainer:
    """A trainer of a new run, or of the run that the folder holds."""
    run = Run(
        folder=folder,
        config=config,
        settings=settings,
        weights=backend.weights(),
        source=source,
        tokenizer=byte_tokenizer(),
        end_id=BYTES_END_ID,
    )
    if folder.exists():
        return Trainer(backend, run, restore_run(run, backend))
    create_run_folder(run, backend.state(), backend.precision)
    return Trainer(backend, run)
