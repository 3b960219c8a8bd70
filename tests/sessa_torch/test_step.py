"""A few tokens behind a cache on a CPU equal the call of the model, for every kind of layer."""

from __future__ import annotations

import pytest
import torch
from support.export_models import lively_weights, small_config

from sessa_torch.cache import SessaCache
from sessa_torch.checkpoint import build_model
from sessa_torch.decoding import Decoder
from sessa_torch.lora import LoraLinear

KINDS = ("sessa", "transformer", "sessa_transformer", "gated_attention", "mamba2")
SMALL = {"num_hidden_layers": 5, "layer_kinds": KINDS, "mamba_d_head": 16}
CONFIGS = {
    "default": {},
    "llama": {
        "num_key_value_heads": 2,
        "qk_norm": True,
        "norm_type": "rms",
        "mlp_type": "swiglu",
        "qkv_bias": False,
        "layer_kinds": ("sessa_transformer", "transformer"),
        "num_hidden_layers": 2,
    },
    "no positions, untied": {"use_forward_rope": False, "tie_word_embeddings": False},
}


@pytest.fixture(params=CONFIGS)
def model(request):
    config = small_config(**{**SMALL, **CONFIGS[request.param]})
    return build_model(config, lively_weights(config), dtype="float64")


@torch.inference_mode()
def check(model) -> None:
    """Compare a step with the call of the model, without and with padding."""
    ids = torch.arange(2 * 10).view(2, 10) % model.config.vocab_size
    for mask in (None, torch.arange(5).expand(2, 5) >= torch.tensor([[0], [3]])):
        decoder, cache = Decoder(model), SessaCache(model.config)
        decoder.feed(ids[:, :5].numpy(), None if mask is None else mask.numpy())
        model(ids[:, :5], cache=cache, attention_mask=mask)
        for new in (slice(5, 6), slice(6, 9), slice(9, 10)):
            want = model(ids[:, new], cache=cache)
            got = decoder.logits(ids[:, new].numpy())
            torch.testing.assert_close(torch.from_numpy(got), want.float())
        for name, held in cache.tensors().items():
            torch.testing.assert_close(decoder.cache.tensors()[name], held)


def test_a_step_equals_the_call_of_the_model(model) -> None:
    check(model)


def test_weights_are_held_once_and_may_change(model) -> None:
    check(model)
    mixer = model.model.layers[0].mixer
    if model.config.qkv_bias:
        assert mixer.q_proj.weight.untyped_storage().data_ptr() == (
            mixer.k_proj.weight.untyped_storage().data_ptr()
        )
    model(torch.tensor([[1, 2, 3]])).square().mean().backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 0.1 * weight.grad
    check(model)


def test_adapters_apply_in_a_step(model) -> None:
    for layer in model.model.layers:
        for name in ("q_proj", "proj_fb"):
            if hasattr(layer.mixer, name):
                lora = LoraLinear(getattr(layer.mixer, name), 2, 3.0).double()
                torch.nn.init.normal_(lora.lora_B.weight)
                setattr(layer.mixer, name, lora)
    check(model)
