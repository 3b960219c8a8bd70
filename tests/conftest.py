"""Fixtures that several test files share."""

from __future__ import annotations

import pytest
from support.golden_cases import NAMES, GoldenCase, golden_case


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest) -> GoldenCase:
    """Each golden file in turn."""
    return golden_case(request.param)
