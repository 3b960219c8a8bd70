"""A weight that is NaN or infinite is found by name, whichever way a model is read."""

import numpy as np
import pytest

from sessa_common.checkpoint import finite
from sessa_common.checkpoint.finite import require_finite
from sessa_common.checkpoint.folder import NUMPY_DTYPES, load_weights, save_weights
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.checkpoint.sources import read_source
from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError

BAD = "model.layers.0.W_in.weight"


@pytest.mark.parametrize("dtype", NUMPY_DTYPES.values(), ids=str)
def test_the_first_bad_number_is_placed(dtype, monkeypatch):
    monkeypatch.setattr(finite, "BLOCK", 7)
    array = np.zeros((4, 5), dtype)
    require_finite("w", array, "here")
    array[2, 3] = -np.inf
    array[3, 0] = np.nan
    with pytest.raises(SessaError, match=r"here: w holds infinity at index \(2, 3\)"):
        require_finite("w", array, "here")
    with pytest.raises(SessaError, match=r"w holds NaN at index \(\)"):
        require_finite("w", np.array(np.nan, dtype), "here")


@pytest.mark.parametrize("read", [load_weights, read_source], ids=["folder", "source"])
def test_reading_a_folder_names_the_tensor(read, tmp_path):
    config = SessaConfig(vocab_size=16, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    weights = initial_weights(config, 0)
    save_weights(tmp_path, config, weights)
    read(tmp_path)
    weights[BAD][1, 2] = np.nan
    save_weights(tmp_path, config, weights)
    with pytest.raises(SessaError, match=rf"{BAD} holds NaN at index \(1, 2\)"):
        read(tmp_path)
