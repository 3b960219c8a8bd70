"""The check of the wheel notices a missing file, a stray one and a tag of another version."""

from __future__ import annotations

import zipfile
from pathlib import Path

import check_wheel
import pytest

VERSION = check_wheel.PYPROJECT["project"]["version"]


def publish(folder: Path, names: set[str], version: str = VERSION) -> Path:
    """A folder with a wheel of these files and a source distribution."""
    with zipfile.ZipFile(folder / f"sessa_toolchain-{version}-py3-none-any.whl", "w") as wheel:
        for name in names | {f"sessa_toolchain-{version}.dist-info/METADATA"}:
            wheel.writestr(name, "")
    (folder / f"sessa_toolchain-{version}.tar.gz").touch()
    return folder


@pytest.fixture(scope="module")
def whole() -> set[str]:
    return check_wheel.expected_files()


def test_what_must_be_in_it(whole: set[str]) -> None:
    assert {
        "sessa_common/kernels/feedback_solve.metal",
        "sessa_export/ort_op/operator.cpp",
        "sessa_torch/py.typed",
        "sessa_cli/main.py",
    } <= whole
    assert not [name for name in whole if "__pycache__" in name or name.startswith("tests")]


def test_a_whole_wheel(tmp_path: Path, whole: set[str]) -> None:
    assert check_wheel.faults(publish(tmp_path, whole), f"v{VERSION}") == []


def test_a_missing_and_a_stray_file(tmp_path: Path, whole: set[str]) -> None:
    metal = "sessa_common/kernels/feedback_solve.metal"
    found = check_wheel.faults(publish(tmp_path, whole - {metal} | {"tests/x.py"}), None)
    assert found == [f"missing in the wheel: {metal}", "only in the wheel: tests/x.py"]


def test_another_version(tmp_path: Path, whole: set[str]) -> None:
    found = check_wheel.faults(publish(tmp_path, whole, "9.9"), "v9.9")
    assert len(found) == 3 and all(VERSION in fault for fault in found)


def test_nothing_built(tmp_path: Path) -> None:
    assert "0 wheels and 0 .tar.gz" in check_wheel.faults(tmp_path, None)[0]
