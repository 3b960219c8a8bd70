"""TRL on tiny data: supervised fine-tuning and DPO with adapters, merged into a checkpoint."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset
from peft import LoraConfig, PeftModel
from support.export_models import small_config, write_checkpoint
from support.in_process import sessa
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import sessa_torch.hf  # noqa: F401 - registers the model
from sessa_torch.checkpoint import load_model

ROWS = {
    "sft": [{"prompt": "The sky is", "completion": " blue"}, {"prompt": "2+2=", "completion": "4"}],
    "dpo": [
        {"prompt": "The sky is", "chosen": " blue", "rejected": " a very green one"},
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
    ],
}
TRAINERS = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}
IDS = torch.tensor([[5, 71, 9, 200, 33, 4, 90]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "m", small_config("hybrid"))[0]


def train(method, folder, out, **options):
    """Eight steps with an adapter on every linear layer; the trainer."""
    torch.manual_seed(0)
    trainer_class, config_class = TRAINERS[method]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=config_class(
            output_dir=str(out),
            max_steps=8,
            learning_rate=1e-2,
            per_device_train_batch_size=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            max_length=64,
            **options,
        ),
        train_dataset=Dataset.from_list(ROWS[method]),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("method", TRAINERS)
def test_an_adapter_trains_and_its_merged_folder_is_a_checkpoint(method, folder, tmp_path):
    trainer = train(method, folder, tmp_path / "run")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < 0.8 * losses[0]
    trainer.save_model(str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        before = base(IDS).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        logits = adapted(IDS).logits
        assert torch.equal(logits, trainer.model.eval()(IDS).logits)
        assert not torch.allclose(logits, before, atol=1e-3)
        adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
        trainer.processing_class.save_pretrained(tmp_path / "merged")
        merged = load_model(tmp_path / "merged", device="cpu")(IDS)
    assert torch.allclose(merged, logits, atol=1e-4)
    assert sessa("convert", tmp_path / "merged", tmp_path / "mlx", "--to", "mlx") == 0
    if method == "sft":
        assert sessa("export", tmp_path / "merged", tmp_path / "onnx") == 0
        assert sessa("check", tmp_path / "merged", "--export", tmp_path / "onnx") == 0


def test_sequences_in_one_row_are_refused(folder, tmp_path):
    with pytest.raises(Exception, match="position_ids do not rise by 1"):
        train("sft", folder, tmp_path / "run", packing=True)
