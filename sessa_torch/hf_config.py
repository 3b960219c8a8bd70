"""The configuration of Sessa in transformers; importing this module registers it with AutoConfig.

This module needs no PyTorch, because other clients, such as mlx-lm, read a tokenizer through
transformers, which then asks for the configuration of the model.
"""

from __future__ import annotations

import copy
import dataclasses
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from sessa_common import config as shared
from sessa_common.checkpoint.remote_code import CODE_KEYS, write_code_files
from sessa_common.layer_kinds import OLD_KEYS

FIELDS = tuple(field.name for field in dataclasses.fields(shared.SessaConfig))


class SessaConfig(PreTrainedConfig):
    """The keys of `sessa_common.config.SessaConfig`, with its defaults and its checks.

    Further keys are kept as transformers keeps them.
    """

    model_type = "sessa"
    use_cache = True

    def __init__(self, **given: Any) -> None:
        if "quantization" in given:
            # mlx-lm writes its settings under both names; here this one means another format.
            given.pop("quantization_config", None)
        dtype = given.pop("torch_dtype", None)
        given["dtype"] = str(given.get("dtype") or dtype or "float32").removeprefix("torch.")
        names = (*FIELDS, *OLD_KEYS, "rope_parameters")
        keys = {name: given.pop(name) for name in names if name in given}
        end = keys.get("eos_token_id")
        checked = shared.SessaConfig.from_dict({**keys, "eos_token_id": _first_id(end)})
        fields = {**dataclasses.asdict(checked), "eos_token_id": end}
        # transformers keeps the scaling, with its base, under another name.
        del fields["rope_scaling"]
        if (scaling := checked.rope_scaling) is not None:
            base = {"rope_theta": checked.rope_theta}
            given["rope_parameters"] = {**scaling.to_dict(), **base}
        super().__init__(**given, **fields)

    @property
    def architecture(self) -> shared.SessaConfig:
        """The configuration that the modules of `sessa_torch` take."""
        names = {*FIELDS, "rope_parameters"} - {"rope_scaling"}
        keys = {name: getattr(self, name) for name in names if hasattr(self, name)}
        keys["dtype"] = str(self.dtype).removeprefix("torch.")
        keys["eos_token_id"] = _first_id(self.eos_token_id)
        return shared.SessaConfig.from_dict(keys)

    def to_dict(self) -> dict[str, Any]:
        """The keys of config.json, without those of kinds of layers that the model has not.

        Of several end tokens it has the first, which begins texts of this project; all of them are
        in generation_config.json.
        """
        keys = super().to_dict()
        unused = set(FIELDS) - self.architecture.to_dict().keys()
        used = {name: value for name, value in keys.items() if name not in unused}
        first = {"eos_token_id": _first_id(self.eos_token_id)}
        return {**used, **first, **copy.deepcopy(CODE_KEYS)}

    def save_pretrained(
        self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """Save as transformers does, with the code files beside it."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_code_files(Path(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: saving writes a short file that imports this module, not a copy of it."""


def _first_id(ids: int | list[int] | None) -> int | None:
    return ids[0] if isinstance(ids, list) else ids


AutoConfig.register("sessa", SessaConfig, exist_ok=True)
