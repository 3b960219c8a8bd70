"""mlx-lm's server: requests at the same time, and a prefix that is not computed again."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.export_models import small_config, write_checkpoint

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")

import sessa_mlx

PROMPTS = ["The cat", "A much longer prompt about dogs and cats", "x", "The cat sat"]


# The command of the page, which says no port.
PAGE = Path(__file__).parents[2] / "docs/mlx-lm.md"
COMMAND = re.findall(r"^mlx_lm\.server.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)[0]
FOLDERS = ("first", "second")
KINDS = {"trimmable": ("sessa", "sessa_transformer"), "with a state": ("mamba2", "sessa")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("server")
    found = {name: root / "runs" / folder for name, folder in zip(KINDS, FOLDERS, strict=True)}
    for name, path in found.items():
        config = small_config("untied", layer_kinds=KINDS[name], mamba_d_head=16)
        write_checkpoint(path, config)
    return found


@pytest.fixture(scope="module")
def address(folders):
    """The address of a running server, which loads the model that a request names."""
    root = folders["trimmable"].parents[1]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", *shlex.split(COMMAND), "--port", str(port)]
    with (root / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=root, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(address, process, root / "log")
        yield address
    finally:
        process.terminate()
        process.wait(30)


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except urllib.error.URLError:
            time.sleep(0.25)
    pytest.fail(log.read_text())


def complete(address: str, model: Path, prompt: str) -> dict[str, Any]:
    asked = {"model": str(model), "prompt": prompt, "max_tokens": 12, "temperature": 0}
    body = json.dumps(asked).encode()
    request = urllib.request.Request(
        f"{address}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.parametrize("kind", KINDS)
def test_requests_at_the_same_time_get_the_texts_of_sessa_generate(address, folders, kind):
    folder = folders[kind]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = pool.map(lambda prompt: complete(address, folder, prompt), PROMPTS)
        found = [answer["choices"][0]["text"].strip() for answer in answers]
    own = sessa_mlx.generate(folder, PROMPTS, max_tokens=12, temperature=0)
    assert found == [text.strip() for text in own]


@pytest.mark.parametrize("kind", KINDS)
def test_a_known_prefix_comes_from_the_cache(address, folders, kind):
    prompt = "The same words again."
    first, second = (complete(address, folders[kind], prompt) for _ in range(2))
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 15
    assert first["choices"][0]["text"] == second["choices"][0]["text"]
