"""Conversion of models that are larger than memory, and files that are written tensor by tensor."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from sessa_common.checkpoint.adapters import adapter_config, lora_shapes, write_adapter
from sessa_common.checkpoint.folder import (
    load_config,
    map_safetensors,
    read_safetensors,
    write_safetensors,
)
from sessa_common.checkpoint.lazy_tensors import LazyTensors, Spec, spec_of
from sessa_common.checkpoint.sources import read_source
from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError

SIZES = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": [3, 5],
}
SIZES_8B = {
    **SIZES,
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
# The model has 35 MB, 69 MB in float32; its largest tensor has 4 MB in float32.
LIMIT = 40 * 2**20
CONVERT = """
import resource, sys
from pathlib import Path
import numpy
from sessa_common.checkpoint.conversion import convert
numpy.ones((256, 256)) @ numpy.ones((256, 256))  # the library's workspace does not grow
used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[4]),) * 2)
convert(sys.argv[1], sys.argv[2], feedback="all", feedback_key_dim=64, **eval(sys.argv[3]))
"""


def llama_shapes(sizes: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a Llama of these sizes."""
    D, F, V = (sizes[f"{name}_size"] for name in ("hidden", "intermediate", "vocab"))
    kv = D * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    attention = {"q": (D, D), "k": (kv, D), "v": (kv, D), "o": (D, D)}
    inner = {"gate": (F, D), "up": (F, D), "down": (D, F)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for i in range(sizes["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{k}_proj.weight": shape for k, shape in attention.items()}
        shapes |= {f"{layer}.mlp.{k}_proj.weight": shape for k, shape in inner.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{name}.weight"] = (D,)
    shapes["model.norm.weight"] = (D,)
    return shapes if sizes["tie_word_embeddings"] else {**shapes, "lm_head.weight": (V, D)}


def write_model(folder: Path) -> None:
    """A Llama of 17 million parameters, all its matrices cut from one block of random numbers."""
    bfloat16, shapes = ml_dtypes.bfloat16, llama_shapes(SIZES)
    block = np.random.default_rng(0).normal(0, 0.02, max(map(math.prod, shapes.values())))
    block = block.astype(bfloat16)
    tensors = {name: np.ones(shape, bfloat16) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if len(shape) == 2:
            tensors[name] = block[: math.prod(shape)].reshape(shape)
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(SIZES))


def write_sparse_model(folder: Path, sizes: dict[str, Any]) -> None:
    """A Llama of zeros, whose file takes no room on the disk."""
    header, end = {}, 0
    for name, shape in llama_shapes(sizes).items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(sizes))


def write_adapter_of(config: SessaConfig, folder: Path) -> None:
    """An adapter with LoRA of rank 2 in every linear layer."""
    shapes = lora_shapes(config, 2)
    folder.mkdir()
    write_adapter(
        folder, {name: np.full(shape, 0.01, np.float32) for name, shape in shapes.items()}
    )
    settings = adapter_config(list(shapes), "model", 2, 4.0)
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def convert_within(folder: Path, options: str, limit: int) -> None:
    """Convert folder/model to folder/out in another process that may get so many bytes."""
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, "model", "out", options, str(limit)],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-2000:]


linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit is Linux's")


@linux
@pytest.mark.parametrize(
    "options",
    [
        "dict(dtype='float32', merge='adapter')",
        pytest.param("dict(bits=4)", marks=pytest.mark.slow),
    ],
)
def test_a_model_converts_in_less_memory_than_it_has_bytes(tmp_path, options):
    write_model(tmp_path / "model")
    write_adapter_of(read_source(tmp_path / "model").config, tmp_path / "adapter")
    convert_within(tmp_path, options, LIMIT)
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert ends == {"eos_token_id": [3, 5]}


@linux
@pytest.mark.slow
@pytest.mark.parametrize("options", ["{}", "dict(bits=4)"])
def test_a_model_of_8_billion_parameters_converts_in_4_gib(tmp_path, options):
    if shutil.disk_usage(tmp_path).free < 20e9:
        pytest.skip("the model needs 17 GB on the disk")
    write_sparse_model(tmp_path / "model", SIZES_8B)
    try:
        convert_within(tmp_path, options, 4 * 2**30)
        assert load_config(tmp_path / "out").feeds_back
    finally:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_written_bytes_are_those_of_the_library(tmp_path):
    tensors = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.ones(3, ml_dtypes.bfloat16),
        "words é": np.arange(5, dtype=np.uint32),
        "scalar": np.float32(2.5).reshape(()),
        "none": np.zeros((0, 4), np.int64),
        "turned": np.arange(6, dtype=np.float16).reshape(2, 3).T,
    }
    write_safetensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    whole = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in tensors.items()}
    assert (tmp_path / "x.safetensors").read_bytes() == save(whole, {"format": "pt"})
    read, mapped = (f(tmp_path / "x.safetensors") for f in (read_safetensors, map_safetensors))
    assert read.keys() == mapped.keys() == tensors.keys()
    for name, value in tensors.items():
        assert mapped[name].dtype == value.dtype
        np.testing.assert_array_equal(mapped[name], value)


def test_a_damaged_file_is_not_mapped(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\x08" + b"\0" * 7 + b"{}      \0")
    with pytest.raises(SessaError, match="not a readable safetensors file"):
        map_safetensors(tmp_path / "x.safetensors")


def test_lazy_tensors_are_made_when_they_are_read():
    made = []
    tensors = LazyTensors({"there": np.ones(2)})
    tensors.defer("later", Spec((3,), np.dtype(np.int8)), lambda: made.append(1) or np.ones(3))
    assert spec_of(tensors, "later").nbytes == 3 and "later" in tensors and not made
    assert list(tensors) == ["there", "later"]
    copy = LazyTensors(tensors)
    copy["there"] = np.zeros(2)
    del copy["later"]
    assert "later" in tensors and tensors["there"].sum() == 2
    assert tensors["later"].shape == (3,) and made == [1]
