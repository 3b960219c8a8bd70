"""Presets: every size has all families, matched in parameters by two independent counts."""

from __future__ import annotations

import dataclasses

import pytest

from sessa_common.config import SessaConfig, check_matched, parameter_count
from sessa_common.errors import SessaError
from sessa_common.presets import PRESETS

SIZES = ("400k", "1m", "9m", "10m", "30m", "131m", "1b", "3b")
FAMILIES = (
    "sessa-{}",
    "transformer-{}",
    "transformer-{}-deep",
    "mamba2-{}",
    "sessa_transformer-{}",
)


def family(size: str) -> dict[str, SessaConfig]:
    return {form.format(size): PRESETS[form.format(size)] for form in FAMILIES}


def block(config: SessaConfig) -> int:
    """Parameters of one layer by the closed formula of its kind, not by its tensors."""
    D, F = config.hidden_size, config.intermediate_size
    N, P = config.mamba_d_state, config.mamba_d_head
    feedback = 2 * D**2 + 3 * D + 1
    if config.layer_kinds in ("transformer", "sessa_transformer"):
        standard = 4 * D**2 + 4 * D + 2 * D * F + F + D + 4 * D
        return standard if config.layer_kinds == "transformer" else standard + feedback
    if config.layer_kinds == "mamba2":
        return 6 * D**2 + 2 * D**2 // P + 2 * N * D + 10 * N + 13 * D + 6 * D // P
    gated = 7 * D**2 + 8 * D
    return gated if config.layer_kinds == "gated_attention" else gated + feedback


def test_no_preset_is_left_out() -> None:
    assert set(PRESETS) == {"demo"} | {name for size in SIZES for name in family(size)}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_matched(size: str) -> None:
    configs = family(size)
    check_matched(configs)
    counts = {name: parameter_count(config) for name, config in configs.items()}
    for name, config in configs.items():
        norm = config.hidden_size * (1 if config.layer_kinds == "mamba2" else 2)
        outside = config.vocab_size * config.hidden_size + norm
        assert counts[name] == config.num_hidden_layers * block(config) + outside, name
    assert counts[f"sessa-{size}"] == pytest.approx(
        float(size[:-1]) * {"k": 1e3, "m": 1e6, "b": 1e9}[size[-1]], rel=0.15
    )
    deep = configs[f"transformer-{size}-deep"].num_hidden_layers
    assert deep == configs[f"sessa-{size}"].num_hidden_layers


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"layer_kinds": "gated_attention"}, 7 * 40**2 + 8 * 40),
        ({"num_attention_heads": 1}, 8 * 40**2 + 11 * 40 + 1),
        (
            {"layer_kinds": "mamba2", "mamba_d_state": 12, "mamba_d_head": 16},
            6 * 40**2 + 2 * 40**2 // 16 + 2 * 12 * 40 + 10 * 12 + 13 * 40 + 6 * 40 // 16,
        ),
    ],
    ids=["gated", "one-head", "mamba2"],
)
def test_other_blocks_have_the_formulas_count(changes: dict, expected: int) -> None:
    two, three = (
        SessaConfig(hidden_size=40, num_hidden_layers=layers, **changes) for layers in (2, 3)
    )
    assert parameter_count(three) - parameter_count(two) == expected


def test_a_tied_embedding_counts_once() -> None:
    tied = PRESETS["sessa-1m"]
    untied = dataclasses.replace(tied, tie_word_embeddings=False)
    assert parameter_count(untied) - parameter_count(tied) == 4096 * 128


def test_what_does_not_match_is_told_with_its_counts() -> None:
    configs = {"sessa-1m": PRESETS["sessa-1m"], "mamba2-9m": PRESETS["mamba2-9m"]}
    with pytest.raises(SessaError) as error:
        check_matched(configs)
    for name, config in configs.items():
        assert f"{name} {parameter_count(config):,}" in str(error.value)
    assert "within 1%" in str(error.value)
    check_matched(configs, tolerance=9)
    check_matched({})


def test_the_tolerance_counts_both_ways() -> None:
    # Mamba-2 of this size has 0.55 % more parameters than Sessa.
    sessa, mamba2 = ({name: PRESETS[name]} for name in ("sessa-131m", "mamba2-131m"))
    for configs in ({**sessa, **mamba2}, {**mamba2, **sessa}):
        check_matched(configs, tolerance=0.006)
        with pytest.raises(SessaError, match=r"0\.5%"):
            check_matched(configs, tolerance=0.005)
