"""The parts of Sessa that need no framework: configuration, data, checkpoints, the reference.

The names below are loaded on first use, so that importing the package is fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sessa_common.lazy import lazy_attributes

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sessa_common.checkpoint.conversion import convert
    from sessa_common.config import SessaConfig
    from sessa_common.errors import SessaError
    from sessa_common.train_config import TrainConfig
else:
    __getattr__ = lazy_attributes(
        __name__,
        {
            "sessa_common.checkpoint.conversion": ("convert",),
            "sessa_common.config": ("SessaConfig",),
            "sessa_common.errors": ("SessaError",),
            "sessa_common.train_config": ("TrainConfig",),
        },
    )

__all__ = ["SessaConfig", "SessaError", "TrainConfig", "__version__", "convert"]
