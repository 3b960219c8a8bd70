"""onnxruntime-node, onnxruntime-web and transformers.js generate what PyTorch does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.export_clients import (
    NEW_TOKENS,
    PROMPTS,
    ROOT,
    export_clients,
    greedy_tokens,
    need_npm_packages,
    run_node,
)

SCRIPTS = ROOT / "tests" / "clients"


FOLDERS = {
    "natural": {"layout": "natural"},
    "uniform": {"layout": "uniform"},
    "hybrid": {"variant": "hybrid", "seed": 2},
}


@pytest.fixture(scope="module", params=FOLDERS)
def folders(request, tmp_path_factory) -> tuple[Path, Path]:
    need_npm_packages(SCRIPTS)
    need_npm_packages(ROOT / "export" / "web")
    return export_clients(tmp_path_factory.mktemp("node"), **FOLDERS[request.param])


@pytest.mark.parametrize("provider", ["cpu", "wasm"])
def test_onnxruntime(folders, provider: str) -> None:
    checkpoint, exported = folders
    # The last one is longer than the pieces in which the page's class reads.
    prompts = [*PROMPTS, PROMPTS[0] + PROMPTS[0][:70]]
    script = SCRIPTS / "generate.mjs"
    got = run_node(script, str(exported), provider, json.dumps(prompts), str(NEW_TOKENS))
    assert ("node" if provider == "cpu" else "web") in got["runtime"]
    assert got["found"] == greedy_tokens(checkpoint, prompts)
    assert bytes(got["ids"]).decode() == "Grüße, 東京! 👍"
    assert got["streamed"]


@pytest.mark.parametrize("dtype", ["fp16", pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_smaller_weights(tmp_path: Path, dtype: str) -> None:
    need_npm_packages(SCRIPTS)
    need_npm_packages(ROOT / "export" / "web")
    _, exported = export_clients(tmp_path, dtype=dtype, sharp=1)
    found = [
        run_node(SCRIPTS / "generate.mjs", str(exported), provider, json.dumps(PROMPTS), "4")
        for provider in ("cpu", "wasm")
    ]
    # The last bits of a quantised product differ between processors; the first token does not.
    first = [[row[0] for row in got["found"]] for got in found]
    assert first[0] == first[1]


def test_transformers_js(folders) -> None:
    checkpoint, exported = folders
    texts = [bytes(prompt).decode() for prompt in PROMPTS]
    script = SCRIPTS / "transformers.mjs"
    got = run_node(script, str(exported), json.dumps(texts), str(NEW_TOKENS))
    assert [row["tokens"] for row in got] == greedy_tokens(checkpoint, PROMPTS)
    assert all(row["same"] for row in got)


@pytest.mark.parametrize("options", [{"dtype": "int4"}, {"external_data_bytes": 1000}], ids=str)
def test_transformers_js_finds_the_files(tmp_path: Path, options: dict) -> None:
    need_npm_packages(SCRIPTS)
    clients = ("genai", "transformers-js")
    _, exported = export_clients(tmp_path, clients=clients, sharp=1, **options)
    got = run_node(SCRIPTS / "transformers.mjs", str(exported), json.dumps(["A"]), "3")
    assert len(got[0]["tokens"]) == 3
