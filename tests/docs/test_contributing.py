"""CONTRIBUTING.md answers where a change goes with files and names that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (.+?) \| `([^`]+)` \| `([^`]+)` \|$", re.MULTILINE)
ANSWERS = ROW.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def _defined(path):
    """The functions, classes and variables that a module defines."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_the_questions_are_found():
    assert len(ANSWERS) >= 5


@pytest.mark.parametrize(("question", "file", "name"), ANSWERS)
def test_a_file_holds_what_the_answer_names(question, file, name):
    assert name in _defined(ROOT / file), question
