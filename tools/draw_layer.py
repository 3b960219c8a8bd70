"""Draw docs/pictures/layer.svg: one Sessa layer and its feedback.

python tools/draw_layer.py [OUTPUT]    (needs matplotlib)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "layer.svg"
PLAIN, LOOP = "#EAEEF2", "#FCE3D4"
# Centre x, centre y, width and text of each box; the last two make the loop.
BOXES = {
    "norm": (1.3, 1.0, 1.5, "LayerNorm,\nlinear"),
    "gelu": (3.5, 1.0, 1.1, "GELU"),
    "attention": (5.5, 1.0, 1.9, "causal attention\n(RoPE, heads)"),
    "sum": (7.6, 1.0, 0.5, "+"),
    "gate": (9.7, 1.0, 0.5, "×"),
    "out": (11.0, 1.0, 1.1, "linear"),
    "add": (12.3, 1.0, 0.5, "+"),
    "feedback": (7.6, 2.6, 3.1, "gain γ × attention over the\nstrict past of s"),
}
# From, to and label of each straight arrow.
ARROWS = (
    ("norm", "gelu", "a"),
    ("gelu", "attention", ""),
    ("attention", "sum", "f"),
    ("sum", "gate", "s"),
    ("gate", "out", ""),
    ("out", "add", ""),
)


def draw(output: Path) -> None:
    """Write the picture; the format follows the name's ending."""
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "sessa", "font.size": 11})
    figure = Figure(figsize=(9.6, 2.9), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-0.4, 13.6), ylim=(-0.75, 3.3))
    axes.axis("off")
    for name, (x, y, width, text) in BOXES.items():
        colour = LOOP if name in ("sum", "feedback") else PLAIN
        style = {"boxstyle": "round,pad=0.12", "facecolor": colour, "edgecolor": "#444444"}
        corner = (x - width / 2, y - 0.34)
        axes.add_patch(matplotlib.patches.FancyBboxPatch(corner, width, 0.68, **style))
        axes.text(x, y, text, ha="center", va="center")
    for start, end, label in ARROWS:
        left = BOXES[start][0] + BOXES[start][2] / 2 + 0.12
        right = BOXES[end][0] - BOXES[end][2] / 2 - 0.12
        _line(axes, [(left, 1.0), (right, 1.0)])
        axes.text((left + right) / 2, 1.1, label, ha="center", va="bottom", style="italic")
    _line(axes, [(-0.3, 1.0), (0.43, 1.0)])
    _line(axes, [(12.67, 1.0), (13.4, 1.0)])
    _line(axes, [(8.75, 1.0), (8.75, 2.14)], colour="#C8531C")  # s is read by the feedback
    _line(axes, [(7.6, 2.14), (7.6, 1.46)], colour="#C8531C")
    _line(axes, [(2.4, 1.0), (2.4, 0.0), (9.7, 0.0), (9.7, 0.54)])  # the gate
    _line(axes, [(0.0, 1.0), (0.0, -0.6), (12.3, -0.6), (12.3, 0.54)])  # the residual
    for x, y, text in ((-0.15, 1.1, "x"), (13.1, 1.1, "y"), (2.55, 0.06, "g")):
        axes.text(x, y, text, ha="center", va="bottom", style="italic")
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)


def _line(axes: Any, points: list[tuple[float, float]], colour: str = "#444444") -> None:
    """Straight lines through the points; an arrow head at the last one."""
    axes.plot(*zip(*points, strict=True), color=colour, lw=1.2)
    arrow = {"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops=arrow)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT)
