"""Helpers of the tests of the export's clients: an exported model, PyTorch's tokens, tools."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from support.export_models import lively_weights, small_config, write_checkpoint

from sessa_common.inference.generation import generate
from sessa_common.inference.sampling import SamplingConfig
from sessa_export.exporter import Options, export_checkpoint

ROOT = Path(__file__).parents[2]
# Long enough for two blocks of the operator's body, and one of a single token.
PROMPTS = [
    list(b"It was a dark and stormy night; the rain fell in torrents, except at intervals "),
    list(b"Call me"),
    list(b"S"),
]
NEW_TOKENS, END = 16, 256
CI = os.environ.get("CI", "").lower() in ("1", "true")


def export_clients(
    folder: Path, *, variant: str = "grouped", seed: int = 1, sharp: float = 3, **options: Any
) -> tuple[Path, Path]:
    """A small checkpoint with two query heads to a key head, and its export for every client.

    `sharp` weights make greedy text that does not repeat itself; they do not survive few bits.
    """
    config = small_config(variant, tie_word_embeddings=False)
    weights = lively_weights(config, seed=seed)
    for name in weights:
        if name.endswith(("W_in.weight", "W_out.weight", "proj.weight")):
            weights[name] = weights[name] * np.float32(sharp)
    checkpoint, _ = write_checkpoint(folder / "checkpoint", config, weights)
    asked = Options(**{"clients": ("genai", "web", "transformers-js"), **options})
    export_checkpoint(checkpoint, folder / "exported", asked)
    return checkpoint, folder / "exported"


def greedy_tokens(checkpoint: Path, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """NEW_TOKENS likeliest tokens after each prompt, by PyTorch; they vary and do not end."""
    from sessa_torch.decoding import load_decoder

    steps = generate(
        load_decoder(checkpoint), prompts, SamplingConfig(temperature=0), max_tokens=NEW_TOKENS
    )
    rows = np.array(list(steps)).T.tolist()
    assert all(END not in row and len(set(row)) > NEW_TOKENS // 2 for row in rows)
    return rows


def need(found: object, what: str, install: str) -> None:
    """Skip a test that lacks a tool; where CI=true the tools are there, so it fails instead."""
    if not found:
        message = f"{what} is not installed; {install}"
        pytest.fail(message) if CI else pytest.skip(message)


def need_module(name: str) -> ModuleType:
    """Import a package that not every platform has."""
    found = importlib.util.find_spec(name)
    if not found and not CI:
        pytest.skip(f"{name} is not installed", allow_module_level=True)
    return importlib.import_module(name)


def need_npm_packages(folder: Path) -> None:
    """Skip, or fail in CI, without node or without the packages of folder/package.json."""
    need(shutil.which("node"), "node", "install Node.js 20 or later")
    wanted = json.loads((folder / "package.json").read_text())["dependencies"]
    missing = [name for name in wanted if not (folder / "node_modules" / name).is_dir()]
    where = folder.relative_to(ROOT)
    need(not missing, " ".join(missing), f"npm install --prefix {where}")


def run_node(script: Path, *arguments: str, timeout: float = 120) -> Any:
    """Run a script of this project in node and return the JSON of its last line."""
    done = subprocess.run(
        ["node", str(script), *arguments], capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])
