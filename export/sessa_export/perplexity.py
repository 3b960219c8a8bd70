"""Cost of fewer bits: perplexity of one text before and after quantization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sessa_common.config import SessaConfig
from sessa_common.data.encoding import encode_documents
from sessa_common.data.sources import read_documents
from sessa_common.data.tokenizer import check_fits, read_tokenizer
from sessa_common.errors import SessaError
from sessa_common.inference.evaluation import Score, score_documents
from sessa_common.inference.generation import Decoder

# Enough for two digits of a ratio, few enough for a check at every export.
MOST_TOKENS = 8192
# Tokens read at once, at most.
WINDOW = 1024
# Most that the perplexity may grow by before an export is refused as broken.
MOST_GROWTH = {"fp16": 1.02, "int8": 1.1, "int4": 1.5}

Document = tuple[np.ndarray, int]  # token ids (n,) and bytes of text


@dataclass(frozen=True)
class Cost:
    """Perplexity of the same tokens with float32 weights and with the exported ones."""

    data: tuple[str, ...]
    tokens: int
    fp32: float
    exported: float

    @property
    def growth(self) -> float:
        """1.05 stands for a perplexity 5 % higher."""
        return self.exported / self.fp32


def read_text(source: Path, config: SessaConfig, data: Sequence[str]) -> list[Document]:
    """The first tokens of the texts in `data`, MOST_TOKENS at most; none without a tokenizer.

    Raises SessaError for data that cannot be read and a tokenizer that does not fit the model.
    """
    if not (source / "tokenizer.json").is_file():
        return []
    documents, room = [], MOST_TOKENS
    tokenizer = read_tokenizer(source)
    check_fits(tokenizer, config, str(source))
    for ids, size in encode_documents(tokenizer, read_documents(data)):
        documents.append((ids[:room], size))
        room -= len(ids)
        if room <= 0:
            break
    return documents


def measure_cost(
    before: Decoder, after: Decoder, documents: Sequence[Document], data: Sequence[str]
) -> Cost:
    """Score the documents with both models."""
    scores = [_score(decoder, documents) for decoder in (before, after)]
    return Cost(tuple(data), scores[0].tokens, scores[0].perplexity, scores[1].perplexity)


def _score(decoder: Decoder, documents: Sequence[Document]) -> Score:
    config = decoder.config

    def logits(tokens: np.ndarray) -> np.ndarray:
        decoder.reset()
        return decoder.logits(tokens)

    # Any token may stand before the first one here: both models read the same.
    start = config.eos_token_id or 0
    context = min(config.max_position_embeddings, WINDOW)
    return score_documents(logits, documents, start_id=start, context=context, batch_size=1)


def require_cost(cost: Cost, dtype: str, where: str) -> None:
    """Raise SessaError when the exported model predicts the text much worse than the checkpoint."""
    if not cost.growth <= MOST_GROWTH[dtype]:
        raise SessaError(
            f"{where}: {dtype} raises the perplexity from {cost.fp32:.3f} to {cost.exported:.3f}, "
            f"expected at most {MOST_GROWTH[dtype]:g} times; use another `dtype`; "
            "nothing was written"
        )
