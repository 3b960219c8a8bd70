"""The saves of a run: each a whole checkpoint folder below the run folder, the last also on top.

A save is written to checkpoints/step-N and synced. Then the manifest of the run folder names it,
which decides that it is the model now. Then its files get their names at the top of the run folder
too, as hard links, so that other programs find one ordinary checkpoint there, and the manifest
names those. A kill leaves the old save or the new one; `finish_save` completes the names on top.

A save in shards, which no other program reads, stays where it was written, and the top keeps only
the manifest that names it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sessa_common.checkpoint.folder import is_model_file
from sessa_common.checkpoint.manifest import (
    SAVES,
    Manifest,
    manifest_files,
    put_manifest,
    read_manifest,
    verify,
    write_manifest,
)
from sessa_common.checkpoint.remote_code import CODE_FILES
from sessa_common.checkpoint.run_files import ADAPTER_CONFIG, STATE, TOKENIZER_FILES, TRAINING
from sessa_common.storage import atomic_path, new_folder, remove_folder, sweep

# Files of a checkpoint folder that say how to use the weights; every save has its own copy.
BESIDE = ("config.json", *CODE_FILES, ADAPTER_CONFIG, *TOKENIZER_FILES, TRAINING)


def add_save(
    folder: Path,
    write: Callable[[Path], Iterable[str]],
    *,
    step: int,
    validation_loss: float | None = None,
    keep: int,
) -> None:
    """Add the save of a step to a run folder, make it the model and remove saves that are too old.

    `write` writes the files of the save into a folder and returns their names. The last `keep`
    saves stay, and the one with the lowest validation loss.
    """
    with open_save(folder, step, keep) as scratch:
        write_save_manifest(scratch, write(scratch), step, validation_loss)


def write_save_manifest(
    scratch: Path, names: Iterable[str], step: int, validation_loss: float | None
) -> None:
    """Write the manifest of a save; a loss that is not finite is left out."""
    if validation_loss is not None and not math.isfinite(validation_loss):
        validation_loss = None
    write_manifest(scratch, names, step=step, validation_loss=validation_loss)


@contextmanager
def open_save(folder: Path, step: int, keep: int) -> Iterator[Path]:
    """Yield a scratch folder for the save of a step, which becomes the model of the run folder.

    The block must write the files and, last, their manifest. An error in it leaves the run as it
    was. When the save has its name, saves that are too old are removed as by `add_save`.
    """
    save = folder / SAVES / f"step-{step:08d}"
    with new_folder(save, force=True) as scratch:
        for path in (path for pattern in BESIDE for path in folder.glob(pattern)):
            shutil.copyfile(path, scratch / path.name)
        yield scratch
    manifest = read_manifest(save)
    assert manifest is not None
    put_manifest(folder, dataclasses.replace(manifest, folder=f"{SAVES}/{save.name}"))
    finish_save(folder)
    for old in old_saves(folder, keep):
        remove_folder(old)


def finish_save(folder: Path) -> None:
    """Give the files of a new save their names at the top of the run folder, if they lack them.

    What a killed command left among the saves is removed.
    """
    if (folder / SAVES).is_dir():
        sweep(folder / SAVES)
    manifest = read_manifest(folder)
    if manifest is None or manifest.folder == ".":
        return
    if not manifest.is_sharded:
        for file in manifest_files(folder, manifest):
            _link(file, folder / file.name)
    for path in list(folder.iterdir()):
        of_a_save = is_model_file(path.name) or path.name == STATE
        if of_a_save and path.name not in manifest.files:
            path.unlink()
    if not manifest.is_sharded:
        put_manifest(folder, dataclasses.replace(manifest, folder="."))


def list_saves(folder: Path) -> dict[Path, Manifest]:
    """The whole saves of a run folder and their manifests, oldest first."""
    found = {}
    for path in sorted((folder / SAVES).glob("step-*")):
        if (manifest := read_manifest(path)) is not None and manifest.step is not None:
            found[path] = manifest
    return dict(sorted(found.items(), key=lambda item: item[1].step or 0))


def verify_saves(path: Path) -> int | None:
    """Compare the files of a checkpoint folder and of its kept saves with their hashes.

    Returns their number, None where no hashes were saved. Raises SessaError that names a damaged
    file.
    """
    counts = [verify(folder) for folder in (path, *list_saves(path))]
    return sum(count or 0 for count in counts) if any(counts) else None


def old_saves(folder: Path, keep: int) -> list[Path]:
    """The saves that are neither among the last `keep` nor the best by validation loss."""
    saves = list_saves(folder)
    losses = {path: m.validation_loss for path, m in saves.items() if m.validation_loss is not None}
    best = min(losses, key=losses.__getitem__, default=None)
    return [path for path in list(saves)[:-keep] if path != best]


def _link(file: Path, name: Path) -> None:
    if name.exists() and name.samefile(file):
        return
    with atomic_path(name) as scratch:
        try:
            os.link(file, scratch)
        except OSError:  # A file system without hard links.
            shutil.copyfile(file, scratch)
