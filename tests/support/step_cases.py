"""Cases of the CUDA decode step, and a comparison of one with a prefill in float64."""

from __future__ import annotations

from typing import Any

import torch
from support.block_options import LLAMA

from sessa_common.checkpoint.stored_types import is_exact
from sessa_common.config import SessaConfig
from sessa_torch.cache import SessaCache
from sessa_torch.checkpoint import new_model
from sessa_torch.cuda.graph import StepRunner, unavailable_reason
from sessa_torch.model import SessaForCausalLM

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
# Blocks of a family with feedback, with keys and heads of widths of their own.
UPCYCLED = {**LLAMA, "layer_kinds": ("sessa_transformer", "transformer")}
KINDS: dict[str, dict[str, Any]] = {
    "sessa": {"layer_kinds": "sessa"},
    "grouped": {"layer_kinds": "sessa", "num_key_value_heads": 2, "tie_word_embeddings": False},
    "one head": {"num_attention_heads": 1, "use_forward_rope": False},
    "gated": {"layer_kinds": "gated_attention"},
    "transformer": {"layer_kinds": "transformer"},
    "sessa_transformer": {"layer_kinds": "sessa_transformer"},
    "hybrid": {"layer_kinds": ("mamba2", "sessa")},
    "mamba2": {"layer_kinds": "mamba2"},
    "llama": {**UPCYCLED, "feedback_key_dim": 8, "rope_scaling": YARN},
    "qwen2": {**UPCYCLED, "qkv_bias": True, "feedback_key_dim": 7, "layer_kinds": "transformer"},
    "qwen3": {**UPCYCLED, "qk_norm": True, "head_dim": 24, "feedback_key_dim": 7},
    "biased": {**UPCYCLED, "out_proj_bias": True, "mlp_bias": True, "norm_type": "layer"},
    "rms": {"layer_kinds": ("mamba2", "sessa_transformer"), "norm_type": "rms", "qk_norm": True},
}


def lively_model(kind: str, dtype: str, width: int = 16, device: str = "cpu") -> SessaForCausalLM:
    """A model of two layers whose logits depend on everything that it reads."""
    heads = {"num_attention_heads": 4, "intermediate_size": 3 * width // 2}
    options: dict[str, Any] = heads | {"mamba_d_head": 4, "mamba_d_state": 6} | KINDS[kind]
    config = SessaConfig(
        vocab_size=20,
        hidden_size=width,
        num_hidden_layers=2,
        max_position_embeddings=8192,
        **options,
    )
    model = new_model(config, 3, dtype=dtype, device=device).eval()
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=rng) * 0.2
            weight += noise.to(weight.device, weight.dtype)
    # As a model is that was trained in float32 and is loaded in 16 bits.
    for name, weight in model.named_parameters():
        if is_exact(name):
            weight.data = weight.data.float()
    return model


def in_float64(model: SessaForCausalLM) -> SessaForCausalLM:
    """A copy of the model in float64 on the CPU."""
    exact = new_model(model.config, 0, dtype="float64", device="cpu").eval()
    with torch.no_grad():
        for weight, given in zip(exact.parameters(), model.parameters(), strict=True):
            weight.copy_(given)
    return exact


@torch.inference_mode()
def error_of_steps(
    model: SessaForCausalLM, B: int, past: int, steps: list[int], padded: bool
) -> float:
    """The relative error of a runner's logits for steps of these lengths behind a past.

    Half of the past of the first sequence is padding if `padded`. A negative step drops positions.
    """
    kept: list[int] = []
    rng = torch.Generator().manual_seed(past)
    ids = torch.randint(0, 20, (B, past + sum(map(abs, steps))), generator=rng)
    device = model.model.norm.weight.device
    mask = torch.ones(ids.shape, dtype=torch.bool)
    mask[0, : past // 2] = not padded
    cache, runner, found, at = SessaCache(model.config), StepRunner(model), [], past
    assert unavailable_reason(model) is None
    if past:
        given = mask[:, :past].to(device) if padded else None
        model(ids[:, :past].to(device), cache=cache, attention_mask=given)
    kept = list(range(past))
    for step in steps:
        if step < 0:
            cache.trim(-step)
            runner.length = None
            del kept[step:], found[step:]
            continue
        columns = list(range(at, at + step))
        logits = runner.run(cache, ids[:, columns].to(device)).cpu().double()
        found += list(logits.unbind(1))
        kept += columns
        at += step
    want = in_float64(model)(ids[:, kept], attention_mask=mask[:, kept])[:, past:]
    got = torch.stack(found, 1)
    assert cache.length == len(kept)
    return ((got - want).norm() / want.norm()).item()
