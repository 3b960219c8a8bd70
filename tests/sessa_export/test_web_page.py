"""The page of export/web in headless Chromium: it writes what PyTorch does."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.export_clients import (
    PROMPTS,
    ROOT,
    export_clients,
    greedy_tokens,
    need,
    need_npm_packages,
    run_node,
)

WEB = ROOT / "export" / "web"
SCRIPTS = ROOT / "tests" / "clients"


@pytest.fixture(scope="module")
def chromium() -> str:
    need_npm_packages(SCRIPTS)
    need_npm_packages(WEB)
    found = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    need(found, "chromium", "apt-get install --no-install-recommends chromium")
    return str(found)


@pytest.fixture(scope="module")
def site(chromium, tmp_path_factory) -> Iterator[tuple[Path, Path, str]]:
    """Checkpoint, built page and the address at which its files are served."""
    folder = tmp_path_factory.mktemp("web")
    checkpoint, exported = export_clients(folder, clients=("web",))
    build(exported, folder / "dist")
    with serve(folder / "dist") as url:
        yield checkpoint, folder / "dist", url


def build(exported: Path, dist: Path) -> subprocess.CompletedProcess:
    command = ["node", str(WEB / "build.mjs"), str(exported), str(dist)]
    return subprocess.run(command, capture_output=True, text=True)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def visit(chromium: str, url: str, **actions: Any) -> dict[str, Any]:
    return run_node(SCRIPTS / "page.mjs", chromium, url, json.dumps(actions), timeout=240)


@pytest.mark.parametrize(("device", "tokens"), [("wasm", 16), ("webgpu", 4)])
def test_page_writes(site, chromium, device: str, tokens: int) -> None:
    checkpoint, dist, url = site
    prompt = bytes(PROMPTS[0]).decode()
    seen = visit(chromium, url, device=device, prompt=prompt, tokens=tokens)
    if device == "webgpu":
        need(seen["adapter"], "a WebGPU adapter", "start Chromium where it offers one")
    expected = bytes(greedy_tokens(checkpoint, PROMPTS)[0][:tokens]).decode(errors="replace")
    assert seen["errors"] == []
    assert seen["marked"] == expected
    assert seen["text"] == prompt + expected
    assert seen["status"] == f"{tokens} tokens written."
    assert seen["used"] == len(PROMPTS[0]) + tokens - 1
    assert seen["room"] == 300
    assert seen["speed"] > 0
    assert seen["device"] == device
    size = (dist / "model" / "model.onnx").stat().st_size / 1e6
    assert seen["about"] == f"47K parameters · fp32, {size:.1f} MB"
    assert seen["cleared"] == ""


def test_page_says_that_the_text_is_too_long(site, chromium) -> None:
    seen = visit(chromium, site[2], device="wasm", prompt="x" * 300, tokens=4)
    assert seen["status"] == "the text has 300 tokens, the model reads 300"
    assert seen["errors"] == []


def test_page_neither_runs_foreign_code_nor_talks_to_other_servers(site, chromium) -> None:
    with serve(site[1]) as elsewhere:
        seen = visit(chromium, site[2], device="wasm", prompt="a", tokens=1, elsewhere=elsewhere)
    assert seen["allowed"] == {"fetch": False, "remote": False, "inline": False}
    assert seen["status"] == "1 tokens written."


def test_page_says_that_the_model_is_missing(site, chromium, tmp_path: Path) -> None:
    dist = shutil.copytree(site[1], tmp_path / "dist")
    (dist / "model" / "web.json").unlink()
    with serve(dist) as url:
        seen = visit(chromium, url, device="wasm", prompt="", tokens=1)
    assert seen["status"].startswith("The model cannot be loaded: ./model/web.json: 404")


def test_build_refuses(chromium, site, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    exported = site[1].parent / "exported"
    cases = [
        (tmp_path, tmp_path / "dist", "no web.json"),
        (exported, tmp_path / "mine", "no page of ours"),
    ]
    for source, target, message in cases:
        done = build(source, target)
        assert done.returncode == 2
        assert message in done.stderr
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
