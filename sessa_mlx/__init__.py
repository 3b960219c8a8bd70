"""Sessa in MLX.

The names below are loaded on first use, so that importing the package imports no framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sessa_common import __version__
from sessa_common.lazy import lazy_attributes

if TYPE_CHECKING:
    from sessa_common.config import SessaConfig
    from sessa_mlx.cache import SessaCache
    from sessa_mlx.checkpoint import load_model, new_model
    from sessa_mlx.decoding import generate
    from sessa_mlx.evaluation import evaluate
    from sessa_mlx.feedback import feedback_solve
    from sessa_mlx.mixer import SessaMixer
    from sessa_mlx.model import SessaForCausalLM, SessaLayer
    from sessa_mlx.training import finetune, train
else:
    __getattr__ = lazy_attributes(
        __name__,
        {
            "sessa_common.config": ("SessaConfig",),
            "sessa_mlx.cache": ("SessaCache",),
            "sessa_mlx.checkpoint": ("load_model", "new_model"),
            "sessa_mlx.decoding": ("generate",),
            "sessa_mlx.evaluation": ("evaluate",),
            "sessa_mlx.feedback": ("feedback_solve",),
            "sessa_mlx.mixer": ("SessaMixer",),
            "sessa_mlx.model": ("SessaForCausalLM", "SessaLayer"),
            "sessa_mlx.training": ("finetune", "train"),
        },
    )

__all__ = [
    "SessaCache",
    "SessaConfig",
    "SessaForCausalLM",
    "SessaLayer",
    "SessaMixer",
    "__version__",
    "evaluate",
    "feedback_solve",
    "finetune",
    "generate",
    "load_model",
    "new_model",
    "train",
]
