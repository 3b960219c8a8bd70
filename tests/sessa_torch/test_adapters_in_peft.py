"""Adapters of `sessa finetune` in PEFT, and adapters of PEFT here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.adapters import IDS, write_model, write_random_adapter

import sessa_torch
from sessa_torch.evaluation import logits_function

peft = pytest.importorskip("peft")
hf = pytest.importorskip("sessa_torch.hf")
torch = pytest.importorskip("torch")


def their_logits(model) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(IDS)).logits.numpy()


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_peft_loads_an_adapter_and_gives_the_same_logits(tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base"), write_random_adapter(tmp_path / "adapter")
    wanted = logits_function(sessa_torch.load_model(base, adapter=adapter, device="cpu"))(IDS)
    plain = hf.SessaForCausalLM.from_pretrained(base)
    before = their_logits(plain)
    assert np.abs(wanted - before).max() > 0.1
    model = peft.PeftModel.from_pretrained(plain, adapter)
    np.testing.assert_allclose(their_logits(model), wanted, atol=2e-5)
    np.testing.assert_allclose(their_logits(model.merge_and_unload()), wanted, atol=2e-5)


def test_an_adapter_of_peft_is_read(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False
    )
    model = peft.get_peft_model(hf.SessaForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "adapter")
    loaded = sessa_torch.load_model(base, adapter=tmp_path / "adapter", device="cpu")
    np.testing.assert_allclose(logits_function(loaded)(IDS), their_logits(model), atol=2e-5)
