"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Tests compare float32 numbers. MLX reads this at its first product and would use TF32 on an M5.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import pytest
from support.golden_cases import NAMES, GoldenCase, golden_case
from support.trained_models import train_models


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest) -> GoldenCase:
    """Each golden file in turn."""
    return golden_case(request.param)


@pytest.fixture(scope="session")
def trained_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of a trained model and of a smaller one that guesses for it."""
    return train_models(tmp_path_factory.mktemp("trained"))


@pytest.fixture(autouse=True)
def float64_on_the_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a test with the parameter "float64" on the CPU: MLX has that type nowhere else."""
    parameters = getattr(request.node, "callspec", None)
    if parameters is None or "float64" not in map(str, parameters.params.values()):
        yield
        return
    # Imported here, so that tests of PyTorch alone run where MLX is not installed.
    import mlx.core as mx

    with mx.stream(mx.cpu):
        yield
