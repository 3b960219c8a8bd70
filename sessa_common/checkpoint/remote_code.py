"""The file by which `trust_remote_code` of transformers finds Sessa in the installed package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sessa_common.config import SessaConfig
from sessa_common.storage import write_json, write_text

REMOTE_CODE = "modeling_sessa.py"
AUTO_MAP = {
    "AutoConfig": "modeling_sessa.SessaConfig",
    "AutoModelForCausalLM": "modeling_sessa.SessaForCausalLM",
}

# transformers reads the imports of such a file and would advise `pip install sessa_torch`, a
# package that does not exist. It leaves imports inside `try` alone.
TEXT = '''\
"""Sessa for transformers; the code is in the package sessa-toolchain."""

try:
    from sessa_torch.hf import SessaConfig, SessaForCausalLM
except ModuleNotFoundError as error:
    raise ImportError(
        f"This model needs sessa-toolchain ({error}); "
        "install it with: pip install 'sessa-toolchain[transformers]'"
    ) from error

__all__ = ["SessaConfig", "SessaForCausalLM"]
'''


def write_config(folder: Path, config: SessaConfig, extra: Mapping[str, Any] | None = None) -> None:
    """Write config.json with `extra` keys, and beside it the file that `AUTO_MAP` names."""
    write_remote_code(folder)
    keys = {**config.to_dict(), **(extra or {}), "auto_map": AUTO_MAP}
    write_json(folder / "config.json", keys)


def write_remote_code(folder: Path) -> None:
    """Write the file that `AUTO_MAP` names into a folder."""
    write_text(folder / REMOTE_CODE, TEXT)
