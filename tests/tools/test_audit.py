"""The audit of dependencies notices a licence that it does not know."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "tools" / "audit.py"


@pytest.fixture
def audit():
    spec = importlib.util.spec_from_file_location("audit", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function that installs a package which has only metadata."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name, licence):
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        text = f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{licence}"
        (folder / "METADATA").write_text(text)

    return install


def test_a_licence_that_is_unknown_or_missing_is_named(audit, installed):
    installed("fine", "License-Expression: Apache-2.0\n")
    installed("also_fine", "Classifier: License :: OSI Approved :: BSD License\n")
    installed("strict", "License-Expression: AGPL-3.0-only\n")
    installed("silent", "")
    found = audit.refused_licences(["fine", "also_fine", "strict", "silent", "not-installed"])
    assert found == {"strict": "AGPL-3.0-only", "silent": "no licence stated"}


def test_the_names_of_the_constraints_are_read(audit):
    assert audit.pinned_names("numpy==2.4\n# a comment\n\nmlx==0.32.4\n") == ["numpy", "mlx"]
