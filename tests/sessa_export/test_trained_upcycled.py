"""Training of an upcycled model: gradients at a gain of 0, and every runtime after some steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.frameworks import FRAMEWORKS, TORCH
from support.golden_cases import relative_error
from support.in_process import sessa
from support.stories import greedy_ids, write_stories

import sessa_mlx.decoding
import sessa_torch.decoding
from sessa_common.checkpoint.conversion import convert
from sessa_common.checkpoint.sources import read_source
from sessa_common.reference.model import model_logits
from sessa_export.exporter import export
from sessa_export.runtime import load_decoder
from sessa_torch import finetune

IDS = np.array([greedy_ids(40)])


@pytest.fixture(scope="module")
def upcycled(tmp_path_factory) -> Path:
    """The story model with feedback of gain 0."""
    return write_stories(tmp_path_factory.mktemp("upcycled") / "story", 0.0)


@pytest.fixture(scope="module")
def trained(upcycled: Path) -> Path:
    """The same model after some steps of feedback and LoRA, merged."""
    home = upcycled.parent
    (home / "text.txt").write_text("Once upon a time there was a cat. It sat on a mat. " * 30)
    finetune(
        upcycled,
        home / "adapter",
        data=str(home / "text.txt"),
        train="feedback+lora",
        steps=6,
        warmup_steps=1,
        batch_size=2,
        sequence_length=48,
        learning_rate=0.01,
        precision="float32",
        device="cpu",
    )
    convert(upcycled, home / "merged", merge=home / "adapter")
    return home / "merged"


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda f: f.name)
def test_at_a_gain_of_zero_only_the_gain_has_a_gradient_in_the_feedback(upcycled, framework):
    source = read_source(upcycled)
    cpu = {"device": "cpu"} if framework is TORCH else {}
    model = framework.checkpoint.build_model(source.config, source.weights, **cpu)
    dlogits = np.random.default_rng(0).normal(size=(*IDS.shape, source.config.vocab_size))
    gradients = framework.model_gradients(model, IDS, np.ones_like(IDS), dlogits)
    assert all(np.isfinite(value).all() for value in gradients.values())
    for i in range(source.config.num_hidden_layers):
        own = {
            name: np.abs(value).max()
            for name, value in gradients.items()
            if name.startswith(f"model.layers.{i}.mixer.")
        }
        prefix = f"model.layers.{i}.mixer."
        assert own[f"{prefix}gamma_ctx.weight"] > 0 and own[f"{prefix}gamma_bias"] > 0
        assert own[f"{prefix}proj_fb.weight"] == own[f"{prefix}proj_fb.bias"] == 0


def test_all_runtimes_agree_after_training(upcycled, trained, tmp_path):
    source = read_source(trained)
    want = model_logits(source.config, source.weights, IDS)
    before = read_source(upcycled)
    assert relative_error(model_logits(before.config, before.weights, IDS), want) > 1e-2
    export(trained, tmp_path / "onnx", layout="uniform")
    decoders = {
        "torch": sessa_torch.decoding.load_decoder(trained, device="cpu"),
        "mlx": sessa_mlx.decoding.load_decoder(trained),
        "onnx": load_decoder(tmp_path / "onnx"),
    }
    for name, decoder in decoders.items():
        assert relative_error(decoder.logits(IDS), want) <= 1e-5, name
        decoder.reset()
        decoder.logits(IDS[:, :30])
        assert relative_error(decoder.logits(IDS[:, 30:]), want[:, 30:]) <= 1e-5, name


def test_influence_of_a_trained_model_is_measured(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ("influence", trained, "--backend", "torch", "--tokens", "24", "--probes", "2")
    assert sessa(*command, "--layer", "4", "--json") == 0
    [report] = json.loads(capsys.readouterr().out)["checkpoints"]
    [layer] = report["layers"]
    assert layer["layer"] == 4
    assert layer["feedback"]["gamma"]["max"] > 0 and layer["feedback"]["eta"] > 0
