"""A missing optional package is named with the extra that brings it."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("sessa_torch.hf", "transformers", "transformers"),
        ("sessa_mlx.lm", "mlx_lm.models.cache", "mlx-lm"),
    ],
)
def test_the_module_of_a_client_names_its_extra(monkeypatch, module, package, extra):
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'sessa-toolchain\[{extra}\]'"):
        importlib.import_module(module)
