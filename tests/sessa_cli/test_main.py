"""`sessa` itself: version, help, completion, old options, and errors that name options."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.in_process import fails, sessa
from typer.main import get_command

from sessa_cli.main import app
from sessa_cli.messages import name_options, options_of
from sessa_cli.old_options import RENAMED, rename_options
from sessa_common import __version__

ROOT = Path(__file__).parents[2]
LIBRARY = ("sessa_common", "sessa_torch", "sessa_mlx", "export/sessa_export")
COMMANDS = get_command(app).commands
# A compiler's and a package manager's options, which the library passes on or names.
FOREIGN = (
    "xcode-select --install",
    "--version",
    "--query-gpu=compute_cap",
    "--format=csv,noheader",
    "sessa build-op --cuda",
)


def test_version(capsys):
    assert sessa("--version") == 0
    assert capsys.readouterr().out == f"sessa {__version__}\n"
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{__version__}"' in pyproject


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_short_help_is_the_long_one(command, capsys):
    arguments = [command] if command else []
    assert sessa(*arguments, "-h") == 0
    short = capsys.readouterr().out
    assert sessa(*arguments, "--help") == 0
    assert short == capsys.readouterr().out and "Usage: sessa" in short
    if command and command != "data":  # which has commands of its own
        assert f"Example: sessa {command}" in " ".join(short.split())


def test_shell_completion_knows_commands_and_options():
    def complete(words):
        environment = {
            "_SESSA_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, "-m", "sessa_cli.main"]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True)
        return answer.stdout.split()

    assert complete("sessa ev") == ["eval"]
    assert "--learning-rate" in complete("sessa train --learn")


@pytest.mark.parametrize("command", RENAMED)
def test_an_old_option_becomes_the_present_one(command):
    known = {name for p in COMMANDS[command].params for name in (*p.opts, *p.secondary_opts)}
    for old, new in RENAMED[command].items():
        assert new in known and old not in known
        assert rename_options([command, old, "3"]) == [command, new, "3"]
        assert rename_options([command, f"{old}=3", "--", old]) == [command, f"{new}=3", "--", old]


def test_a_message_names_the_options_of_its_command():
    options = options_of(COMMANDS["train"])
    assert options["learning_rate"] == "--learning-rate"
    assert options["use_forward_rope"] == "--rope/--no-rope"
    message = "try a smaller `learning_rate`, `hidden_size` 3 or `sessa export`; see `nothing`"
    assert name_options(message, options) == (
        "try a smaller --learning-rate, --hidden-size 3 or `sessa export`; see nothing"
    )


def test_a_field_has_another_option_in_another_command(tmp_path, capsys):
    said = fails(capsys, "convert", tmp_path / "none", tmp_path / "out", "--to", "jax")
    assert "error: --to is 'jax', expected torch or mlx" in said
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("")
    said = fails(capsys, "convert", tmp_path / "none", tmp_path / "out")
    assert "choose another or add --force" in said


def texts_of(path):
    """The string literals of a module that are no docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {
        id(n.body[0].value)
        for n in ast.walk(tree)
        if isinstance(n, documented) and n.body and isinstance(n.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


@pytest.mark.parametrize("package", LIBRARY)
def test_the_library_names_fields_and_no_options(package):
    named = [
        (path.name, text)
        for path in (ROOT / package).rglob("*.py")
        for text in texts_of(path)
        if re.search(r"(^|[^\w-])--[a-z]", text) and not any(known in text for known in FOREIGN)
    ]
    assert named == []
