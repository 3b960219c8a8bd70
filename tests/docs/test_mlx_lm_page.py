"""The commands of the page on mlx-lm run as they stand, on a small folder.

`tests/sessa_mlx/test_lm_server.py` runs the one that does not end.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from support.export_models import lively_weights, small_config, write_checkpoint
from support.in_process import sessa

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")

from mlx_lm import utils

from sessa_mlx import lm_commands

PAGE = (Path(__file__).parents[2] / "docs/mlx-lm.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def programs() -> list[list[str]]:
    """The commands and Python blocks of the page, without those that do not end or install."""
    found = []
    for kind, text in BLOCK.findall(PAGE):
        if kind == "python":
            found.append(["exec", text])
        else:
            found += [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]
    return [words for words in found if words[0] not in ("pip", "mlx_lm.server")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models and the data that the page names."""
    path = tmp_path_factory.mktemp("page")
    for seed, name in enumerate(("first", "small")):
        config = small_config("untied", hidden_size=64, layer_kinds=("sessa", "transformer"))
        write_checkpoint(path / "runs" / name, config, lively_weights(config, seed))
    (path / "data").mkdir()
    for name in ("train", "valid"):
        lines = [json.dumps({"text": f"{i} times {i} is {i * i}. " * 3}) for i in range(12)]
        (path / f"data/{name}.jsonl").write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("program", programs(), ids=lambda words: words[0])
def test_the_page_runs(
    program: list[str], home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """In order: later commands read what earlier ones wrote."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(utils, name, getattr(utils, name))
    name, *arguments = program
    if name == "exec":
        exec(compile(arguments[0], "docs/mlx-lm.md", "exec"), {})
    elif name == "sessa":
        assert sessa(*arguments) == 0
    elif name == "python":
        assert arguments[:2] == ["-m", "sessa_mlx.lm_commands"]
        monkeypatch.setattr(sys, "argv", arguments[1:])
        lm_commands.main()
    else:
        monkeypatch.setattr(sys, "argv", program)
        importlib.import_module(name).main()
    assert "".join(capsys.readouterr())
