"""Two small trained models of one byte vocabulary: a model, and a draft model that guesses for it.

They learn two pages of text by heart, but not quite: their greedy texts are long and wander, and
close calls are frequent.
"""

from __future__ import annotations

import re
from pathlib import Path
from pydoc_data.topics import topics

import sessa_torch

# Lines of stars under a heading would be repeated for ever.
TEXT = re.sub(r"\*{3,}", "", topics["lambda"] + topics["assert"] + topics["pass"])
MODEL = {
    "layer_kinds": ("sessa", "sessa_transformer"),
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "steps": 250,
}
DRAFT = {"num_hidden_layers": 1, "hidden_size": 32, "steps": 120}


def train_models(folder: Path) -> tuple[Path, Path]:
    """Train both in about 20 seconds and return their run folders, the draft model's last."""
    text = folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    return _train(folder / "model", text, MODEL), _train(folder / "draft", text, DRAFT)


def _train(out: Path, text: Path, fields: dict) -> Path:
    return sessa_torch.train(
        out,
        data=text,
        validation_data=text,
        tokenizer="bytes",
        num_attention_heads=4,
        max_position_embeddings=640,
        tie_word_embeddings=False,
        sequence_length=128,
        batch_size=4,
        warmup_steps=10,
        learning_rate=0.01,
        weight_decay=0.0,
        evaluate_every=0,
        checkpoint_every=0,
        device="cpu",
        **fields,
    ).folder
