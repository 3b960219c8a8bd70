"""The Metal texts go through a compiler, here a stand-in, and a refusal is an error."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from support.export_clients import ROOT

# Knows no Metal 4, needs the headers of MLX, and refuses a text that says that it is not Metal.
COMPILER = """#!/bin/sh
for word in "$@"; do
    case $word in -std=metal4*) echo "invalid value" >&2; exit 1;; esac
    case $word in -I*) test -f "${word#-I}/mlx/backend/metal/kernels/utils.h" || exit 1;; esac
    case $word in *.metal) source=$word;; esac
done
! grep -n "not Metal" "$source" >&2
"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "compile_metal", ROOT / "tools" / "compile_metal.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "XCODES", tmp_path / "none")
    compiler = tmp_path / "bin" / "xcrun"
    compiler.parent.mkdir()
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(compiler.parent), prepend=":")
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "texts"
    place.mkdir()
    (place / "good.metal").write_text("kernel void good() {}\n")
    return place


def test_every_kernel_of_both_frameworks_is_written(tool: ModuleType) -> None:
    found = tool.texts()
    kinds = {name.split("_")[1] for name in found if name.startswith("mlx_")}
    assert kinds == {"weights", "block", "score", "step", "merge"} and "torch" in found
    mlx = [text for name, text in found.items() if name != "torch"]
    assert all(text.startswith(tool.MLX_HEADER) and tool.PREAMBLE not in text for text in mlx)


def test_accepted_texts(tool: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.compile_all(folder) == 0
    said = capsys.readouterr().out
    assert "metal3.2: 1 of 1 texts accepted" in said
    assert "metal4.0: not known to this compiler" in said
    assert "invalid value" in (folder / "compile.log").read_text()


def test_a_refused_text(tool: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bad.metal").write_text("this is not Metal\n")
    assert tool.compile_all(folder) == 1
    assert "REFUSED: bad.metal" in capsys.readouterr().out
    assert "this is not Metal" in (folder / "compile.log").read_text()


def test_a_missing_compiler(
    tool: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(tool, "STANDARDS", ("metal4.0",))
    assert tool.compile_all(folder) == 1
    assert "no compiler here knows metal3.1 and metal3.2" in capsys.readouterr().out
