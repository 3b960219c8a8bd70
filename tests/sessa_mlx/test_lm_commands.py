"""The commands of mlx-lm, run as a user runs them, on a folder that this project wrote."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from support.export_models import lively_weights, small_config, write_checkpoint

from sessa_common.errors import SessaError

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")

from mlx_lm import utils

import sessa_mlx
from sessa_common.checkpoint.folder import load_packed_weights, load_weights
from sessa_common.checkpoint.remote_code import CODE_FILES
from sessa_mlx import lm_commands
from sessa_mlx.decoding import load_decoder
from sessa_mlx.model import Mamba2Layer

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


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "mode",
    ["affine", "mxfp4", pytest.param("nvfp4", marks=SLOW), pytest.param("mxfp8", marks=SLOW)],
)
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


@SLOW
def test_learned_scales_differ_from_rounded_ones(mlx_lm, folder, data, tmp_path):
    """DWQ starts from the rounded model and leaves another one, packed in the same way.

    It writes bfloat16 and leaves float32 in config.json, so mlx-lm computes in another type than
    `sessa generate` and their texts may part.
    """
    rounded, out = tmp_path / "rounded", tmp_path / "learned"
    mlx_lm("convert", "--hf-path", folder, "--mlx-path", rounded, "-q")
    few = ("--num-samples", 4, "--batch-size", 2, "--max-seq-length", 33, "--data-path", data)
    mlx_lm("quant.dwq", "--model", folder, "--mlx-path", out, "--learning-rate", 0.001, *few)
    assert generated(mlx_lm, out) and own(out)
    before, after = (load_packed_weights(path) for path in (rounded, out))
    assert before[2] == after[2]
    assert any((value != after[1][name]).any() for name, value in before[1].items())


@SLOW
def test_sensitive_matrices_get_more_bits(mlx_lm, folder, tmp_path, calibration, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where mlx-lm leaves the sensitivities
    out = tmp_path / "packed"
    mlx_lm("quant.dynamic_quant", "--model", folder, "--mlx-path", out)
    assert generated(mlx_lm, out) == own(out)
    _, _, packed = load_packed_weights(out)
    assert {packing.bits for packing in packed.values()} == {4, 5}


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


@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=SLOW)])
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

    # mlx-lm replaces the method of the first layer's class, for the whole process.
    monkeypatch.setattr(Mamba2Layer, "__call__", Mamba2Layer.__call__)
    found = []
    for options in ((), ("--grad-checkpoint",)):
        out = tmp_path / f"adapter{len(options)}"
        train(mlx_lm, folder, data, out, "--fine-tune-type", "full", *options)
        found.append(mx.load(str(out / "adapters.safetensors")))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert mx.allclose(value, found[1][name], atol=1e-5).item(), name


QUESTIONS = (("a", "b", "Yes"), ("The sun is", "hot", "cold"), ("x", "y y y", "z"))
TASK = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


def test_evaluate_scores_as_the_decoder_does(mlx_lm, folder, tmp_path, monkeypatch):
    """One more question is answered rightly than the decoder's own likelihoods would get."""
    pytest.importorskip("lm_eval", reason="the evaluation harness is not installed")
    monkeypatch.chdir(tmp_path)
    best = [
        int(np.argmax([likelihood(folder, q, c) for c in choices])) for q, *choices in QUESTIONS
    ]
    keys = [*best[:-1], 1 - best[-1]]
    lines = [
        json.dumps({"question": question, "choices": choices, "answer": key})
        for (question, *choices), key in zip(QUESTIONS, keys, strict=True)
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    (tmp_path / "task.yaml").write_text(TASK.format(data=tmp_path / "test.jsonl"))
    mlx_lm("evaluate", "--model", folder, "--tasks", "task.yaml", "--no-apply-chat-template")
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("eval*"))
    assert result["choices"]["acc,none"] == pytest.approx(2 / 3)


def likelihood(folder: Path, question: str, choice: str) -> float:
    """The log-likelihood of a choice behind a question, by the decoder of sessa."""
    prompt, ids = (list(text.encode()) for text in (question, f"{question} {choice}"))
    logits = load_decoder(folder).logits(np.array([ids]))[0].astype(np.float64)
    logprobs = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    return sum(logprobs[i - 1, ids[i]] for i in range(len(prompt), len(ids)))


@pytest.fixture
def untrusting(monkeypatch, capsys):
    """Run a command through `sessa_mlx.lm_commands`, which runs no file of a folder."""
    for name in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(utils, name, getattr(utils, name))

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["lm_commands", *map(str, arguments)])
        capsys.readouterr()
        lm_commands.main()
        return capsys.readouterr().out

    return run


def test_a_draft_folder_does_not_change_the_text(untrusting, tmp_path):
    config = small_config("untied", layer_kinds=("sessa", "sessa_transformer"))
    model, draft = tmp_path / "model", tmp_path / "draft"
    for seed, path in enumerate((model, draft)):
        write_checkpoint(path, config, lively_weights(config, seed))
        for code in CODE_FILES:
            (path / code).write_text("raise AssertionError")
    more = ("--prompt", PROMPT, "--max-tokens", 16, "--ignore-chat-template")
    out = untrusting("generate", "--model", model, "--draft-model", draft, *more)
    assert out.split("=" * 10)[1].strip() == own(model)


def test_a_folder_written_without_the_option_keeps_its_code_file(untrusting, folder, tmp_path):
    untrusting("convert", "--hf-path", folder, "--mlx-path", tmp_path / "packed", "-q")
    keys = json.loads((tmp_path / "packed/config.json").read_text())
    assert keys["model_file"] == "mlx_lm_model.py"
    assert (tmp_path / "packed/mlx_lm_model.py").is_file()


def test_chat_answers(mlx_lm, folder, monkeypatch):
    words = iter(["hello", "q"])
    monkeypatch.setattr("builtins.input", lambda *_: next(words))
    mlx_lm("chat", "--model", folder, "--max-tokens", 5)
