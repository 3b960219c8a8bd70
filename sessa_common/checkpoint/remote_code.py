"""The code files by which transformers and mlx-lm find Sessa in the installed package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sessa_common.config import SessaConfig
from sessa_common.extras import install
from sessa_common.json_files import read_json
from sessa_common.storage import write_json, write_text

# The keys of config.json by which transformers (`auto_map`) and mlx-lm find their file.
CODE_KEYS = {
    "auto_map": {
        "AutoConfig": "configuration_sessa.SessaConfig",
        "AutoModelForCausalLM": "modeling_sessa.SessaForCausalLM",
    },
    "model_file": "mlx_lm_model.py",
}

# transformers reads the imports of such a file and would advise `pip install sessa_torch`, a
# package that does not exist. It leaves imports inside `try` alone.
TEXT = '''\
"""Sessa for {client}; the code is in the package sessa-toolchain."""

try:
    from {module} import {names}
except ModuleNotFoundError as error:
    raise ImportError(
        f"This model needs sessa-toolchain ({{error}}); "
        "install it with: {command}"
    ) from error

__all__ = [{quoted}]
'''


def _text(client: str, module: str, *names: str) -> str:
    quoted = ", ".join(f'"{name}"' for name in names)
    return TEXT.format(
        client=client,
        module=module,
        names=", ".join(names),
        quoted=quoted,
        command=install(client),
    )


CODE_FILES = {
    "configuration_sessa.py": _text("transformers", "sessa_torch.hf_config", "SessaConfig"),
    "modeling_sessa.py": _text("transformers", "sessa_torch.hf", "SessaForCausalLM"),
    "mlx_lm_model.py": _text("mlx-lm", "sessa_mlx.lm", "Model", "ModelArgs"),
}


def write_config(folder: Path, config: SessaConfig, extra: Mapping[str, Any] | None = None) -> None:
    """Write config.json with `extra` keys, and beside it the code files that it names."""
    write_code_files(folder)
    write_json(folder / "config.json", {**config.to_dict(), **(extra or {}), **CODE_KEYS})


def write_code_files(folder: Path) -> None:
    """Write the files that `CODE_KEYS` names into a folder."""
    for name, text in CODE_FILES.items():
        write_text(folder / name, text)


def has_code_files(folder: Path) -> bool:
    """Return True when a folder has today's files and names them in its config.json."""
    settings = read_json(folder / "config.json")
    named = all(settings.get(key) == value for key, value in CODE_KEYS.items())
    return named and all(
        (folder / name).is_file() and (folder / name).read_text(encoding="utf-8") == text
        for name, text in CODE_FILES.items()
    )
