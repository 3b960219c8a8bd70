"""The model card of a folder: facts in the hub's format, and a person's README.md left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from support.adapters import CONFIG, write_model, write_random_adapter

from sessa_common.checkpoint.conversion import convert
from sessa_common.checkpoint.model_card import CardFacts, hub_name, write_model_card
from sessa_common.train_config import TrainConfig

BASE = "/home/somebody/models--owner--name/snapshots/1"


def card(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of a folder's card, read by the hub's library."""
    found = ModelCard.load(folder / "README.md")
    return found.data.to_dict(), found.text


def write_run(folder: Path, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    text = json.dumps(TrainConfig(**settings).to_dict())
    (folder / "training.json").write_text(text, encoding="utf-8")
    return folder


def test_a_card_says_what_the_files_say(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", data=("hf:a/b:0.7", "notes.txt"), steps=12, seed=3)
    metrics = {"step": 12, "loss": 1.25, "validation_perplexity": 3.5}
    write_model_card(folder, CardFacts(config=CONFIG, metrics=metrics))
    head, text = card(folder)
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sessa"],
        "datasets": ["a/b"],
        "metrics": ["perplexity"],
    }
    assert "| layers | 3 (sessa, mamba2, sessa_transformer) |" in text
    assert "| steps | 12 |" in text and "| validation perplexity | 3.5 |" in text
    assert 'train("again", config="config.json", train_config="training.json")' in text
    write_model_card(folder, CardFacts(config=CONFIG, metrics={**metrics, "loss": 0.5}))
    assert "| training loss (nats per token) | 0.5 |" in card(folder)[1]


@pytest.mark.parametrize(
    ("train", "clients"),
    [
        ("lora", ["sessa_torch", "peft", "mlx_lm"]),
        ("feedback", ["sessa_torch", "mlx_lm"]),
        ("feedback+lora", ["sessa_torch", "peft"]),
    ],
)
def test_the_card_of_an_adapter_names_the_clients_that_load_it(
    train: str, clients: list[str], tmp_path: Path
) -> None:
    folder = write_run(write_random_adapter(tmp_path / "a", train), train=train, base=BASE)
    write_model_card(folder, CardFacts(config=CONFIG, base=BASE))
    head, text = card(folder)
    assert head["base_model"] == "owner/name"
    assert head["library_name"] == ("peft" if "lora" in train else "sessa-toolchain")
    load = text.partition("## Load")[2].partition("## Training")[0]
    found = [name for name in ("sessa_torch", "peft", "mlx_lm") if f"{name} import" in load]
    assert found == [name for name in clients if name != "sessa_torch"] and "adapter=" in load
    assert 'finetune("owner/name", "again", train_config="training.json")' in text


def test_a_converted_folder_has_a_card_for_its_clients(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    (base / "README.md").write_text("mine\n", encoding="utf-8")
    convert(base, tmp_path / "same")
    assert (tmp_path / "same" / "README.md").read_text() == "mine\n"
    (base / "README.md").unlink()
    convert(base, tmp_path / "merged", merge=write_random_adapter(tmp_path / "a"))
    head, text = card(tmp_path / "merged")
    assert head["library_name"] == "transformers" and "merged the adapter" in text
    convert(base, tmp_path / "mlx", framework="mlx")
    assert "transformers import" not in card(tmp_path / "mlx")[1]  # The convolutions lie otherwise.


def test_what_a_person_wrote_stays(tmp_path: Path) -> None:
    facts, target = CardFacts(config=CONFIG), tmp_path / "target"
    for old in ("mine\n", None):
        folder = write_run(tmp_path / "run")
        target.mkdir(exist_ok=True)
        if old is not None:
            (target / "README.md").write_text(old, encoding="utf-8")
            write_model_card(folder, facts, target)
            assert (folder / "README.md").read_text() == old
        else:
            (folder / "README.md").unlink()
            (target / "README.md").unlink()
            write_model_card(folder, facts, target)
            ours = (folder / "README.md").read_text()
            (folder / "README.md").write_text(ours.replace("# target", "# My model"))
            write_model_card(folder, facts)
            assert "# My model" in (folder / "README.md").read_text()


def test_only_the_hub_s_cache_gives_a_name() -> None:
    assert hub_name(BASE) == "owner/name"
    assert hub_name("/home/somebody/runs/first") is hub_name("models--x") is None
