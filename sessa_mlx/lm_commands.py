"""The commands of mlx-lm on Sessa folders, without running a file of a folder.

`python -m sessa_mlx.lm_commands generate ...` is `mlx_lm.generate ...`, but needs no
`--trust-remote-code`, and `--draft-model` may be a Sessa folder too: mlx-lm loads a draft model
without that option.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# First, because it says what to install where mlx-lm is missing.
from sessa_mlx.lm import Model, ModelArgs  # isort: skip
from mlx_lm import cli, utils
from transformers import PreTrainedConfig

_load_model, _load_tokenizer = utils.load_model, utils.load_tokenizer


def main() -> None:
    """Run the command of mlx-lm that the command line names."""
    utils.load_model, utils.load_tokenizer = load_model, load_tokenizer
    cli.main()


def load_model(model_path: Path, *args: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load a folder as `mlx_lm.utils.load_model` does, a Sessa model by the installed code."""
    given = utils.load_config(model_path)
    if given.get("model_type") != "sessa":
        return _load_model(model_path, *args, **options)
    changes = {**(options.get("model_config") or {}), "model_file": None}
    options["get_model_classes"] = lambda config: (Model, ModelArgs)
    options["model_config"] = changes
    model, config = _load_model(model_path, *args, **options)
    # The commands that write a folder write this configuration into it.
    return model, {**config, "model_file": given.get("model_file")}


def load_tokenizer(
    model_path: Path, tokenizer_config_extra: Any = None, eos_token_ids: Any = None
) -> Any:
    """Load a tokenizer as `mlx_lm.utils.load_tokenizer` does, without the folder's `auto_map`."""
    given = dict(tokenizer_config_extra or {})
    if utils.load_config(model_path).get("model_type") == "sessa":
        # transformers would ask at the terminal whether to run the files that config.json names.
        given.setdefault("config", PreTrainedConfig())
    return _load_tokenizer(model_path, given, eos_token_ids)


if __name__ == "__main__":
    main()
