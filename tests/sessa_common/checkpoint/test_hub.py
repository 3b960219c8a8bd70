"""Models of the Hugging Face hub, with a local stand-in for the hub."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from support.stories import STORIES

from sessa_common.checkpoint.conversion import convert
from sessa_common.checkpoint.folder import load_weights
from sessa_common.errors import SessaError


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one model, beside whose files lie a program and pickled weights."""
    home = tmp_path / "hub"
    shutil.copytree(STORIES, home, ignore=shutil.ignore_patterns("*.npz", "*.md"))
    (home / "modeling.py").write_text("raise SystemExit")
    (home / "pytorch_model.bin").write_bytes(b"pickled")
    asked = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        if name != "someone/stories":
            raise LocalEntryNotFoundError("no connection")
        cache = tmp_path / "cache"
        cache.mkdir()
        for file in home.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(file, cache / file.name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_a_model_of_the_hub_is_converted(hub, tmp_path):
    convert(Path("hf:someone/stories@v1"), tmp_path / "ours")
    assert hub == [("someone/stories", "v1")]
    assert not list((tmp_path / "ours").glob("*.bin"))
    assert not (tmp_path / "ours" / "modeling.py").exists()
    convert(STORIES, tmp_path / "local")
    found, want = (load_weights(tmp_path / name)[1] for name in ("ours", "local"))
    for name, value in want.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:someone/else", "hf:someone/else: the hub cannot be reached, and its cache here"),
        ("hf:stories", "expected hf:owner/name, or a path"),
        ("hf:a/b/c", "expected hf:owner/name, or a path"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(hub, tmp_path, source, message):
    with pytest.raises(SessaError) as error:
        convert(source, tmp_path / "ours")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ours").exists()
