"""The coordinate check of muP: changes keep their size as the width grows, and only by the rule."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from sessa_common.train_config import TrainConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WIDTHS = [32, 256]


@pytest.fixture(scope="module")
def check() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("coordinate_check")


def growth(check: Any, base: int, optimizer: str) -> dict[str, float]:
    settings = TrainConfig(
        learning_rate=1e-2,
        optimizer=optimizer,
        precision="float32",
        compile=False,
        mup_base_width=base,
    )
    found = check.by_width(WIDTHS, settings, "sessa", 6)
    return {name: wide / narrow for name, (narrow, wide) in found.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_changes_keep_their_size_as_the_width_grows(check: Any, optimizer: str) -> None:
    found = growth(check, WIDTHS[0], optimizer)
    assert found.keys() == {
        "logits",
        *(f"{part} {i}" for part in ("layer", "scores", "gain") for i in (0, 1)),
    }
    assert min(found.values()) > 0.2 and max(found.values()) < 1.7


def test_changes_grow_without_the_rule(check: Any) -> None:
    found = growth(check, 0, "adamw")
    assert min(x for name, x in found.items() if name != "logits") > 4
    assert found["logits"] > 2
