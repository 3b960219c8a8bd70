"""`sessa check` in the process that it sets up."""

from __future__ import annotations

import os

import pytest

import sessa_export
from sessa_cli.check import check


@pytest.mark.parametrize(("given", "used"), [(None, "0"), ("1", "1")])
def test_mlx_compares_float32_without_tf32(monkeypatch, tmp_path, given, used) -> None:
    """Unless the user asks for TF32."""
    monkeypatch.setenv("MLX_ENABLE_TF32", given or "")
    if given is None:
        monkeypatch.delenv("MLX_ENABLE_TF32")
    seen = []
    monkeypatch.setattr(
        sessa_export, "check", lambda *a, **k: seen.append(os.environ["MLX_ENABLE_TF32"]) or []
    )
    check(tmp_path, None, seed=0, json_output=True)
    assert seen == [used]
