"""The exported graph and folder, and the runner, against the float64 reference."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from support.export_models import MAMBA, VARIANTS, lively_weights, small_config, write_checkpoint

import sessa_export.exporter
import sessa_export.graph_attention
from sessa_common.checkpoint.folder import load_weights
from sessa_common.errors import SessaError
from sessa_common.inference.generation import left_pad
from sessa_common.reference import model as reference
from sessa_common.storage import MANIFEST, new_folder
from sessa_export.cache_layout import kv_layers
from sessa_export.exporter import Options, export_checkpoint
from sessa_export.graph import OPSETS, build_model, save_model
from sessa_export.runtime import load_decoder

PLAIN = (
    "grouped",
    "single_head",
    "norope",
    "weak_gamma",
    "attention",
    "hybrid",
    "sessa_transformer",
    "options",
)


@pytest.fixture(
    scope="module",
    params=[(name, 23) for name in VARIANTS] + [(name, 21) for name in PLAIN],
    ids=lambda given: f"{given[0]}-{given[1]}",
)
def exported(request, tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint folder and its export: each variant of the architecture, and older operators."""
    variant, opset = request.param
    folder = tmp_path_factory.mktemp(variant)
    checkpoint, _ = write_checkpoint(folder / "checkpoint", small_config(variant))
    export_checkpoint(checkpoint, folder / "exported", Options(opset=opset))
    return checkpoint, folder / "exported"


def batch(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 257, n).tolist() for n in lengths]


def assert_logits(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("T", [1, 2, 63, 130])
def test_prefill(exported, T: int) -> None:
    tokens, _ = left_pad(batch((T, T)))
    config, weights = load_weights(exported[0])
    got = load_decoder(exported[1]).logits(tokens)
    assert_logits(got, reference.model_logits(config, weights, tokens))


def test_chunks_and_decode(exported) -> None:
    tokens, _ = left_pad(batch((90, 90)))
    config, weights = load_weights(exported[0])
    decoder = load_decoder(exported[1])
    cuts = [0, 3, 70, 71, 72, 85, *range(86, 91)]
    pieces = [decoder.logits(tokens[:, a:b]) for a, b in pairwise(cuts)]
    cache = reference.empty_cache(config, 2)
    expected = reference.model_logits(config, weights, tokens, cache=cache)
    assert_logits(np.concatenate(pieces, axis=1), expected)
    wanted = []
    for layer, kind in zip(cache.layers, config.kinds, strict=True):
        wanted += [layer.k, layer.v]
        if kind.feeds_back:
            wanted += [layer.k_fb[:, None], layer.s[:, None]]
    for got, want in zip(decoder.caches.arrays(), wanted, strict=True):
        assert_logits(got, want)


def test_uneven_batch_equals_single_prompts(exported) -> None:
    prompts, following = batch((70, 9, 1)), batch((4, 4, 4), seed=1)
    config, weights = load_weights(exported[0])
    decoder = load_decoder(exported[1])
    got = [decoder.step(*left_pad(prompts))]
    got += [decoder.step(np.array(column)[:, None]) for column in zip(*following, strict=True)]
    for row, (prompt, more) in enumerate(zip(prompts, following, strict=True)):
        alone = reference.model_logits(config, weights, np.array([prompt + more]))[0]
        assert_logits(np.stack(got)[:, row], alone[len(prompt) - 1 :])


def test_right_padding_leaves_holes(exported) -> None:
    prompt, more = batch((12, 5))
    config, weights = load_weights(exported[0])
    tokens = np.array([prompt + [0] * 7])
    mask = np.array([[1] * 12 + [0] * 7])
    decoder = load_decoder(exported[1])
    got = [decoder.logits(tokens, mask)[0, :12]]
    got += [decoder.step(np.array([[token]])) for token in more]
    expected = reference.model_logits(config, weights, np.array([prompt + more]))[0]
    assert_logits(np.concatenate(got), expected)


@pytest.mark.parametrize("dummy", [0, np.nan, np.inf, 3e38])
def test_masked_dummy_past_is_no_past(exported, dummy: float) -> None:
    prompt, more = batch((10, 3))
    config, weights = load_weights(exported[0])
    session = load_decoder(exported[1]).session
    feed = {"input_ids": np.array([prompt]), "attention_mask": np.array([[0] + [1] * 10])}
    for j, (heads, *widths) in enumerate(kv_layers(config)):
        for part, width in zip(("key", "value"), widths, strict=True):
            feed[f"past_key_values.{j}.{part}"] = np.full((1, heads, 1, width), dummy, np.float32)
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, feed), strict=True))
    logits = [found["logits"][0]]
    for token in more:
        past = {n.replace("present", "past_key_values"): found[n] for n in names if n != "logits"}
        mask = np.array([[0] + [1] * past["past_key_values.0.key"].shape[2]])
        feed = {"input_ids": np.array([[token]]), "attention_mask": mask, **past}
        found = dict(zip(names, session.run(None, feed), strict=True))
        logits.append(found["logits"][0])
    expected = reference.model_logits(config, weights, np.array([prompt + more]))[0]
    assert_logits(np.concatenate(logits), expected)


HYBRID_PAIRS = {
    "natural": [(2, 10), (1, 40), (2, 10), (2, 10), (1, 40)],
    "buffer": [(2, 10), (1, 40), (2, 10), (2, 10), (1, 40)],
    "uniform": [(2, 10)] * 7,
}


@pytest.mark.parametrize("layout", HYBRID_PAIRS)
def test_caches_follow_each_layer(layout: str) -> None:
    config = small_config("hybrid")
    model = build_model(config, lively_weights(config), layout=layout)
    shapes = {i.name: [d.dim_value or d.dim_param for d in i.type.tensor_type.shape.dim]
              for i in model.graph.input}  # fmt: skip
    for j, (heads, width) in enumerate(HYBRID_PAIRS[layout]):
        rows = [shapes.pop(f"past_key_values.{j}.{part}") for part in ("key", "value")]
        # In the natural numbering, 1 and 4 are the pairs of feedback rows.
        spare = "_plus_1" if layout == "buffer" and j in (1, 4) else ""
        assert rows == [["batch_size", heads, f"past_sequence_length{s}", width]
                        for s in (spare, "")]  # fmt: skip
    assert set(shapes) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("variant", ["attention", "attention_gated"])
def test_a_graph_without_feedback_has_no_trace_of_the_operator(variant: str) -> None:
    config = small_config(variant)
    model = build_model(config, lively_weights(config))
    assert {item.domain for item in model.opset_import} == {""}
    assert not model.functions and not any(node.domain for node in model.graph.node)


@pytest.mark.parametrize("variant", MAMBA)
def test_mamba2_is_refused_before_anything_is_written(tmp_path: Path, variant: str) -> None:
    config = small_config(variant)
    checkpoint, weights = write_checkpoint(tmp_path / "checkpoint", config)
    with pytest.raises(SessaError, match=r"layer \d is mamba2, which ONNX export does not support"):
        export_checkpoint(checkpoint, tmp_path / "deep" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    with pytest.raises(SessaError, match="not support"):
        build_model(config, weights)


@pytest.mark.parametrize("opset", OPSETS)
def test_interface_of_the_graph(tmp_path: Path, opset: int) -> None:
    config = small_config("grouped")
    checkpoint, _ = write_checkpoint(tmp_path / "checkpoint", config)
    export_checkpoint(checkpoint, tmp_path / "out", Options(opset=opset))
    model = onnx.load(tmp_path / "out" / "model.onnx")
    assert model.ir_version <= 10
    assert {item.domain: item.version for item in model.opset_import} == {"": opset, "sessa": 1}
    assert [n.op_type for n in model.graph.node if n.domain] == ["FeedbackSolve"] * 2
    assert {f.name for f in model.functions} == {"FeedbackSolve"}
    session = onnxruntime.InferenceSession(model.SerializeToString())
    shapes = {i.name: i.shape for i in [*session.get_inputs(), *session.get_outputs()]}
    past, total = "past_sequence_length", "total_sequence_length"
    assert shapes.pop("input_ids") == ["batch_size", "sequence_length"]
    assert shapes.pop("attention_mask") == ["batch_size", total]
    assert shapes.pop("logits") == ["batch_size", "sequence_length", 257]
    for j, (heads, width) in enumerate([(2, 10), (1, 40)] * 2):
        for part in ("key", "value"):
            got = [shapes.pop(f"past_key_values.{j}.{part}"), shapes.pop(f"present.{j}.{part}")]
            assert got == [["batch_size", heads, axis, width] for axis in (past, total)]
    assert not shapes


def test_folder_holds_what_goes_with_the_model(exported) -> None:
    checkpoint, out = exported
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in out.iterdir()} == {"model.onnx", MANIFEST, *names}
    for name in names - {"config.json"}:
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes()
    ours, keys = (json.loads((f / "config.json").read_text()) for f in (out, checkpoint))
    # What names the code files of the checkpoint's clients stays with those files.
    assert ours == {name: keys[name] for name in keys.keys() - {"auto_map", "model_file"}}


def test_large_weights_become_external_data(tmp_path: Path) -> None:
    checkpoint, _ = write_checkpoint(tmp_path / "checkpoint", small_config("untied"))
    export_checkpoint(checkpoint, tmp_path / "one")
    export_checkpoint(checkpoint, tmp_path / "two", Options(external_data_bytes=100_000))
    assert not (tmp_path / "one" / "model.onnx_data").exists()
    assert (tmp_path / "two" / "model.onnx_data").stat().st_size > 100_000
    assert (tmp_path / "two" / "model.onnx").stat().st_size < 100_000
    tokens, _ = left_pad(batch((20,)))
    one, two = (load_decoder(tmp_path / name).logits(tokens) for name in ("one", "two"))
    np.testing.assert_array_equal(one, two)


def test_bfloat16_checkpoint_is_exported_exactly(tmp_path: Path) -> None:
    config = small_config(dtype="bfloat16")
    rounded = {n: w.astype(ml_dtypes.bfloat16) for n, w in lively_weights(config).items()}
    checkpoint, _ = write_checkpoint(tmp_path / "checkpoint", config, rounded)
    export_checkpoint(checkpoint, tmp_path / "out")
    stored = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer
    }
    for name in ("model.embed_tokens.weight", "model.norm.bias"):
        np.testing.assert_array_equal(stored[name], rounded[name].astype(np.float32))


def test_failed_check_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    checkpoint, _ = write_checkpoint(tmp_path / "checkpoint", small_config())
    honest = build_model

    def bent(config, weights, **options):
        weights = {**weights, "model.layers.1.W_out.bias": weights["model.norm.bias"] + 1}
        return honest(config, weights, **options)

    monkeypatch.setattr(sessa_export.graph, "build_model", bent)
    with pytest.raises(SessaError, match="logits differ"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_failed_check_keeps_the_folder_it_would_replace(tmp_path: Path, monkeypatch) -> None:
    checkpoint, _ = write_checkpoint(tmp_path / "checkpoint", small_config())
    with new_folder(tmp_path / "out") as folder:
        (folder / "older.txt").write_text("older")
    with pytest.raises(SessaError, match="not empty"):
        export_checkpoint(checkpoint, tmp_path / "out")
    monkeypatch.setattr(sessa_export.graph_attention, "HIDDEN", np.float32(0))
    with pytest.raises(SessaError, match="logits differ"):
        export_checkpoint(checkpoint, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "older.txt").is_file()
    monkeypatch.undo()
    export_checkpoint(checkpoint, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert not (tmp_path / "out" / "older.txt").exists()


def test_bad_requests(tmp_path: Path, monkeypatch) -> None:
    checkpoint, _ = write_checkpoint(tmp_path / "checkpoint", small_config())
    with pytest.raises(SessaError, match="opset is 20"):
        export_checkpoint(checkpoint, tmp_path / "out", Options(opset=20))
    with pytest.raises(SessaError, match="the checkpoint itself"):
        export_checkpoint(checkpoint, checkpoint, force=True)
    with pytest.raises(SessaError, match="no such"):
        export_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SessaError, match=r"model\.safetensors"):
        export_checkpoint(checkpoint, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(SessaError, match="onnx is not installed"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_damaged_export_is_refused(tmp_path: Path) -> None:
    checkpoint, _ = write_checkpoint(tmp_path / "checkpoint", small_config())
    with pytest.raises(SessaError, match="sessa export"):
        load_decoder(checkpoint)
    (checkpoint / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(SessaError, match="cannot load"):
        load_decoder(checkpoint)


def test_export_imports_no_framework(tmp_path: Path) -> None:
    checkpoint, _ = write_checkpoint(tmp_path / "checkpoint", small_config())
    code = (
        "import json, sys; from sessa_export.exporter import Options, export_checkpoint;"
        f"export_checkpoint({str(checkpoint)!r}, {str(tmp_path / 'out')!r});"
        "print(json.dumps([m for m in ('torch', 'mlx', 'onnxscript') if m in sys.modules]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == []


def test_stepper_refuses_a_mask_of_another_length(exported) -> None:
    decoder = load_decoder(exported[1])
    decoder.logits(np.zeros((2, 3), np.int64))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 2\), expected \(2, 5\)"):
        decoder.step(np.zeros((2, 2), np.int64), np.ones((2, 2), np.int64))


def test_save_model_accepts_what_build_model_gives(tmp_path: Path) -> None:
    config = small_config("attention_gated")
    model = build_model(config, lively_weights(config))
    save_model(model, tmp_path / "model.onnx")
    assert not model.functions
    assert "attention_mask" in [i.name for i in onnx.load(tmp_path / "model.onnx").graph.input]
