"""Learning rates by the width of a model: muP, the maximal update parametrisation.

With it the best learning rate of a narrow model is near that of a wide one (Yang et al. 2022, arXiv
2203.03466, in the form of their table 8). m is mup_base_width / hidden_size, where mup_base_width
is the width of the model that the learning rate was found for.

- A matrix of a layer learns with m times the rate under AdamW. It starts with variance 1 / fan_in
  at every width, as the rule asks. Under Muon the factor is m^(1/2), because the spectral norm of a
  step grows with the square root of the width (Yang et al. 2023, arXiv 2310.17813).
- The gain's row, which makes one number of the width, learns with m times the rate and starts
  m^(1/2) times as large, so that its variance is m / fan_in.
- Embedding, head, norms, biases and the scalars of Mamba-2 keep rate and start.
- Logits are to be m times as large. The final norm bears the factor: it starts m times as large and
  learns m times as fast, which gives the same function and the same steps of AdamW as a factor of
  the logits, with a tied embedding as with a head. So no runtime and no checkpoint has to know.

The attention's scores need nothing where head_dim is the same at every width. Those of the
feedback, one head that grows with the model, stay divided by K^(1/2), where the rule has K, because
`benchmarks/coordinate_check.py` measures that their changes keep their size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sessa_common.config import SessaConfig
from sessa_common.train_config import TrainConfig
from sessa_common.training.muon import takes_muon

FINAL_NORM, GAIN_ROW = "model.norm.", "gamma_ctx.weight"


def width_factor(
    name: str, shape: Sequence[int], config: SessaConfig, settings: TrainConfig
) -> float:
    """Return by what the learning rate of an array is multiplied; 1 where the rule is off."""
    if settings.mup_base_width == 0:
        return 1.0
    m = settings.mup_base_width / config.hidden_size
    if takes_muon(name, shape, settings):
        return m**0.5
    is_matrix = name.startswith("model.layers.") and len(shape) == 2
    return m if is_matrix or name.startswith(FINAL_NORM) else 1.0


def scale_initial(
    weights: Mapping[str, np.ndarray], config: SessaConfig, settings: TrainConfig
) -> dict[str, np.ndarray]:
    """Return the initial weights of a new model, scaled by the rule."""
    if settings.mup_base_width == 0:
        return dict(weights)
    m = settings.mup_base_width / config.hidden_size
    factors = {name: m for name in weights if name.startswith(FINAL_NORM)}
    factors |= {name: m**0.5 for name in weights if name.endswith(GAIN_ROW)}
    return {name: value * np.float32(factors.get(name, 1)) for name, value in weights.items()}
