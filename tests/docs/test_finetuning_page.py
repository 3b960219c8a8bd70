"""The commands and the Python blocks of docs/finetuning.md run as written, in order."""

import re
import shlex
from pathlib import Path

import pytest
from support.in_process import sessa

PAGE = Path(__file__).parents[2] / "docs" / "finetuning.md"
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"cat > (\S+) <<'END'\n(.*)END\n", re.DOTALL)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_the_page_runs_as_written(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    # The loss curves take longer to draw than the losses to compute.
    monkeypatch.setattr("sessa_common.training.trainer.draw_losses", lambda folder: False)
    answers = []
    for kind, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if kind == "python":
            exec(compile(text, str(PAGE), "exec"), names)
        elif file := FILE.fullmatch(text):
            Path(file[1]).write_text(file[2], encoding="utf-8")
        elif not text.startswith("pip"):
            for line in text.replace("\\\n", " ").splitlines():
                capsys.readouterr()
                assert sessa(*shlex.split(line)[1:]) == 0, line
                if " generate " in line:
                    answers.append(capsys.readouterr().out)
    assert len(answers) == 2 and answers[0].strip() and names["texts"]
