"""Pictures with matplotlib, which is optional: colours, figures and how they are saved."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sessa_common.storage import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
VERMILION, SKY_BLUE, BLACK = "#D55E00", "#56B4E9", "#000000"


def has_matplotlib() -> bool:
    """Return True when matplotlib is installed, without importing it."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> Figure:
    """Make a figure of a size in inches.

    The figure is made without pyplot, so no window system is touched and no figure stays in a
    registry.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path, dpi: int = 120) -> None:
    """Write a figure as PNG; a reader of `path` sees the old file or the whole new one."""
    with atomic_path(path) as scratch:
        figure.savefig(scratch, format="png", dpi=dpi)
