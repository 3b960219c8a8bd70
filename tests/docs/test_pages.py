"""The blocks of the pages run, in order, in an empty folder."""

import re
import shlex
from pathlib import Path

import pytest
from support.in_process import sessa

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)


PAGES = (
    "README.md",
    "docs/getting-started.md",
    "docs/operator.md",
    "docs/inference.md",
    "docs/checkpoints-and-conversion.md",
    "docs/evaluation.md",
    "docs/transformers.md",
)
# Pages whose commands run too; those of other programs are not run.
WITH_COMMANDS = {"docs/evaluation.md", "docs/transformers.md"}
OTHER_PROGRAMS = ("pip install", "lm-eval")


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    assert "python" in dict(blocks)
    names: dict = {"__name__": page}
    for language, block in blocks:
        if language == "python":
            exec(compile(block, page, "exec"), names)
        elif page in WITH_COMMANDS:
            run_commands(block)


def run_commands(block):
    for line in block.replace("\\\n", "").splitlines():
        if not line.startswith(OTHER_PROGRAMS):
            program, *arguments = shlex.split(line)
            assert program == "sessa" and sessa(*arguments) == 0, line


def test_the_readme_stays_a_front_door():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 220 and len(text.split()) <= 1300
    assert [line for line in lines if len(line) > 100 and not line.startswith("|")] == []
