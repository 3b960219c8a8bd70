"""Tensors of a source that are not plain numbers are named, never a traceback."""

import json
import os
import struct

import pytest

from sessa_common.checkpoint.folder import read_safetensors
from sessa_common.checkpoint.import_weights import read_arrays
from sessa_common.errors import SessaError
from sessa_common.inspection import read_headers


def write_safetensors_header(path, dtype, shape, size):
    header = {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(size))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4"])
def test_types_that_numpy_lacks_are_named(dtype, tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors_header(path, dtype, [8], 4 if dtype == "F4" else 8)
    with pytest.raises(SessaError, match=r"x\.safetensors: not a readable safetensors file"):
        read_safetensors(path)


@pytest.mark.parametrize("read", [read_safetensors, read_headers])
def test_a_shape_that_no_array_has_is_named(read, tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors_header(path, "F32", [2**63, 0], 0)
    with pytest.raises(SessaError, match=r"x\.safetensors: "):
        read(path)


@pytest.mark.parametrize("read", [read_safetensors, read_headers])
def test_a_pipe_is_not_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(SessaError, match="expected a file, found a pipe"):
        read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("kind", ["float8", "sparse", "meta", "repeated"])
def test_pytorch_tensors_that_are_no_plain_numbers_are_named(kind, tmp_path):
    torch = pytest.importorskip("torch")
    tensor = {
        "float8": lambda: torch.ones(4).to(torch.float8_e4m3fn),
        "sparse": lambda: torch.eye(3).to_sparse(),
        "meta": lambda: torch.ones(3, device="meta"),
        "repeated": lambda: torch.ones(1).expand(2**40),
    }[kind]()
    torch.save({"ln.weight": tensor}, tmp_path / "x.pt")
    with pytest.raises(SessaError, match=r"x\.pt: ln\.weight (is|repeats)"):
        read_arrays(tmp_path / "x.pt")
