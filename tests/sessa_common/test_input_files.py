"""Archives and models that would fill the memory are refused before they do."""

import zipfile

import numpy as np
import pytest

from sessa_common import input_files, memory
from sessa_common.checkpoint.import_weights import read_arrays
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.config import SessaConfig
from sessa_common.errors import SessaError
from sessa_common.input_files import require_modest_archive
from sessa_common.train_config import TrainConfig


def test_an_archive_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(input_files, "FREE_BYTES", 2**20)
    path = tmp_path / "weights.npz"
    np.savez_compressed(path, weight=np.zeros(2**20, np.float32))
    with pytest.raises(SessaError, match=r"weights\.npz: .* would unpack to 4,194,432, more than"):
        read_arrays(path)
    np.savez_compressed(path, weight=np.random.default_rng(0).random(2**18))
    assert read_arrays(path)["weight"].shape == (2**18,)


def test_what_is_no_archive_passes(tmp_path):
    (tmp_path / "x").write_bytes(b"PK\x03\x04 no archive")
    require_modest_archive(tmp_path / "x")
    with zipfile.ZipFile(tmp_path / "y", "w"):
        pass
    require_modest_archive(tmp_path / "y")


def test_a_model_larger_than_the_memory_is_not_drawn(monkeypatch):
    config = SessaConfig(vocab_size=2**30, hidden_size=1024)
    with pytest.raises(SessaError, match=r"a model of 1,099,.* needs 4,09.* GiB, but this machine"):
        initial_weights(config, 0)
    monkeypatch.setattr(memory, "total_memory", lambda: None)
    memory.require_memory(2**80, "anything")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, expected at most 4096"),
        ({"rope_theta": float("inf")}, "rope_theta is inf, expected above 0 and finite"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan, expected above 0 and finite"),
    ],
)
def test_a_configuration_beyond_reason_is_refused_before_it_costs_anything(change, message):
    with pytest.raises(SessaError, match=message):
        SessaConfig.from_dict(change)


def test_whole_numbers_are_taken_for_fractions_and_nothing_else_is():
    assert repr(TrainConfig(beta1=0, weight_decay=1).beta1) == "0.0"
    for field, value in {"beta1": True, "learning_rate": "1", "seed": False, "steps": 1.0}.items():
        with pytest.raises(SessaError, match=f"{field} is "):
            TrainConfig(**{field: value})
