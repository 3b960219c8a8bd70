"""Old spellings of options, accepted for one release and not shown in any help text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from sessa_common.errors import SessaError

if TYPE_CHECKING:
    from sessa_common.config import SessaConfig

RENAMED: dict[str, dict[str, str]] = {
    "train": {
        "--accumulation": "--gradient-accumulation-steps",
        "--clip-norm": "--max-grad-norm",
        "--window": "--sequence-length",
    },
    "eval": {"--window": "--sequence-length"},
    "compare": {"--mixers": "--models"},
}
# What one of the options that --layer-kinds replaces makes of the kinds of a model's layers.
REPLACED = {
    "--no-feedback": {"sessa": "gated_attention"},
    "--feedback": {"gated_attention": "sessa"},
    "--attention-block=gated": {"transformer": "gated_attention"},
    "--attention-block=mlp": {"gated_attention": "transformer"},
}


def rename_options(arguments: Sequence[str]) -> list[str]:
    """The arguments of `sessa` with every old option of the command under its present name.

    `arguments` begin with the command. What follows a bare "--" is left alone.
    """
    command = arguments[0] if arguments else ""
    renamed = RENAMED.get(command, {})
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [_rename(text, renamed) for text in arguments[:end]]
    if command == "train":
        options = _with_layer_kinds(options)
    return options + list(arguments[end:])


def _rename(argument: str, renamed: dict[str, str]) -> str:
    name, equals, value = argument.partition("=")
    return renamed.get(name, name) + equals + value


def _with_layer_kinds(options: Sequence[str]) -> list[str]:
    """Replace --mixer, --attention-block, --feedback and --no-feedback by --layer-kinds."""
    rest, old = [], {}
    remaining = iter(options)
    for option in remaining:
        name, equals, value = option.partition("=")
        if name in ("--feedback", "--no-feedback"):
            old["feedback"] = name
        elif name in ("--mixer", "--attention-block"):
            old[name] = value if equals else next(remaining, "")
        else:
            rest.append(option)
    return [*rest, "--layer-kinds", ",".join(_layer_kinds(old, rest))] if old else rest


def _layer_kinds(old: dict[str, str], options: Sequence[str]) -> Sequence[str]:
    from sessa_common.layer_kinds import with_layer_kinds

    block = old.get("--attention-block")
    if block not in (None, "mlp", "gated"):
        raise SessaError(f"--attention-block is {block!r}, expected mlp or gated")
    if "--mixer" in old:
        names = [name.strip() for name in old["--mixer"].split(",")]
        feedback = old.get("feedback") != "--no-feedback"
        given = {"mixer": names, "attention_block": block or "mlp", "feedback": feedback}
        return with_layer_kinds(given)["layer_kinds"]
    base = _base(options).layer_kinds
    kinds = [base] if isinstance(base, str) else list(base)
    for change in (old.get("feedback"), block and f"--attention-block={block}"):
        kinds = [REPLACED[change].get(kind, kind) if change else kind for kind in kinds]
    return kinds


def _base(options: Sequence[str]) -> SessaConfig:
    """The model that the options of `sessa train` name, whose layers an old option changes."""
    from sessa_common.checkpoint.folder import load_config
    from sessa_common.config import SessaConfig
    from sessa_common.json_files import read_json
    from sessa_common.presets import PRESETS

    words = [word for option in options for word in option.split("=", 1)]
    named = dict(pairwise(words))
    if file := named.get("--config"):
        return SessaConfig.from_dict(read_json(Path(file)), file)
    if folder := named.get("--init") or named.get("--resume"):
        return load_config(folder)
    # An unknown preset is refused by the command itself.
    return PRESETS.get(named.get("--preset", "demo"), PRESETS["demo"])
