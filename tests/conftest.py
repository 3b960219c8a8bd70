"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

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
