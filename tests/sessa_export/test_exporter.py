"""Folders that `sessa export` writes: precisions, cache layouts, clients' files, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from support.export_clients import export_clients, need
from support.export_models import VARIANTS, lively_weights, small_config, write_checkpoint

import sessa_export.quantization
from sessa_cli.main import main
from sessa_common.checkpoint.folder import load_weights
from sessa_common.errors import SessaError
from sessa_common.reference import model as reference
from sessa_common.reference.parity import compare, make_cases, tolerance_of
from sessa_common.storage import MANIFEST
from sessa_export import native
from sessa_export.cache_layout import kv_layers, layer_pairs
from sessa_export.exporter import Options, export_checkpoint
from sessa_export.graph import build_model
from sessa_export.runtime import find_model, load_decoder
from sessa_export.runtime_configs import CLIENTS, PLAIN


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", small_config("grouped"))[0]


@pytest.fixture
def text(tmp_path: Path) -> tuple[str]:
    """A text of 960 bytes to measure perplexities on; the default one is longer."""
    (tmp_path / "text.txt").write_text("The rain fell in torrents. It was a dark night; " * 20)
    return (str(tmp_path / "text.txt"),)


def sessa(*arguments: object) -> None:
    """Run the command line; it must end well."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 0


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "variant, opset", [(variant, 21) for variant in VARIANTS] + [("hybrid", 23), ("grouped", 23)]
)
def test_buffer_layout(tmp_path: Path, variant: str, opset: int) -> None:
    config = small_config(variant, max_position_embeddings=700)
    checkpoint, weights = write_checkpoint(tmp_path / "checkpoint", config)
    export_checkpoint(checkpoint, tmp_path / "out", Options(layout="buffer", opset=opset))
    decoder = load_decoder(tmp_path / "out")
    tokens = np.random.default_rng(0).integers(0, 257, (2, 420))
    mask = np.ones(tokens.shape, np.int64)
    mask[1, :9] = 0
    # A single first token, several after a past, single ones, and a buffer that fills up.
    cuts = [0, 1, 2, 70, 71, 90, 400, *range(401, 421)]
    got = np.concatenate(
        [decoder.logits(tokens[:, a:b], mask[:, :b]) for a, b in pairwise(cuts)], axis=1
    )
    expected = reference.model_logits(config, weights, tokens, mask)
    difference = np.abs(got - expected)[mask > 0]
    assert difference.max() <= 1e-4 * np.abs(expected).max()
    assert [a.shape[2] for a in decoder.caches.arrays()] == [420] * len(decoder.caches.inputs)
    cache = reference.empty_cache(config, 2)
    reference.model_logits(config, weights, tokens, mask, cache=cache)
    for pair, name in enumerate(("k", "k_fb")[: len(layer_pairs(config, 0))]):
        want = getattr(cache.layers[0], name)
        want = want if name == "k" else want[:, None]
        seen = np.broadcast_to(mask[:, None, :, None] > 0, want.shape)
        kept = decoder.caches.arrays()[2 * pair]
        np.testing.assert_allclose(kept[seen], want[seen], atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_uniform_layout(tmp_path: Path, variant: str) -> None:
    config = small_config(variant)
    checkpoint, weights = write_checkpoint(tmp_path / "checkpoint", config)
    export_checkpoint(checkpoint, tmp_path / "out", Options(layout="uniform"))
    decoder = load_decoder(tmp_path / "out")
    first = (config.num_key_value_heads, config.head_dim)
    assert {(i.shape[1], i.shape[3]) for i in decoder.caches.inputs} == {first}
    tokens = np.random.default_rng(0).integers(0, 257, (2, 90))
    cuts = [(0, 1), (1, 70), (70, 89), (89, 90)]
    got = np.concatenate([decoder.logits(tokens[:, a:b]) for a, b in cuts], axis=1)
    expected = reference.model_logits(config, weights, tokens)
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("variant", "changes"),
    [("grouped", {}), ("options", {}), ("sessa_transformer", {"feedback_key_dim": 50})],
    ids=["whole-pairs", "narrow-keys", "wide-keys"],
)
def test_uniform_layout_holds_the_same_states(tmp_path: Path, variant: str, changes: dict) -> None:
    config = small_config(variant, **changes)
    checkpoint, weights = write_checkpoint(tmp_path / "checkpoint", config)
    export_checkpoint(checkpoint, tmp_path / "out", Options(layout="uniform"))
    decoder = load_decoder(tmp_path / "out")
    tokens = np.random.default_rng(0).integers(0, 257, (2, 20))
    decoder.logits(tokens)
    cache = reference.empty_cache(config, 2)
    reference.model_logits(config, weights, tokens, cache=cache)
    kept = decoder.cache_arrays()
    for i, layer in enumerate(cache.layers):
        for name in ("k_fb", "s") if config.kinds[i].feeds_back else ():
            np.testing.assert_allclose(kept[f"layers.{i}.{name}"], getattr(layer, name), atol=1e-4)
    decoder.restore_cache(kept)
    want = reference.model_logits(config, weights, tokens[:, :3], cache=cache)
    assert np.abs(decoder.logits(tokens[:, :3]) - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize(("dtype", "largest"), [("fp16", 0.6), ("int8", 0.55), ("int4", 0.5)])
@pytest.mark.parametrize(
    ("variant", "layout"), [("grouped", "natural"), ("untied", "natural"), ("grouped", "buffer")]
)
def test_dtypes(
    tmp_path: Path, text, dtype: str, largest: float, variant: str, layout: str
) -> None:
    config = small_config(variant)
    checkpoint, weights = write_checkpoint(tmp_path / "checkpoint", config)
    report = export_checkpoint(
        checkpoint, tmp_path / dtype, Options(dtype=dtype, data=text, layout=layout)
    )
    export_checkpoint(checkpoint, tmp_path / "fp32", Options(layout=layout))
    sizes = [(tmp_path / name / "model.onnx").stat().st_size for name in (dtype, "fp32")]
    assert sizes[0] < largest * sizes[1] + 60_000
    decoder = load_decoder(tmp_path / dtype)
    assert decoder.dtype == dtype
    # The quantisers need a head of its own.
    assert replace(decoder.config, tie_word_embeddings=config.tie_word_embeddings) == config
    (results,) = report.results.values()
    again = compare(decoder, make_cases(config, weights), tolerance_of(decoder))
    assert [r.difference for r in results] == pytest.approx([r.difference for r in again], rel=0.1)
    assert all(0 < r.difference <= r.tolerance for r in results)
    assert report.cost.tokens == 960
    assert 1 / 1.5 < report.cost.growth < 1.5
    assert report.cost.growth != 1


def test_dtypes_of_a_hybrid_for_every_client(tmp_path: Path, text) -> None:
    config = small_config("hybrid")
    checkpoint, _ = write_checkpoint(tmp_path / "checkpoint", config)
    for dtype in ("fp16", "int8", "int4"):
        options = Options(dtype=dtype, data=text, clients=CLIENTS, layout="uniform")
        report = export_checkpoint(checkpoint, tmp_path / dtype, options)
        assert all(result.ok for result in report.results["standard operators"])
        pairs = read(tmp_path / dtype / "genai_config.json")["model"]["decoder"]
        assert pairs["num_hidden_layers"] == 7
        assert load_decoder(tmp_path / dtype).config.kinds == config.kinds


def test_which_weights_are_stored_how(tmp_path: Path, checkpoint: Path, text) -> None:
    found = {}
    for dtype in ("fp16", "int8", "int4"):
        export_checkpoint(checkpoint, tmp_path / dtype, Options(dtype=dtype, data=text))
        model = onnx.load(tmp_path / dtype / "model.onnx")
        assert {f.name for f in model.functions} == {"FeedbackSolve"}
        kinds = [t.data_type for t in model.graph.initializer if np.prod(t.dims) >= 1000]
        found[dtype] = (set(kinds), [node.op_type for node in model.graph.node])
    assert found["fp16"][0] == {TensorProto.FLOAT16}
    assert found["int8"][0] == found["int4"][0] == {TensorProto.FLOAT16, TensorProto.UINT8}
    # Four products in each of two layers, and the head.
    assert found["int8"][1].count("MatMulInteger") == 9
    assert found["int4"][1].count("MatMulNBits") == 9


def test_perplexity_is_that_of_the_given_text(tmp_path: Path, checkpoint: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A text of my own.")
    report = export_checkpoint(
        checkpoint, tmp_path / "out", Options(dtype="int4", data=(str(text),))
    )
    assert report.cost.tokens == len("A text of my own.")
    decoder, full = load_decoder(tmp_path / "out"), np.array([[256, *b"A text of my own."]])
    logits = decoder.logits(full[:, :-1])[0].astype(np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - logits[range(len(logits)), full[0, 1:]]
    assert report.cost.exported == pytest.approx(np.exp(losses.mean()), rel=1e-5)


def test_an_export_that_costs_too_much_is_refused(tmp_path: Path, text, monkeypatch) -> None:
    config = small_config("grouped")
    checkpoint, _ = write_checkpoint(tmp_path / "checkpoint", config)
    monkeypatch.setattr(sessa_export.perplexity, "MOST_GROWTH", {"int4": 0.5})
    with pytest.raises(SessaError, match=r"int4 raises the perplexity from .* nothing was written"):
        export_checkpoint(checkpoint, tmp_path / "out", Options(dtype="int4", data=text))
    monkeypatch.undo()
    honest = sessa_export.quantization._to_half
    monkeypatch.setattr(sessa_export.quantization, "_to_half", lambda v, n: 0 * honest(v, n))
    with pytest.raises(SessaError, match="logits differ"):
        export_checkpoint(checkpoint, tmp_path / "out", Options(dtype="fp16", data=text))
    assert not (tmp_path / "out").exists()


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    config = small_config()
    weights = lively_weights(config)
    weights["model.embed_tokens.weight"][3, 5] = 1e6
    checkpoint, _ = write_checkpoint(tmp_path / "checkpoint", config, weights)
    with pytest.raises(SessaError, match=r"embed_tokens\.weight holds 1e\+06, which float16"):
        export_checkpoint(checkpoint, tmp_path / "out", Options(dtype="fp16"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_files_of_every_client(tmp_path: Path) -> None:
    checkpoint, out = export_clients(tmp_path, sharp=1, dtype="int8")
    config = load_weights(checkpoint)[0]
    pairs = len(kv_layers(config))
    assert find_model(out) == out / "onnx" / "model_quantized.onnx"
    genai = read(out / "genai_config.json")["model"]
    assert genai["decoder"]["filename"] == "onnx/model_quantized.onnx"
    assert genai["decoder"]["num_hidden_layers"] == pairs
    assert "custom_ops_library" not in genai["decoder"]["session_options"]
    assert genai["eos_token_id"] == [256]
    llama = read(out / "config.json")
    assert (llama["model_type"], llama["num_hidden_layers"]) == ("llama", pairs)
    web = read(out / "web.json")
    assert web["bytes"] == find_model(out).stat().st_size
    assert web["parameters"] == sum(w.size for w in load_weights(checkpoint)[1].values())
    assert (web["context"], web["stop"], web["begin"]) == (300, [256], 256)
    assert load_decoder(out).config == config


def test_only_what_was_asked_for(tmp_path: Path, checkpoint: Path) -> None:
    always = {
        "model.onnx",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        MANIFEST,
    }
    expected = {"ort": set(), "genai": {"genai_config.json"}, "web": {"web.json"}}
    for client, files in expected.items():
        export_checkpoint(checkpoint, tmp_path / client, Options(clients=(client,)))
        assert {f.name for f in (tmp_path / client).iterdir()} == always | files
        assert "auto_map" not in read(tmp_path / client / "config.json")
    assert "auto_map" in read(checkpoint / "config.json")


def test_checkpoints_without_text_tools(tmp_path: Path, checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    for client in sorted(set(CLIENTS) - PLAIN):
        with pytest.raises(SessaError, match=rf"no tokenizer\.json, which {client} needs"):
            export_checkpoint(checkpoint, tmp_path / "out", Options(clients=(client,)))
    assert export_checkpoint(checkpoint, tmp_path / "out", Options(dtype="int8")).cost is None
    config = small_config(eos_token_id=None)
    other, _ = write_checkpoint(tmp_path / "other", config)
    (other / "generation_config.json").unlink()
    with pytest.raises(SessaError, match="no eos_token_id"):
        export_checkpoint(other, tmp_path / "two", Options(clients=("genai",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int2"}, "dtype is 'int2', expected one of fp32"),
        ({"layout": "flat"}, "layout is 'flat', expected one of natural"),
        ({"clients": ("ort", "phone")}, "client is 'phone', expected some of ort"),
        ({"dtype": "int8", "data": ("nowhere.txt",)}, r"nowhere\.txt"),
        ({"layout": "buffer", "clients": ("genai",)}, "for this project's runner"),
        ({"clients": ("web",), "external_data_bytes": 10}, "too large for a page"),
    ],
)
def test_bad_options(tmp_path: Path, checkpoint: Path, options: dict, message: str) -> None:
    with pytest.raises(SessaError, match=message):
        export_checkpoint(checkpoint, tmp_path / "out", Options(**options))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_model_of_others_is_refused(tmp_path: Path) -> None:
    model = build_model(small_config(), lively_weights(small_config()))
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(SessaError, match="was not written by `sessa export`"):
        load_decoder(tmp_path)


def test_command(tmp_path: Path, checkpoint: Path, capsys) -> None:
    out = tmp_path / "out"
    asked = ["export", str(checkpoint), str(out), "--dtype", "int4", "--for", "genai, web"]
    sessa(*asked, "--layout", "uniform", "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    assert told["perplexity"]["growth"] == pytest.approx(
        told["perplexity"]["exported"] / told["perplexity"]["fp32"]
    )
    assert (out / "genai_config.json").is_file()
    sessa(*asked, "--force")
    assert "Perplexity on 8,192 tokens of pydoc" in capsys.readouterr().out
    sessa("check", checkpoint, "--export", out, "--json")
    assert json.loads(capsys.readouterr().out)["ok"]


def test_native_library_beside_the_model(tmp_path: Path, checkpoint: Path, capsys) -> None:
    try:
        native.find_compiler()
    except SessaError as error:
        need(None, "a C++ compiler", str(error))
    out = tmp_path / "out"
    sessa("export", checkpoint, out, "--native", "--for", "genai", "--json")
    told = json.loads(capsys.readouterr().out)
    assert set(told["runs"]) == {"standard operators", "native operator"}
    assert (out / native.library_name()).read_bytes() == native.build().read_bytes()
    sessa("generate", out, "--prompt", "A", "--max-tokens", "3", "--native", "--json")
    assert json.loads(capsys.readouterr().out)["texts"][0]["tokens"] >= 1
    (out / native.library_name()).write_bytes(b"not a library")
    load_decoder(out, native=True)
    with pytest.raises(SystemExit):
        main(["generate", str(checkpoint), "--native"])
    assert "--native is for a folder that" in capsys.readouterr().err
