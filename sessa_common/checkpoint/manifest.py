"""The manifest of a folder: which files its last save wrote, how long they are and their hashes.

It is written last, so it decides which files are the model. A folder of another tool has none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sessa_common.checkpoint.run_files import STATE_INDEX
from sessa_common.errors import SessaError
from sessa_common.json_files import read_json
from sessa_common.storage import MANIFEST, is_ours, write_json

FORMAT = 1
# The saves of a run, inside the run folder.
SAVES = "checkpoints"
SAVE_FOLDER = re.compile(SAVES + r"/step-\d{8,}")
CHUNK = 1 << 20

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The files of a save, by name: {"bytes": length, "sha256": hexadecimal digest}.

    They lie in `folder`, which is "." except while a save of a run is being moved to the top, and
    for a save in shards, which stays in its folder.
    """

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    folder: str = "."
    step: int | None = None
    validation_loss: float | None = None

    @property
    def is_sharded(self) -> bool:
        """True for a training state in shards, without an ordinary checkpoint."""
        return STATE_INDEX in self.files


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, None without one; SessaError when it cannot be used."""
    if not is_ours(folder):
        return None
    path = folder / MANIFEST
    values = read_json(path)
    if values.pop("format", None) != FORMAT:
        raise SessaError(f"{path}: not a manifest of format {FORMAT}, the only one known here")
    try:
        manifest = Manifest(**values)
        well_formed = (
            isinstance(manifest.folder, str)
            and isinstance(manifest.step, int | None)
            and isinstance(manifest.validation_loss, float | int | None)
            and all(
                is_plain_name(name) and len(facts["sha256"]) == 64 and facts["bytes"] >= 0
                for name, facts in manifest.files.items()
            )
        )
    except (TypeError, KeyError, AttributeError):
        well_formed = False
    if not well_formed or not (manifest.folder == "." or SAVE_FOLDER.fullmatch(manifest.folder)):
        raise SessaError(f"{path}: damaged; remove it to read the folder as one of another tool")
    return manifest


def write_manifest(folder: Path, names: Iterable[str], **facts: Any) -> Manifest:
    """Write the manifest for these files of a folder; facts are further fields of `Manifest`."""
    manifest = Manifest(files={name: file_facts(folder / name) for name in names}, **facts)
    put_manifest(folder, manifest)
    return manifest


def put_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest as it is."""
    values = {k: v for k, v in dataclasses.asdict(manifest).items() if v is not None}
    write_json(folder / MANIFEST, {"format": FORMAT, **values})


def file_facts(path: Path) -> dict[str, Any]:
    """Length and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def manifest_files(
    folder: Path, manifest: Manifest, wanted: Callable[[str], bool] = lambda name: True
) -> list[Path]:
    """The files that a manifest names, or the `wanted` among them.

    Raises SessaError when one is absent or of another length.
    """
    paths = []
    for name in filter(wanted, manifest.files):
        facts = manifest.files[name]
        path = folder / manifest.folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != facts["bytes"]:
            raise SessaError(
                f"{path}: not a readable {path.suffix[1:]} file (it has {size or 0:,} bytes, "
                f"{MANIFEST} says {facts['bytes']:,}); if another tool wrote the folder anew, "
                f"remove {MANIFEST}"
            )
        paths.append(path)
    return paths


def verify(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> int | None:
    """Compare the files of the manifest, or the `wanted` among them, with their hashes.

    Returns their number, None without a manifest. Raises SessaError that names the first file that
    differs.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    files = manifest_files(folder, manifest, wanted)
    for path in files:
        if file_facts(path) != manifest.files[path.name]:
            raise SessaError(f"{path}: is damaged: its SHA-256 is not the one in {MANIFEST}")
    return len(files)


def is_undamaged(folder: Path) -> bool:
    """Return True when every file of a folder's manifest is there and has its hash."""
    try:
        return verify(folder) is not None
    except SessaError:
        return False


def read_settled(folder: Path, read: Callable[[], T]) -> T:
    """Return what `read` returns; read anew when a save replaced the files meanwhile."""
    while True:
        before = read_manifest(folder)
        try:
            result = read()
        except SessaError:
            if read_manifest(folder) == before:
                raise
            continue
        if read_manifest(folder) == before:
            return result


def is_plain_name(name: Any) -> bool:
    """Return True for the name of a file in the folder itself, not a path that leads elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")
