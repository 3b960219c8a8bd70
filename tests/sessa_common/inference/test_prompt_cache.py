"""Prompt caches: what a file continues, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from support.export_models import lively_weights, small_config, write_checkpoint

import sessa_export.runtime
import sessa_mlx.decoding
import sessa_torch.decoding
from sessa_common.checkpoint.folder import read_safetensors, write_safetensors
from sessa_common.data.tokenizer import byte_tokenizer, train_bpe
from sessa_common.errors import SessaError
from sessa_common.inference.prompt_cache import (
    CacheOwner,
    cache_owner,
    load_prompt_cache,
    save_prompt_cache,
)
from sessa_common.inference.sampling import SamplingConfig
from sessa_export.exporter import Options, export_checkpoint

GREEDY = SamplingConfig(temperature=0)
TEXT = list(b"A prompt cache keeps what a model has read of a text.")
OWNER = CacheOwner(model="a" * 64, tokenizer="b" * 64)
CONFIG = small_config("untied", num_key_value_heads=2)
HYBRID = small_config("untied", layer_kinds=("sessa", "mamba2"), mamba_d_state=12, mamba_d_head=16)
DTYPES = ("float32", "bfloat16", "float16", "float64")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("prompt_cache")
    found = {
        "sessa": write_checkpoint(root / "sessa", CONFIG)[0],
        "hybrid": write_checkpoint(root / "hybrid", HYBRID)[0],
    }
    for layout in ("natural", "uniform", "buffer"):
        found[layout] = root / layout
        export_checkpoint(found["sessa"], found[layout], Options(layout=layout))
    return found


def open_decoder(folders: dict[str, Path], runtime: str, dtype: str = "float32"):
    if runtime in folders:
        return sessa_export.runtime.load_decoder(folders[runtime])
    framework, kind = runtime.split("-")
    module = {"torch": sessa_torch.decoding, "mlx": sessa_mlx.decoding}[framework]
    return module.load_decoder(folders[kind], dtype=dtype)


RUNTIMES = [
    "torch-sessa",
    "torch-hybrid",
    "mlx-sessa",
    "mlx-hybrid",
    "natural",
    "uniform",
    "buffer",
]
CASES = [
    *((runtime, "float32") for runtime in RUNTIMES),
    *((f"{name}-sessa", dtype) for name in ("torch", "mlx") for dtype in ("bfloat16", "float16")),
    ("torch-sessa", "float64"),
]


@pytest.mark.parametrize(("runtime", "dtype"), CASES)
def test_a_loaded_cache_continues_bit_for_bit(runtime, dtype, folders, tmp_path) -> None:
    decoder = open_decoder(folders, runtime, dtype)
    decoder.feed(np.array([TEXT]))
    save_prompt_cache(tmp_path / "a.safetensors", decoder, TEXT, OWNER)
    arrays = decoder.cache_arrays()
    pieces = [np.array([list(b" It")]), np.array([[7]]), np.array([[8]])]
    want = [decoder.logits(piece) for piece in pieces]
    other = open_decoder(folders, runtime, dtype)
    assert load_prompt_cache(tmp_path / "a.safetensors", other, OWNER) == TEXT
    found = other.cache_arrays()
    assert found.keys() == arrays.keys()
    assert all(found[name].tobytes() == arrays[name].tobytes() for name in arrays)
    for piece, logits in zip(pieces, want, strict=True):
        np.testing.assert_array_equal(other.logits(piece), logits)


def test_every_runtime_continues_the_cache_of_another(folders, tmp_path) -> None:
    decoders = [open_decoder(folders, name) for name in RUNTIMES if "hybrid" not in name]
    decoders[0].feed(np.array([TEXT]))
    save_prompt_cache(tmp_path / "a.safetensors", decoders[0], TEXT, OWNER)
    want = decoders[0].step(np.array([[7]]))
    for decoder in decoders[1:]:
        load_prompt_cache(tmp_path / "a.safetensors", decoder, OWNER)
        np.testing.assert_allclose(decoder.step(np.array([[7]])), want, rtol=0, atol=1e-4)


@pytest.fixture
def saved(folders, tmp_path):
    """A decoder that has read nothing, and the file of another one's cache."""
    decoder = open_decoder(folders, "torch-sessa")
    decoder.feed(np.array([TEXT]))
    path = tmp_path / "prompt.safetensors"
    save_prompt_cache(path, decoder, TEXT, OWNER)
    decoder.reset()
    return decoder, path


def change(path: Path, metadata: dict | None = None, **arrays: np.ndarray) -> None:
    """Write the file anew with other metadata or arrays; None leaves one out."""
    with safe_open(str(path), framework="np") as file:
        given = {**file.metadata(), **(metadata or {})}
    found = {**read_safetensors(path), **arrays}
    found = {name: array for name, array in found.items() if array is not None}
    write_safetensors(path, found, {k: v for k, v in given.items() if v is not None})


IDS = np.array(TEXT, np.int64)
WRONG = {
    "no prompt cache": ({"sessa_prompt_cache": None}, {}, "is no prompt cache"),
    "format": ({"sessa_prompt_cache": "2"}, {}, "format 2, expected 1"),
    "model": ({"model": "c" * 64}, {}, "the prompt cache of another model"),
    "tokenizer": ({"tokenizer": "c" * 64}, {}, "the prompt cache of another tokenizer"),
    "no ids": ({}, {"tokens": None}, "no array `tokens` of ids"),
    "ids of floats": ({}, {"tokens": IDS.astype(np.float32)}, "no array `tokens` of ids"),
    "unknown id": ({}, {"tokens": IDS + 257}, r"out of range 0\.\.256"),
    "too few ids": ({}, {"tokens": IDS[:-1]}, "has 53 positions for 52 tokens"),
    "too many ids": ({}, {"tokens": np.append(IDS, [1, 2])}, "has 53 positions for 55 tokens"),
    "longer than the context": (
        {},
        {"tokens": np.resize(IDS, 301)},
        "has 301 tokens, but the model reads at most 300",
    ),
    "no mask": ({}, {"mask": None}, "one text without padding"),
    "padding": ({}, {"mask": np.arange(53)[None] > 2}, "one text without padding"),
    "no array": ({}, {"layers.1.s": None}, r"of another model: layers\.1\.s is missing"),
    "one array more": ({}, {"layers.2.s": IDS}, r"layers\.2\.s does not belong"),
    "shape": ({}, {"layers.0.k": np.zeros((1, 4, 53, 10), np.float32)}, r"layers\.0\.k has shape"),
    "dtype": ({}, {"layers.0.k": np.zeros((1, 2, 53, 10))}, r"another dtype: layers\.0\.k is"),
}


@pytest.mark.parametrize(("metadata", "arrays", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_cache_is_refused_and_changes_nothing(saved, metadata, arrays, message) -> None:
    decoder, path = saved
    decoder.feed(np.array([TEXT[:5]]))
    change(path, metadata, **arrays)
    with pytest.raises(SessaError, match=f"^{path}: .*{message}"):
        load_prompt_cache(path, decoder, OWNER)
    assert decoder.length == 5


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_cache_is_refused(saved, share: float) -> None:
    decoder, path = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(SessaError, match="not a readable safetensors file"):
        load_prompt_cache(path, decoder, OWNER)
    assert decoder.length == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_a_cache_of_another_dtype_is_refused(saved, folders, dtype: str) -> None:
    other = open_decoder(folders, "torch-sessa", dtype)
    with pytest.raises(SessaError, match=f"is float32, expected {dtype}"):
        load_prompt_cache(saved[1], other, OWNER)


def test_a_batch_or_a_half_read_text_is_not_saved(folders, tmp_path) -> None:
    decoder = open_decoder(folders, "torch-sessa")
    path = tmp_path / "a.safetensors"
    with pytest.raises(SessaError, match="the cache has 0 positions and the text 0 tokens"):
        save_prompt_cache(path, decoder, [], OWNER)
    decoder.feed(np.array([TEXT, TEXT]))
    with pytest.raises(SessaError, match="one text without padding"):
        save_prompt_cache(path, decoder, TEXT, OWNER)
    decoder.keep([1])
    with pytest.raises(SessaError, match="has 53 positions and the text 55 tokens"):
        save_prompt_cache(path, decoder, [*TEXT, 1, 2], OWNER)
    assert list(tmp_path.iterdir()) == []
    save_prompt_cache(path, decoder, [*TEXT, 1], OWNER)
    assert load_prompt_cache(path, decoder, OWNER) == [*TEXT, 1]


def test_the_owner_knows_weights_configuration_and_tokenizer(folders, tmp_path) -> None:
    tokenizer = byte_tokenizer()
    owner = cache_owner(folders["sessa"], CONFIG, tokenizer)
    assert owner == cache_owner(folders["sessa"], CONFIG, byte_tokenizer())
    (folders["sessa"] / "sessa_manifest.json").rename(tmp_path / "manifest")
    assert owner == cache_owner(folders["sessa"], CONFIG, tokenizer)  # hashed, not looked up
    (tmp_path / "manifest").rename(folders["sessa"] / "sessa_manifest.json")
    others = [
        cache_owner(folders["sessa"], dataclasses.replace(CONFIG, rope_theta=500.0), tokenizer),
        cache_owner(folders["hybrid"], CONFIG, tokenizer),
        cache_owner(folders["natural"], CONFIG, tokenizer, folders["natural"].glob("model.onnx")),
    ]
    weights = lively_weights(CONFIG)
    weights["lm_head.weight"][0, 0] += 1
    changed, _ = write_checkpoint(tmp_path / "changed", CONFIG, weights)
    others.append(cache_owner(changed, CONFIG, tokenizer))
    assert len({owner.model, *(other.model for other in others)}) == 5
    bpe = cache_owner(folders["sessa"], CONFIG, train_bpe(["some text"], 257))
    assert bpe.model == owner.model and bpe.tokenizer != owner.tokenizer
