"""The file by which `trust_remote_code` of transformers finds Sessa in the installed package."""

from __future__ import annotations

from pathlib import Path

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


def write_remote_code(folder: Path) -> None:
    """Write the file that `AUTO_MAP` names into a folder."""
    (folder / REMOTE_CODE).write_text(TEXT, encoding="utf-8")
