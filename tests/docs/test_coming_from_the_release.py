"""The code of the page "Coming from the author's release" runs on weights of the release."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from support.golden_cases import golden_case, relative_error

from sessa_common.checkpoint.folder import load_weights
from sessa_torch.model import SessaLayer

PAGE = Path(__file__).parents[2] / "docs" / "coming-from-the-release.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def write_release_file(path: Path, params: dict[str, np.ndarray]) -> None:
    """Write what `torch.save` makes of the release's layer: parameters, frequencies and masks."""
    state = {name: torch.tensor(value, dtype=torch.float32) for name, value in params.items()}
    state["mixer.rope_inv_freq"] = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    square = torch.ones(64, 64, dtype=torch.bool)
    state["mixer.causal_mask_f_full"] = square.triu(1)
    state["mixer.causal_mask_fb_full"] = square.triu(0)
    torch.save(state, path)


def test_the_page_runs_and_loads_the_layer_of_the_release(tmp_path, monkeypatch):
    golden = golden_case("base")
    write_release_file(tmp_path / "layer.pt", golden.params)
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": PAGE.name}
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    layer = names["layer"]
    assert isinstance(layer, SessaLayer)
    with torch.no_grad():
        y = layer(torch.tensor(golden.arrays["x"], dtype=torch.float32))
    assert relative_error(y.numpy(), golden.arrays["y"]) <= 1e-5
    config, weights = load_weights(tmp_path / "my-model")
    assert config.layer_kinds == "sessa" and config.num_attention_heads == 4
    assert config.max_position_embeddings == 64
    for name, value in golden.params.items():
        stored = weights[f"model.layers.0.{name}"]
        assert stored.tobytes() == value.astype(np.float32).tobytes(), name
