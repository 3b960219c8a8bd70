"""A trained model writes the same greedy text in every client, in float32 on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import sessa_torch
from sessa_common.inference.sampling import SamplingConfig

COUNT = 48
TEXT = "The quick brown fox jumps over a lazy dog; two big zebras vex it. "
PROMPT = np.frombuffer(TEXT[:12].encode(), np.uint8).astype(np.int64)
KINDS = {
    "sessa": "sessa",
    "gated_attention": "gated_attention",
    "transformer": "transformer",
    "sessa_transformer": "sessa_transformer",
    "mamba2": "mamba2",
    "hybrid": ("mamba2", "sessa"),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that was trained for some dozens of steps on one text."""
    root = tmp_path_factory.mktemp("greedy")
    (root / "text.txt").write_text(TEXT * 30, encoding="utf-8")
    return sessa_torch.train(
        root / "run",
        data=root / "text.txt",
        validation_data=root / "text.txt",
        tokenizer="bytes",
        layer_kinds=KINDS[request.param],
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        mamba_d_head=16,
        max_position_embeddings=128,
        sequence_length=48,
        batch_size=4,
        steps=120,
        warmup_steps=5,
        learning_rate=0.01,
        evaluate_every=0,
        checkpoint_every=0,
        device="cpu",
    ).folder


def draw(decoder) -> list[int]:
    decoder.feed(PROMPT[None])
    return [int(ids[0]) for ids in decoder.draw(SamplingConfig(temperature=0), COUNT)]


def own_torch(folder: Path) -> list[int]:
    from sessa_torch.decoding import load_decoder

    return draw(load_decoder(folder, device="cpu"))


def own_mlx(folder: Path) -> list[int]:
    from sessa_mlx.decoding import load_decoder

    return draw(load_decoder(folder))


def transformers(folder: Path) -> list[int]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    prompt = torch.from_numpy(PROMPT[None])
    ids = model.generate(prompt, max_new_tokens=COUNT, do_sample=False, pad_token_id=0)
    return ids[0, len(PROMPT) :].tolist()


def mlx_lm(folder: Path) -> list[int]:
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(folder, trust_remote_code=True)
    return [int(token) for token, _ in generate_step(mx.array(PROMPT), model, max_tokens=COUNT)]


def onnx_runtime(folder: Path) -> list[int]:
    from sessa_common.checkpoint.folder import load_weights
    from sessa_export.exporter import Options, write_model
    from sessa_export.runtime import MODEL_FILE, load_decoder

    config, weights = load_weights(folder)
    if "mamba2" in {kind.mixer for kind in config.kinds}:
        pytest.skip("Mamba-2 layers are not exported")
    out = folder.parent / "onnx"
    out.mkdir(exist_ok=True)
    write_model(out / MODEL_FILE, config, weights, Options())
    return draw(load_decoder(out))


@pytest.mark.parametrize("client", [own_mlx, transformers, mlx_lm, onnx_runtime])
def test_greedy_tokens_are_those_of_sessa_generate(
    folder: Path, client: Callable[[Path], list[int]]
) -> None:
    if client is mlx_lm:
        pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
    expected = own_torch(folder)
    assert len(set(expected)) > 8, "the text is degenerate"
    assert client(folder) == expected
