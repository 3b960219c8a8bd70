"""Evaluation in PyTorch: loss, perplexity and bits per byte of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from sessa_common.checkpoint.adapters import text_folder
from sessa_common.data.sources import TextSource
from sessa_common.errors import SessaError
from sessa_common.inference.evaluation import Score, evaluate_texts
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_torch.checkpoint import load_model, to_numpy
from sessa_torch.model import SessaForCausalLM


def evaluate(
    model: SessaForCausalLM | Path | str,
    data: Path | str | Sequence[Path | str],
    *,
    tokenizer: Tokenizer | Path | str | None = None,
    text_field: str = "text",
    split: str = "test",
    subset: str | None = None,
    max_documents: int = 0,
    parse_special_tokens: bool = False,
    sequence_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    adapter: Path | str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> Score:
    """Score texts with a model or with the model of a checkpoint folder.

    `data` names files, folders or data sets as in training; text_field, split, subset and
    max_documents say how to read them, and parse_special_tokens reads the name of a special token
    in a text as the token. A window of `sequence_length` tokens (the whole context)
    moves by `stride` (half the window). A model in memory needs a `tokenizer` (or a folder that has
    one). `adapter` is a folder of `finetune` that changes the model of a checkpoint folder. Raises
    SessaError.
    """
    if isinstance(model, (Path, str)):
        tokenizer = text_folder(model, adapter) if tokenizer is None else tokenizer
        model = load_model(model, adapter=adapter, dtype=dtype, device=device)
    elif any(given is not None for given in (adapter, dtype, device)):
        raise SessaError(
            "`adapter`, `dtype` and `device` are for a folder; the model in memory has its own"
        )
    source = TextSource(
        text_field=text_field, split=split, subset=subset, max_documents=max_documents
    )
    return evaluate_texts(
        logits_function(model),
        ModelTokenizer.open(tokenizer, model.config, parse_special_tokens),
        data,
        source,
        sequence_length=sequence_length,
        stride=stride,
        batch_size=batch_size,
    )


def logits_function(model: SessaForCausalLM) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from token ids (B, T) to logits (B, T, V) float32, both NumPy."""
    device = next(model.parameters()).device

    @torch.inference_mode()
    def logits(ids: np.ndarray) -> np.ndarray:
        return to_numpy(model(torch.as_tensor(ids, dtype=torch.long, device=device)).float())

    return logits
