"""A small model of three kinds of layers, and a random adapter for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from sessa_common.checkpoint.adapters import adapter_config, write_adapter
from sessa_common.checkpoint.folder import save_weights
from sessa_common.checkpoint.initialization import initial_weights
from sessa_common.config import SessaConfig
from sessa_common.data.tokenizer import BYTES_END_ID, byte_tokenizer, write_tokenizer
from sessa_common.train_config import TrainConfig
from sessa_common.training.trained_parameters import trained_shapes

CONFIG = SessaConfig(
    vocab_size=257,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    layer_kinds=("sessa", "mamba2", "sessa_transformer"),
    mamba_d_head=4,
    mamba_d_state=6,
    max_position_embeddings=48,
    bos_token_id=BYTES_END_ID,
    eos_token_id=BYTES_END_ID,
    pad_token_id=BYTES_END_ID,
)
IDS = np.random.default_rng(0).integers(0, 256, (2, 17))


def write_model(folder: Path) -> Path:
    """Write the model with initial weights and the byte tokenizer."""
    folder.mkdir()
    write_tokenizer(folder, byte_tokenizer(), BYTES_END_ID, CONFIG.max_position_embeddings)
    save_weights(folder, CONFIG, initial_weights(CONFIG, 1))
    return folder


def write_random_adapter(folder: Path, train: str = "feedback+lora") -> Path:
    """Write an adapter of rank 3 and scale 5/3, every array of it random."""
    folder.mkdir()
    lora = {"lora_rank": 3, "lora_alpha": 5.0} if "lora" in train else {}
    settings = TrainConfig(train=train, **lora)
    shapes, rng = trained_shapes(CONFIG, settings), np.random.default_rng(1)
    write_adapter(
        folder,
        {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()},
    )
    keys = adapter_config(list(shapes), "base", settings.lora_rank, settings.lora_alpha)
    (folder / "adapter_config.json").write_text(json.dumps(keys), encoding="utf-8")
    return folder
