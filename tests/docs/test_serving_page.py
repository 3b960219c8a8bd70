"""The commands and the programs of docs/serving.md run as written, but for the port."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from support.export_models import small_config, write_checkpoint

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def served(tmp_path):
    """The blocks of the page behind the first, whose command runs, and the process of it."""
    write_checkpoint(tmp_path / "runs/first", small_config("untied"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8").replace(":8000", f":{port}")
    (language, command), *blocks = BLOCK.findall(page)
    name, *arguments = command.split()
    assert (language, name, arguments) == ("sh", "sessa", ["serve", "runs/first"])
    command = [sys.executable, "-m", "sessa_cli.main", *arguments, "--port", str(port)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{port}", blocks, process
    finally:
        process.kill()
        process.communicate()


def wait_until_ready(url: str) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            assert httpx.get(f"{url}/health", timeout=60).json()["status"] == "ok"
            return
        except httpx.TransportError:
            assert time.monotonic() < until
            time.sleep(0.1)


def test_the_blocks_run_and_a_signal_lets_answers_end(served, capsys):
    url, blocks, process = served
    wait_until_ready(url)
    names = {"__name__": "serving"}
    for language, block in blocks:
        if language == "python":
            exec(compile(block, "docs/serving.md", "exec"), names)
        else:
            answer = subprocess.run(["bash", "-c", block], capture_output=True, check=True)
            assert json.loads(answer.stdout)["usage"]["completion_tokens"] <= 20
    said = capsys.readouterr().out
    assert json.loads(said.splitlines()[-1])["name"] in ("Ada", "Zoe")
    body = {"model": "first", "prompt": "x", "max_tokens": 250, "stream": True, "temperature": 0}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        process.send_signal(signal.SIGINT)
        *_, last = [first, *(line for line in lines if line)]
    assert last == "data: [DONE]"
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0 and err.splitlines()[-1] == "stopped"
    assert "answers for the model 'first'; Ctrl-C stops" in err and "Traceback" not in err
