"""The commands of docs/pretrained-models.md run as written on the published model."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from support.in_process import sessa
from support.stories import STORIES

from sessa_common.checkpoint.folder import read_safetensors

PAGE = Path(__file__).parents[2] / "docs" / "pretrained-models.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"cat > (\S+) <<'END'\n(.*)END\n", re.DOTALL)


def test_the_page_runs_as_written(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    Path("stories260K").symlink_to(STORIES)
    said = {}
    for text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if file := FILE.fullmatch(text):
            Path(file[1]).write_text(file[2], encoding="utf-8")
            continue
        for line in text.replace("\\\n", " ").splitlines():
            capsys.readouterr()
            assert sessa(*shlex.split(line)[1:]) == 0, line
            said[line.split()[1]] = capsys.readouterr()
    assert "there was a little girl named Lily. She loved to play outside" in said["generate"].out
    records = (tmp_path / "tales" / "metrics.jsonl").read_text()
    assert '"layer_4_gain_max": ' in records and '"layer_4_gain_max": 0.0,' not in records
    before, after = (
        read_safetensors(Path(name) / "model.safetensors") for name in (STORIES, "llama-again")
    )
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
