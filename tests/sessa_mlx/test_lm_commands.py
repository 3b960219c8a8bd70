"""The commands of mlx-lm, run as a user runs them, on a folder that this project wrote."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from support.export_models import small_config, write_checkpoint

from sessa_common.errors import SessaError

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")

import sessa_mlx
from sessa_common.checkpoint.folder import load_packed_weights, load_weights
from sessa_mlx.model import SessaLayer

LAYERS = ("mamba2", "sessa", "sessa_transformer", "gated_attention")
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mlx-lm") / "model"
    config = small_config(
        "untied",
        hidden_size=64,
        layer_kinds=LAYERS,
        num_hidden_layers=len(LAYERS),
        mamba_d_head=16,
    )
    write_checkpoint(path, config)
    settings = path / "tokenizer_config.json"
    keys = json.loads(settings.read_text())
    settings.write_text(json.dumps(keys | {"chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data")
    for name in ("train", "valid", "test"):
        lines = [json.dumps({"text": f"{i} times {i} is {i * i}. " * 3}) for i in range(12)]
        (path / f"{name}.jsonl").write_text("\n".join(lines))
    return path


@pytest.fixture
def mlx_lm(monkeypatch, capsys):
    """Run a command of mlx-lm in this process and return what it printed."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(command: str, *options: object) -> str:
        arguments = [f"mlx_lm.{command}", "--trust-remote-code", *map(str, options)]
        monkeypatch.setattr(sys, "argv", arguments)
        capsys.readouterr()
        importlib.import_module(f"mlx_lm.{command}").main()
        return capsys.readouterr().out

    return run


EMBEDDING = "model.embed_tokens"
PROMPT = "What is 3 times 3?"


def generated(mlx_lm, model: Path, *options: object) -> str:
    """The greedy text that `mlx_lm.generate` prints, without the figures around it."""
    more = ("--prompt", PROMPT, "--max-tokens", 16, "--ignore-chat-template", *options)
    return mlx_lm("generate", "--model", model, *more).split("=" * 10)[1].strip()


def own(model: Path) -> str:
    (text,) = sessa_mlx.generate(model, PROMPT, max_tokens=16, temperature=0)
    return text.strip()


def test_generate_writes_the_text_of_sessa_generate(mlx_lm, folder):
    assert generated(mlx_lm, folder) == own(folder)


def test_a_cached_prompt_is_read_back(mlx_lm, folder, tmp_path):
    cache = tmp_path / "cache.safetensors"
    mlx_lm("cache_prompt", "--model", folder, "--prompt", "Hello", "--prompt-cache-file", cache)
    out = mlx_lm(
        "generate", "--model", folder, "--prompt-cache-file", cache, "--prompt", "x", "-m", 4
    )
    assert "Generation: 4 tokens" in out


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4", "mxfp8"])
def test_quantised_folders_generate_and_are_dequantised(mlx_lm, folder, tmp_path, mode):
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    mlx_lm("convert", "--hf-path", folder, "--mlx-path", packed, "-q", "--q-mode", mode)
    text = generated(mlx_lm, packed)
    if mode == "affine":
        assert text == own(packed)
    else:
        with pytest.raises(SessaError, match="quantised in mode"):
            load_weights(packed)
    mlx_lm("convert", "--hf-path", packed, "--mlx-path", dense, "-d")
    assert own(dense) == generated(mlx_lm, dense)


@pytest.fixture
def calibration(monkeypatch, tmp_path):
    """A text where mlx-lm looks for the one that it would download."""
    path = tmp_path / "home/.cache/mlx-lm/calibration_v5.txt"
    path.parent.mkdir(parents=True)
    path.write_text("".join(f"{i} times {i} is {i * i}. " for i in range(150)))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_gptq_quantises_every_matrix_but_the_gain(mlx_lm, folder, tmp_path, calibration):
    out = tmp_path / "packed"
    few = ("--num-samples", 4, "--sequence-length", 64, "--bits", 4)
    mlx_lm("quant.gptq", "--model", folder, "--mlx-path", out, *few)
    assert generated(mlx_lm, out) == own(out)
    _, _, packed = load_packed_weights(out)
    _, weights = load_weights(folder)
    matrices = {name.removesuffix(".weight") for name, w in weights.items() if w.ndim == 2}
    assert packed.keys() == {name for name in matrices if not name.endswith("gamma_ctx")}
    assert {packing.bits for name, packing in packed.items() if name != EMBEDDING} == {4}


def test_awq_knows_its_architectures_only(mlx_lm, folder, tmp_path, calibration):
    with pytest.raises(NotImplementedError, match="sessa"):
        mlx_lm("quant.awq", "--model", folder, "--mlx-path", tmp_path / "packed")


def test_a_cast_keeps_gains_and_decays_exact(mlx_lm, folder, tmp_path):
    out = tmp_path / "half"
    mlx_lm("convert", "--hf-path", folder, "--mlx-path", out, "--dtype", "bfloat16")
    _, weights = load_weights(out)
    dtypes = {name.rpartition(".")[2]: str(value.dtype) for name, value in weights.items()}
    assert (dtypes["gamma_bias"], dtypes["A_log"]) == ("float32", "float32")
    assert dtypes["weight"] == "bfloat16"


def train(mlx_lm, folder, data, out, *options) -> None:
    few = ("--iters", 3, "--batch-size", 2, "--num-layers", len(LAYERS), "--learning-rate", 0.01)
    mlx_lm(
        "lora", "--model", folder, "--train", "--data", data, "--adapter-path", out, *few, *options
    )


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_is_trained_and_fused(mlx_lm, folder, data, tmp_path, kind):
    adapter, fused = tmp_path / "adapter", tmp_path / "fused"
    train(mlx_lm, folder, data, adapter, "--fine-tune-type", kind)
    mlx_lm("fuse", "--model", folder, "--adapter-path", adapter, "--save-path", fused)
    text = generated(mlx_lm, folder, "--adapter-path", adapter)
    assert text != own(folder)
    assert text == own(fused)


def test_repeating_the_layers_in_the_backward_pass_trains_the_same(
    mlx_lm, folder, data, tmp_path, monkeypatch
):
    import mlx.core as mx

    monkeypatch.setattr(SessaLayer, "__call__", SessaLayer.__call__)
    found = []
    for options in ((), ("--grad-checkpoint",)):
        out = tmp_path / f"adapter{len(options)}"
        train(mlx_lm, folder, data, out, "--fine-tune-type", "full", *options)
        found.append(mx.load(str(out / "adapters.safetensors")))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert mx.allclose(value, found[1][name], atol=1e-5).item(), name


def test_measurements_run(mlx_lm, folder, data):
    assert "generation_tps" in mlx_lm("benchmark", "--model", folder, "-p", 20, "-g", 4, "-n", 1)
    more = ("--data-path", data, "--sequence-length", 32, "--num-samples", 2)
    assert "Perplexity" in mlx_lm("perplexity", "--model", folder, *more)


def test_chat_answers(mlx_lm, folder, monkeypatch):
    words = iter(["hello", "q"])
    monkeypatch.setattr("builtins.input", lambda *_: next(words))
    mlx_lm("chat", "--model", folder, "--max-tokens", 5)
