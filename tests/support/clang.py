"""Tests that need a clang with real address spaces."""

from __future__ import annotations

import os
import sys

import pytest
from metal_emulator import address_spaces

# Continuous integration installs clang on Linux, so there its absence fails the tests. On a Mac the
# Metal compiler itself checks the text (tools/compile_metal.py).
REQUIRED = bool(os.environ.get("CI")) and sys.platform == "linux"

needs_clang = pytest.mark.skipif(
    address_spaces.clang() is None and not REQUIRED, reason="no clang++ 16 or newer"
)
