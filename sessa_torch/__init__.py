"""Sessa in PyTorch.

The names below are loaded on first use, so that importing the package imports no framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sessa_common import __version__
from sessa_common.lazy import lazy_attributes

if TYPE_CHECKING:
    from sessa_common.config import SessaConfig
    from sessa_torch.cache import SessaCache
    from sessa_torch.checkpoint import load_model, new_model
    from sessa_torch.decoding import generate
    from sessa_torch.evaluation import evaluate
    from sessa_torch.feedback import feedback_solve
    from sessa_torch.mixer import SessaMixer
    from sessa_torch.model import SessaForCausalLM, SessaLayer
    from sessa_torch.training import finetune, train
else:
    __getattr__ = lazy_attributes(
        __name__,
        {
            "sessa_common.config": ("SessaConfig",),
            "sessa_torch.cache": ("SessaCache",),
            "sessa_torch.checkpoint": ("load_model", "new_model"),
            "sessa_torch.decoding": ("generate",),
            "sessa_torch.evaluation": ("evaluate",),
            "sessa_torch.feedback": ("feedback_solve",),
            "sessa_torch.mixer": ("SessaMixer",),
            "sessa_torch.model": ("SessaForCausalLM", "SessaLayer"),
            "sessa_torch.training": ("finetune", "train"),
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
