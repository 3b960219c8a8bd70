"""ONNX export and the comparison of all runtimes.

The names below are loaded on first use, so that importing the package imports neither onnx nor a
framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sessa_common import __version__
from sessa_common.lazy import lazy_attributes

if TYPE_CHECKING:
    from sessa_export.exporter import export
    from sessa_export.runtime_check import check
else:
    __getattr__ = lazy_attributes(
        __name__,
        {"sessa_export.exporter": ("export",), "sessa_export.runtime_check": ("check",)},
    )

__all__ = ["__version__", "check", "export"]
