"""The saved training state of a run folder, whole or in shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sessa_common.checkpoint.folder import open_safetensors, read_safetensors
from sessa_common.checkpoint.manifest import manifest_files, read_manifest
from sessa_common.checkpoint.run_files import STATE, STATE_INDEX
from sessa_common.checkpoint.sharded_state import is_sharded, read_sharded_state
from sessa_common.errors import SessaError
from sessa_common.json_files import parse_json, read_json


def has_state(folder: Path) -> bool:
    """Return True for the folder of a run that can be gone on with."""
    return (folder / STATE).is_file() or is_sharded(folder)


def read_state(folder: Path) -> Mapping[str, np.ndarray]:
    """Return the weights and moments of the last save; those in shards are read one by one."""
    return read_sharded_state(folder) if is_sharded(folder) else read_safetensors(folder / STATE)


def read_state_metadata(folder: Path) -> tuple[int, str]:
    """Step and data fingerprint of the saved state, without reading its arrays."""
    about = read_about(folder)
    return about["step"], about["fingerprint"]


def read_about(folder: Path) -> dict[str, Any]:
    """The content of `Run.about` in the saved state."""
    path = _index(folder) if is_sharded(folder) else folder / STATE
    try:
        if path.name == STATE_INDEX:
            about = read_json(path)
        else:
            with open_safetensors(path) as file:
                about = parse_json((file.metadata() or {}).get("training", ""))
        return about | {"step": int(about["step"]), "fingerprint": str(about["fingerprint"])}
    except SessaError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SessaError(f"{path}: not a training state ({error})") from None


def _index(folder: Path) -> Path:
    manifest = read_manifest(folder)
    assert manifest is not None
    (path,) = manifest_files(folder, manifest, lambda name: name == STATE_INDEX)
    return path
