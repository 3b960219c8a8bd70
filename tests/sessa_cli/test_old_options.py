"""The old options that named a model, as `--layer-kinds`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sessa_cli.old_options import rename_options
from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError


@pytest.mark.parametrize(
    ("given", "kinds"),
    [
        (["--mixer", "attention"], "transformer"),
        (["--mixer=attention", "--attention-block=gated"], "gated_attention"),
        (
            ["--mixer", "sessa, attention,mamba2", "--no-feedback"],
            "gated_attention,transformer,mamba2",
        ),
        (["--no-feedback"], "gated_attention"),
        (["--feedback"], "sessa"),
        (["--no-feedback", "--preset", "sessa-1m"], "gated_attention"),
        (["--preset=transformer-1m", "--attention-block", "gated"], "gated_attention"),
        (["--preset", "transformer-1m", "--no-feedback"], "transformer"),
    ],
)
def test_old_options_become_layer_kinds(given: list[str], kinds: str) -> None:
    found = rename_options(["train", "--steps", "3", *given, "--", "--mixer"])
    assert found[:3] == ["train", "--steps", "3"] and found[-2:] == ["--", "--mixer"]
    assert found[found.index("--layer-kinds") + 1] == kinds
    assert not {"--mixer", "--no-feedback", "--attention-block"} & set(found[:-2])


@pytest.mark.parametrize("option", ["--config", "--init", "--resume"])
def test_an_old_option_changes_the_model_that_is_named(option: str, tmp_path: Path) -> None:
    config = SessaConfig(layer_kinds=("sessa", "transformer"), num_hidden_layers=2)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    named = [option, str(file if option == "--config" else tmp_path)]
    found = rename_options(["train", *named, "--no-feedback"])
    assert found == ["train", *named, "--layer-kinds", "gated_attention,transformer"]


def test_other_arguments_are_left_alone() -> None:
    given = ["train", "--layer-kinds", "mamba2", "--prompt", "a=b"]
    assert rename_options(given) == given
    assert rename_options(["compare", "--no-feedback"]) == ["compare", "--no-feedback"]
    with pytest.raises(SessaError, match="--attention-block is 'wide', expected mlp or gated"):
        rename_options(["train", "--attention-block", "wide"])
    with pytest.raises(SessaError, match="mixer is 'rwkv', expected one of sessa, attention"):
        rename_options(["train", "--mixer", "rwkv"])
