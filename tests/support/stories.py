"""A published Llama of 260 thousand parameters as a folder with and without feedback."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from sessa_common.checkpoint.conversion import convert
from sessa_common.checkpoint.sources import read_source

STORIES = Path(__file__).parents[1] / "fixtures" / "stories260K"
KEY_DIM = 16


def greedy_ids(count: int) -> list[int]:
    """The published model's likeliest ids, from `<s>` on."""
    with np.load(STORIES / "truth.npz") as truth:
        return truth["greedy"][:count].tolist()


def write_stories(folder: Path, gain: float | None = None) -> Path:
    """Write the model with feedback of this gain in every layer; None is without feedback."""
    if gain is None:
        convert(STORIES, folder)
        return folder
    convert(STORIES, folder, feedback="all", feedback_key_dim=KEY_DIM)
    if gain:
        source = read_source(folder)
        rng, weights = np.random.default_rng(0), dict(source.weights)
        for name, value in weights.items():
            if name.endswith("gamma_bias"):
                weights[name] = np.full_like(value, gain)
            elif name.endswith("gamma_ctx.weight"):
                weights[name] = rng.normal(0, gain / 4, value.shape).astype(value.dtype)
        convert(dataclasses.replace(source, weights=weights), folder, force=True)
    return folder
