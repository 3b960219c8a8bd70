"""Muon's constants, and the matrices of a model that it updates.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a
matrix by the nearest matrix with orthogonal rows or columns, approximately. Its steps are scaled to
the size of AdamW's, so that both take one learning rate (Liu et al. 2025, arXiv 2502.16982). The
constants are those of torch.optim.Muon with `match_rms_adamw`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sessa_common.checkpoint.adapters import Shapes
from sessa_common.train_config import TrainConfig

MOMENTUM = 0.95
# The polynomial a x + b x^3 + c x^5 of a Newton-Schulz step, and the number of steps.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-7


def step_size(shape: Sequence[int]) -> float:
    """The factor that gives an orthogonal (M, N) the root mean square of AdamW's steps, 0.2."""
    return 0.2 * math.sqrt(max(shape))


def takes_muon(name: str, shape: Sequence[int], settings: TrainConfig) -> bool:
    """Return True for the matrices that Muon updates: those of the layers, LoRA's among them.

    AdamW updates embedding, head, norms, biases, convolutions and the gain's single row.
    """
    is_matrix = len(shape) == 2 and min(shape) > 1
    return settings.optimizer == "muon" and is_matrix and name.startswith("model.layers.")


def state_shapes(trained: Shapes, settings: TrainConfig) -> Shapes:
    """Name and shape of every array of a training state, which Muon's matrices have no v in."""
    found: Shapes = {}
    for name, shape in trained.items():
        kinds = ("weights", "m") if takes_muon(name, shape, settings) else ("weights", "m", "v")
        found |= {f"{kind}.{name}": shape for kind in kinds}
    return found
