"""Damaged files of every kind are read or refused in one line: a sample of `make fuzz`."""

import subprocess
import sys
from pathlib import Path

import pytest

COUNT = 250


@pytest.mark.skipif(sys.platform != "linux", reason="the fuzzer limits memory as Linux does")
def test_damaged_files_are_read_or_refused_in_one_line():
    pytest.importorskip("torch")
    pytest.importorskip("pyarrow")
    pytest.importorskip("onnx")
    script = Path(__file__).parent / "reading.py"
    done = subprocess.run(
        [sys.executable, str(script), "--count", str(COUNT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + done.stdout[-1000:]
    assert f"{COUNT} cases" in done.stdout


@pytest.mark.parametrize("name", ["type_of_column.parquet"])
def test_a_file_that_once_ended_the_process_is_read_or_refused(name):
    pytest.importorskip("pyarrow")
    reads = (
        "import sys; from pathlib import Path; from sessa_common.data.formats import read_rows\n"
        "from sessa_common.errors import SessaError\n"
        "try: list(read_rows(Path(sys.argv[1]), 'story'))\n"
        "except SessaError: pass"
    )
    path = Path(__file__).parent / "found" / name
    done = subprocess.run([sys.executable, "-c", reads, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
