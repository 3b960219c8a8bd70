"""Fine-tuning in both frameworks: equal losses, frozen weights, adapters that go anywhere."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from support.adapters import CONFIG, write_model

from sessa_common import convert
from sessa_common.checkpoint.adapters import read_adapter
from sessa_common.checkpoint.folder import load_weights, save_weights
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.data.batches import next_token_batch
from sessa_common.train_config import TrainConfig
from sessa_common.training.metrics import read_metrics
from sessa_common.training.trained_parameters import with_adapter

TWINS = ("torch", "mlx")
# The number of steps that the comparison of the frameworks is made over, and that of other runs.
STEPS, FEW = 20, 6
# A constant rate, so that a shorter run is the beginning of a longer one.
SETTINGS: dict[str, Any] = {
    "steps": STEPS,
    "learning_rate": 0.01,
    "warmup_steps": 0,
    "min_lr_ratio": 1.0,
    "batch_size": 3,
    "evaluate_every": 0,
    "evaluate_batches": 1,
    "seed": 5,
    "precision": "float32",
    "device": "cpu",
}
WAYS: dict[str, dict[str, Any]] = {
    "lora": {},
    "packed": {"steps": FEW, "packing": True, "lora_targets": ["q_proj", "W_out"], "lora_rank": 3},
    "feedback+lora": {
        "steps": FEW,
        "train": "feedback+lora",
        "checkpoint_activations": "layers",
        "optimizer": "muon",
    },
    "all": {"steps": FEW, "train": "all"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Say {'a' * (i % 7)}"},
                {"role": "assistant", "content": "b" * (i % 5 + 1)},
            ]
        }
        for i in range(20)
    ] + [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(
    base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    """A run folder for each way of fine-tuning and each framework."""
    home = tmp_path_factory.mktemp("runs")
    with mock.patch("sessa_common.training.trainer.draw_losses"):
        return {
            (way, name): twin(name)
            .finetune(base, home / name / way, data=data, **SETTINGS | options)
            .folder
            for way, options in WAYS.items()
            for name in TWINS
        }


def twin(name: str) -> Any:
    return importlib.import_module(f"sessa_{name}")


def logits(model: Any, name: str) -> np.ndarray:
    """Logits of a fixed text."""
    ids = np.random.default_rng(2).integers(0, 257, (2, 30))
    return importlib.import_module(f"sessa_{name}.evaluation").logits_function(model)(ids)


@pytest.mark.parametrize("way", WAYS)
def test_the_losses_of_both_frameworks_are_equal(runs: Any, way: str) -> None:
    mlx, torch = (
        [record.get("loss", record.get("validation_loss")) for record in read_metrics(runs[way, f])]
        for f in ("mlx", "torch")
    )
    assert len(torch) == WAYS[way].get("steps", STEPS) + 1
    np.testing.assert_allclose(mlx, torch, rtol=1e-5)
    assert torch[-2] < torch[0] - 0.05


@pytest.mark.parametrize("name", TWINS)
def test_lora_in_bfloat16_is_near_lora_in_float32(name: str) -> None:
    weights, losses = initial_weights(CONFIG, 1), {}
    for precision in ("float32", "bfloat16"):
        settings = TrainConfig(train="lora", precision=precision, compile=False)
        given = with_adapter(CONFIG, settings, weights)
        training = importlib.import_module(f"sessa_{name}.training")
        backend = training.TrainBackend(CONFIG, settings, given, "cpu")
        batch = next_token_batch(np.arange(60, dtype=np.int32).reshape(2, 30))
        losses[precision] = [backend.step([batch], 0.02)[0] for _ in range(3)]
        assert backend.weights()["model.layers.0.W_in.lora_A.weight"].dtype == np.float32
    assert losses["bfloat16"] != losses["float32"]
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=5e-3)


@pytest.mark.parametrize("name", TWINS)
def test_the_base_and_its_tokenizer_stay_as_they_are(runs: Any, base: Path, name: str) -> None:
    for way in WAYS:
        folder = runs[way, name]
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (folder / file).read_bytes() == (base / file).read_bytes()
        assert "User: " in (folder / "chat_template.jinja").read_text()
    adapter = read_adapter(runs["feedback+lora", name])
    assert "model.layers.0.mixer.gamma_bias" in adapter.arrays
    assert "model.layers.1.mixer.in_proj.lora_A.weight" in adapter.arrays
    assert not any("proj_fb.lora" in array for array in adapter.arrays)
    with pytest.raises(ValueError, match="is an adapter, which changes a model"):
        twin(name).load_model(runs["lora", name])


@pytest.mark.parametrize("name", TWINS)
def test_a_resumed_run_is_the_unbroken_one(
    runs: Any, base: Path, data: Path, name: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with mock.patch("sessa_common.training.trainer.draw_losses"):
        twin(name).finetune(base, out, data=data, **SETTINGS | {"steps": 7})
        twin(name).finetune(resume=out, steps=STEPS, device="cpu")
    whole, resumed = (read_adapter(folder).arrays for folder in (runs["lora", name], out))
    assert whole.keys() == resumed.keys()
    assert all(np.array_equal(whole[key], resumed[key]) for key in whole)
    other = tmp_path / "other"
    convert(base, other)
    config, weights = load_weights(base)
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_weights(other, config, weights)
    settings = json.loads((out / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(other)
    (out / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"the model in {other} are not those"):
        twin(name).finetune(resume=out, steps=STEPS + 1, device="cpu")


@pytest.mark.parametrize("way", ["lora", "packed", "feedback+lora"])
def test_an_adapter_of_either_framework_is_one_model_in_both(
    runs: Any, base: Path, way: str, tmp_path: Path
) -> None:
    wanted = logits(twin("torch").load_model(base, adapter=runs[way, "torch"]), "torch")
    assert np.abs(wanted - logits(twin("torch").load_model(base), "torch")).max() > 0.1
    for made_by in TWINS:
        adapter = runs[way, made_by]
        report = convert(base, tmp_path / made_by, merge=adapter)
        assert f"merged the adapter {adapter}" in report.notes
        assert (tmp_path / made_by / "chat_template.jinja").is_file()
        for name in TWINS:
            loaded = logits(twin(name).load_model(base, adapter=adapter), name)
            merged = logits(twin(name).load_model(tmp_path / made_by), name)
            np.testing.assert_allclose(loaded, wanted, atol=1e-4)
            np.testing.assert_array_equal(merged, loaded)


@pytest.mark.parametrize("name", TWINS)
def test_generate_and_evaluate_take_an_adapter(
    runs: Any, base: Path, name: str, tmp_path: Path
) -> None:
    adapter, merged = runs["lora", name], tmp_path / "merged"
    convert(base, merged, merge=adapter)
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "device": "cpu"}
    texts = twin(name).generate(base, "3+1=", adapter=adapter, **options)
    assert texts == twin(name).generate(merged, "3+1=", **options)
    text = tmp_path / "text.txt"
    text.write_text("Say a. Say b.", encoding="utf-8")
    loss = twin(name).evaluate(base, text, adapter=adapter, device="cpu").loss
    assert loss == twin(name).evaluate(merged, text, device="cpu").loss
    assert loss != twin(name).evaluate(base, text, device="cpu").loss
