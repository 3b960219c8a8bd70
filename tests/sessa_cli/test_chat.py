"""`sessa chat`: commands, streams and Ctrl-C, and the options that `sessa generate` shares."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.export_models import small_config, write_checkpoint
from support.in_process import fails, sessa
from typer.testing import CliRunner

from sessa_cli.main import app
from sessa_common.inference.texts import TextWriter
from sessa_export.exporter import export_checkpoint
from sessa_torch.decoding import Decoder

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Printable ASCII without "/" and without an end.
FORBIDDEN = [i for i in range(257) if not 48 <= i < 127]
OPTIONS = [f"--logit-bias={i}=-inf" for i in FORBIDDEN]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("chat")
    write_checkpoint(root / "checkpoint", small_config("untied", num_key_value_heads=2))
    (root / "checkpoint/chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    export_checkpoint(root / "checkpoint", root / "exported")
    return {"checkpoint": root / "checkpoint", "exported": root / "exported"}


def run(*arguments: object, typed: str = "") -> tuple[str, str]:
    """Standard output and error of the command."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=typed)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout, result.stderr


def talk(folder: Path, typed: str, *options: object) -> tuple[str, str]:
    chosen = ("--temperature", 0, "--max-tokens", 12, *OPTIONS, *options)
    return run("chat", folder, *chosen, typed=typed)


@pytest.mark.parametrize(
    "folder, backend", [("checkpoint", "torch"), ("checkpoint", "mlx"), ("exported", "onnx")]
)
def test_a_conversation_in_every_runtime(folders, folder: str, backend: str) -> None:
    out, err = talk(folders[folder], "Hello\n\nMe\n", "--system", "Short.", "--backend", backend)
    answers = out.splitlines()
    assert len(answers) == 2 and all(len(answer) == 12 for answer in answers)
    # An export keeps the template of its checkpoint, and generate answers the same.
    assert "no chat template" not in err
    chosen = ["--temperature", 0, "--max-tokens", 12, *OPTIONS, "--system", "Short.", "--json"]
    said, _ = run("generate", folders[folder], "--prompt", "Hello", *chosen, "--backend", backend)
    assert json.loads(said)["texts"][0]["text"] == answers[0]


@pytest.mark.parametrize("folder, backend", [("checkpoint", "mlx"), ("exported", "onnx")])
def test_guesses_change_no_answer(folders, folder: str, backend: str) -> None:
    typed = "Hello\nMe\n"
    expected, _ = talk(folders[folder], typed, "--backend", backend)
    guessed, err = talk(folders[folder], typed, "--backend", backend, "--prompt-lookup", 3)
    assert guessed == expected and "guessed" in err


def test_a_conversation_goes_on_from_the_cache_of_another_day(folders, tmp_path: Path) -> None:
    model, file, cache = (
        folders["checkpoint"],
        tmp_path / "talk.json",
        tmp_path / "talk.safetensors",
    )
    whole, _ = talk(model, "Hello, who is there?\nMe\n")
    typed = f"Hello, who is there?\n/save {file}\n"
    first, err = talk(model, typed, "--save-prompt-cache", cache)
    assert re.search(rf"the cache of (\d+) tokens is in {cache}", err)[1] > "30"
    read: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "step", counting(Decoder.step, read))
        patch.setattr(Decoder, "feed", counting(Decoder.feed, read))
        options = ["--conversation", file, "--prompt-cache", cache, "--backend", "torch"]
        second, _ = talk(model, "Me\n", *options)
    assert first + second == whole and max(read) < len("[user]Hello, who is there?")
    nothing = tmp_path / "nothing.safetensors"
    _, err = talk(model, "", "--save-prompt-cache", nothing)
    assert "nothing was said" in err and not nothing.exists()


def counting(method, read: list[int]):
    def counted(decoder, tokens, mask=None):
        read.append(tokens.size)
        return method(decoder, tokens, mask)

    return counted


def test_commands(folders, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    typed = f"Hello\n/save {file}\n/reset\nHello\n/help\n/save\n/bogus\n/save {tmp_path}/no/file\n"
    out, err = talk(folders["checkpoint"], typed, "--system", "Short.")
    first, again = out.splitlines()
    assert first == again
    for said in (
        f"3 messages in {file}",
        "begins anew",
        "Ctrl-C      stop the answer",
        "/save needs the name",
        "/bogus is no command",
        "cannot be written",
    ):
        assert said in err
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert [m["role"] for m in saved["messages"]] == ["system", "user", "assistant"]
    assert saved["messages"][2]["content"] == first
    both, _ = talk(folders["checkpoint"], "Hello\nMe\n", "--system", "Short.")
    more, _ = talk(folders["checkpoint"], "Me\n", "--conversation", file)
    assert both.splitlines()[1:] == more.splitlines()


def test_a_long_conversation_says_what_it_drops(folders) -> None:
    typed = "".join(f"{i} {'x' * 60}\n" for i in range(5)) + "x" * 400 + "\n"
    out, err = talk(folders["checkpoint"], typed)
    assert len(out.splitlines()) == 5
    assert "the context is full: the oldest 4 messages are left out" in err
    assert "error: the message has 4" in err


def test_the_plain_template_is_announced(folders, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", small_config())
    out, err = talk(tmp_path / "m", "Hello\n")
    assert "has no chat template" in err and len(out.splitlines()) == 1


def test_bad_input_ends_it_before_the_model_is_read(folders, tmp_path: Path, capsys) -> None:
    (tmp_path / "talk.json").write_text('{"messages": [{"role": "user"}]}', encoding="utf-8")
    folder = folders["checkpoint"]
    cases = [
        ([tmp_path / "none"], "no such checkpoint folder"),
        ([folder, "--top-p", 2], "top_p is 2"),
        ([folder, "--conversation", tmp_path / "talk.json"], 'expected "messages"'),
        ([folder, "--logit-bias", "x"], "--logit-bias is 'x'"),
    ]
    for arguments, message in cases:
        assert message in fails(capsys, "chat", *arguments)


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        self.master, slave = pty.openpty()
        self.heard = ""
        # A session of its own, whose terminal this is, so that Ctrl-C reaches the command alone.
        command = [sys.executable, "-m", "sessa_cli.main", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)

    def expect(self, text: str, seconds: float = 60) -> str:
        """Wait for a text and return everything before it since the last one."""
        ends = time.monotonic() + seconds
        while text not in self.heard:
            assert time.monotonic() < ends, f"no {text!r} in {self.heard!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                self.heard += os.read(self.master, 65536).decode()
        before, _, self.heard = self.heard.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def interrupt_prompt(self, text: str) -> None:
        """Press Ctrl-C at the prompt until the text comes.

        C's terminal input does not hear a signal that comes between its prompt and its read.
        """
        for _ in range(12):
            self.interrupt()
            with contextlib.suppress(AssertionError):
                self.expect(text, 5)
                return
        pytest.fail(f"no {text!r} after 12 interrupts")


def test_ctrl_c_stops_the_answer_and_ctrl_d_the_program(tmp_path: Path) -> None:
    # The answer would fill the context, which takes much longer than the test.
    write_checkpoint(tmp_path / "m", small_config("untied", max_position_embeddings=50_000))
    options = ["--backend", "torch", "--temperature", 0, *OPTIONS]
    terminal = Terminal("chat", tmp_path / "m", *options)
    try:
        terminal.expect("> ")
        terminal.interrupt_prompt("Ctrl-D ends")
        terminal.expect("> ")
        terminal.type("Hello\n")
        terminal.expect("Hello\r\n")
        while not terminal.heard.strip():
            terminal.heard += os.read(terminal.master, 64).decode()
        terminal.interrupt()
        assert len(terminal.expect("stopped")) < 49_000
        terminal.expect("> ")
        terminal.type("/reset\n")
        terminal.expect("begins anew")
        terminal.expect("> ")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.master)


def test_a_file_of_prompts(folders, tmp_path: Path, capsys) -> None:
    source, target = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a", "id": 7}\n{"prompt": "Hello"}\n', encoding="utf-8")
    asked = ["generate", folders["exported"], "--file", source, "--output", target]
    chosen = ["--temperature", 0, "--max-tokens", 9, "--batch-size", 1]
    out, err = run(*asked, *chosen, "--json")
    made = json.loads(out)
    assert made["texts"] == 2 and made["tokens"] == 18 and made["output"] == str(target)
    lines = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [line.get("id") for line in lines] == [7, None] and lines[1]["finish"] == "length"
    assert "is there already; name another file, or give --force" in fails(capsys, *asked, *chosen)
    out, err = run(*asked, *chosen, "--force")
    assert out == "" and f"2 texts in {target}" in err


def test_a_stopped_file_goes_on_with_the_same_model_only(tmp_path, monkeypatch, capsys) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    config = small_config("untied")
    folder, weights = write_checkpoint(tmp_path / "m", config)
    source, target = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a"}', encoding="utf-8")
    asked = ("generate", folder, "--file", source, "--output", target, "--max-tokens", 9)
    with monkeypatch.context() as patch:
        patch.setattr(TextWriter, "write", interrupt)
        assert sessa(*asked) == 130
    assert f"{target}.partial; the same command goes on" in capsys.readouterr().err
    write_checkpoint(folder, config, {name: w + np.float32(1) for name, w in weights.items()})
    assert sessa(*asked) == 2 and "of another request" in capsys.readouterr().err
    write_checkpoint(folder, config, weights)
    assert sessa(*asked) == 0 and target.is_file()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--file", "a"], "--file and --output need one another"),
        (["--output", "a"], "--file and --output need one another"),
        (["--prompt", "a", "--force"], "--force is for the file of --output"),
        (["--file", "a", "--output", "b", "--prompt", "c"], "not both"),
        (["--file", "none.jsonl", "--output", "b"], "none.jsonl: no such file"),
    ],
)
def test_options_of_files_are_checked(folders, capsys, options, message) -> None:
    assert message in fails(capsys, "generate", folders["checkpoint"], *options)
