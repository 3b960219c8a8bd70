"""The output of every command: text as it is, valid JSON, and no disturbance by its reader."""

import io
import json
import os
import subprocess
import sys

import pytest
from rich.table import Table

from sessa_cli.common import make_console, print_json, say
from sessa_cli.foreign_errors import foreign_message
from sessa_cli.home_paths import expand_home
from sessa_cli.terminal import SafeOutput, for_output, printable
from sessa_common.training.metrics import read_metrics

NAME = "[red]a[/red] [1] :smile:"


def test_brackets_and_colons_in_names_are_printed_as_they_are(capsys):
    console = make_console()
    table = Table("name")
    table.add_row(NAME)
    say(console, NAME)
    console.print(NAME)
    console.print(table)
    assert capsys.readouterr().out.count(NAME) == 3


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_numbers_that_json_has_no_word_for_are_null(number, capsys):
    bad = float(number)
    print_json({"loss": bad, "rows": [1.5, (bad, "é")], "nested": {"x": bad, "n": 3}})
    out = capsys.readouterr().out
    assert json.loads(out, parse_constant=pytest.fail) == {
        "loss": None,
        "rows": [1.5, [None, "é"]],
        "nested": {"x": None, "n": 3},
    }


def test_an_old_terminal_gets_json_that_is_whole(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    print_json({"text": "日本 é 😀"})
    sys.stdout.flush()
    assert json.loads(raw.getvalue().decode("latin-1")) == {"text": "日本 é 😀"}


def test_what_steers_a_terminal_is_shown_instead(capsys, monkeypatch):
    hostile = "a\x1b[2J\x9b31m\rb\x07\u202ec\n"
    shown = "a\\x1b[2J\\x9b31m\\rb\\x07\\u202ec\n"
    assert printable(hostile) == shown
    say(make_console(), hostile)
    assert capsys.readouterr().out == shown + "\n"
    table = Table("name")
    table.add_row("x\x1b[31my")
    make_console().print(table)
    assert "x\\x1b[31my" in capsys.readouterr().out
    assert for_output(hostile) == hostile
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert for_output(hostile) == shown


class Failing(io.StringIO):
    """A stream that cannot be written."""

    def __init__(self, error):
        super().__init__()
        self.raised = error

    def write(self, _):
        raise self.raised

    flush = write = write


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (BrokenPipeError(32, "Broken pipe"), None),
        (OSError(28, "No space left"), "No space left"),
        (ValueError("I/O operation on closed file"), "I/O operation on closed file"),
    ],
)
def test_output_that_fails_raises_nothing(error, lost):
    stream = SafeOutput(Failing(error))
    print("progress", file=stream)
    assert stream.lost == lost
    print("progress", file=SafeOutput(None))


def sessa_shell(command):
    """Run a line of shell in which $SESSA is the command; the ended process."""
    paths = [path for path in sys.path if path]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "latin-1"}
    environment = {**os.environ, **settings, "SESSA": f"{sys.executable} -m sessa_cli.main"}
    return subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_closed_and_full_outputs_end_in_one_line_at_most():
    text = "data simplestories --data gone東京.txt --out x"
    for redirection, code, lines in [
        ("", 2, ["error: gone\\u6771\\u4eac.txt: no such file or folder"]),
        (">&-", 2, ["error: gone\\u6771\\u4eac.txt: no such file or folder"]),
        ("2>&-", 2, []),
    ]:
        done = sessa_shell(f"$SESSA {text} {redirection}")
        assert (done.returncode, done.stderr.splitlines()) == (code, lines), redirection
    full = sessa_shell("$SESSA --help > /dev/full")
    assert full.returncode == 2
    assert full.stderr == "error: standard output could not be written (No space left on device)\n"
    assert sessa_shell("$SESSA --help | head -1").stderr == ""


@pytest.mark.parametrize("output", [">&-", "| true"])
def test_training_goes_on_when_nobody_reads_what_it_reports(tmp_path, output):
    (tmp_path / "d.txt").write_text("some words and other words " * 200)
    size = "--tokenizer 300 --layers 1 --width 32 --heads 2 --context 32 --batch-size 2"
    paths = f"--data {tmp_path / 'd.txt'} --out {tmp_path / 'run'}"
    done = sessa_shell(f"$SESSA train {paths} {size} --steps 3 --evaluate-every 1 {output}")
    assert (done.returncode, done.stderr) == (0, "")
    assert read_metrics(tmp_path / "run")[-1]["step"] == 3
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_memory_that_libraries_cannot_get_is_one_line():
    words = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes\nframe 0"
    assert foreign_message(RuntimeError(words)) == f"not enough memory: {words.splitlines()[0]}"
    assert foreign_message(RuntimeError("a fault of the program")) is None


def test_a_link_to_itself_is_one_line(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(link)
    with pytest.raises((OSError, RuntimeError)) as raised:
        link.resolve(strict=True)
    assert str(link) in (foreign_message(raised.value) or "")


def test_a_tilde_is_the_home_folder_in_paths_and_a_sign_in_prompts(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = ["info", "~/a", "--out=~/b", "--data", "~", "--prompt", "~/c", "--prompt=~/d", "e~/f"]
    assert expand_home(given) == [
        "info", "/home/me/a", "--out=/home/me/b", "--data", "/home/me", "--prompt", "~/c",
        "--prompt=~/d", "e~/f",
    ]  # fmt: skip
