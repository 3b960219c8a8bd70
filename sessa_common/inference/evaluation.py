"""Loss, perplexity and bits per byte of texts, each token scored once, with a sliding window."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from sessa_common.errors import SessaError

# Token ids (B, T) to logits (B, T, V), both NumPy: whatever runtime is behind it.
Logits = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Score:
    """Sums over documents: loss in nats, tokens scored, bytes of UTF-8 text."""

    nats: float
    tokens: int
    bytes: int
    documents: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), per token."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Loss in bits, spread over the bytes of the text: comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows (start, stop, first) over `length` targets; [start, stop) scores [first, stop).

    Windows move by `stride`; the last one is moved back to be full. Every target is scored once,
    and after the first window with at least context - stride tokens before it.
    """
    start, done = 0, 0
    while done < length:
        start = max(min(start, length - context), 0)
        stop = min(start + context, length)
        yield start, stop, done
        start, done = start + stride, stop


def score_documents(
    logits: Logits,
    documents: Iterable[tuple[np.ndarray, int]],
    *,
    start_id: int,
    context: int,
    stride: int | None = None,
    batch_size: int = 8,
) -> Score:
    """Score documents given as (token ids, bytes of their text), each from its own beginning.

    The first token of a document is predicted from `start_id`, the end token that precedes
    documents in training. `stride` is half the context unless given. Raises SessaError for a stride
    that does not fit and when there is nothing to score.
    """
    stride = stride or max(context // 2, 1)
    if not 0 < stride <= context:
        raise SessaError(f"stride is {stride}, expected from 1 to the context of {context}")
    nats, tokens, size, count = 0.0, 0, 0, 0

    def rows() -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        nonlocal tokens, size, count
        for ids, text_bytes in documents:
            if len(ids) == 0:
                continue
            tokens, size, count = tokens + len(ids), size + text_bytes, count + 1
            inputs = np.concatenate([[start_id], ids[:-1]])
            for start, stop, first in windows(len(ids), context, stride):
                yield inputs[start:stop], ids[start:stop], first - start

    pending = rows()
    while group := list(islice(pending, batch_size)):
        nats += _group_loss(logits, group, start_id)
    if tokens == 0:
        raise SessaError("the evaluation text is empty: there is no document with text in it")
    return Score(nats=nats, tokens=tokens, bytes=size, documents=count)


def _group_loss(
    logits: Logits, group: list[tuple[np.ndarray, np.ndarray, int]], filler: int
) -> float:
    # Filling up on the right changes nothing: a causal model does not see it.
    inputs = np.full((len(group), max(len(row[0]) for row in group)), filler, np.int32)
    for i, (ids, _, _) in enumerate(group):
        inputs[i, : len(ids)] = ids
    out = logits(inputs)
    return sum(
        token_losses(out[i, first : len(targets)], targets[first:]).sum()
        for i, (_, targets, first) in enumerate(group)
    )


def token_losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] of each row, in nats, float64; logits (T, V), targets (T,)."""
    wide = logits.astype(np.float64)
    top = wide.max(-1)
    total = np.log(np.exp(wide - top[:, None]).sum(-1)) + top
    return total - np.take_along_axis(wide, targets[:, None], -1)[:, 0]
