"""The Python blocks of the pages run, in order, in an empty folder."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


PAGES = (
    "README.md",
    "docs/getting-started.md",
    "docs/operator.md",
    "docs/inference.md",
    "docs/checkpoints-and-conversion.md",
    "docs/transformers.md",
)


@pytest.mark.parametrize("page", PAGES)
def test_the_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    assert blocks
    names: dict = {"__name__": page}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_the_readme_stays_a_front_door():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 220 and len(text.split()) <= 1300
    assert [line for line in lines if len(line) > 100 and not line.startswith("|")] == []
