"""Loss, perplexity and bits per byte of texts, each token scored once, with a sliding window."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from sessa_common.data.corpus import check_ids
from sessa_common.data.encoding import DroppedText, encode_documents
from sessa_common.data.sources import ReadCounts, TextSource, read_documents
from sessa_common.errors import SessaError, expect
from sessa_common.inference.model_tokenizer import ModelTokenizer

# A function from token ids (B, T) to logits (B, T, V), both NumPy, of any runtime.
Logits = Callable[[np.ndarray], np.ndarray]
# Above this loss in nats exp leaves the range of a float.
LARGEST_LOSS = 700.0


def perplexity(loss: float) -> float:
    """exp(loss) of a loss in nats per token, exp(700) for larger ones."""
    return math.exp(min(loss, LARGEST_LOSS))


@dataclass(frozen=True, kw_only=True)
class Score:
    """Sums over documents: loss in nats, tokens scored, bytes of UTF-8 text.

    `skipped_rows` held null, `skipped_documents` nothing that the tokenizer knows; `dropped_bytes`
    are parts of the other documents that it has no token for. `notes` say so, one sentence each.
    """

    nats: float
    tokens: int
    bytes: int
    documents: int
    skipped_rows: int = 0
    skipped_documents: int = 0
    dropped_bytes: int = 0
    notes: tuple[str, ...] = ()

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), per token."""
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Loss in bits over the bytes of the text, which is comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes


def evaluate_texts(
    logits: Logits,
    tokenizer: ModelTokenizer,
    data: Path | str | Sequence[Path | str],
    source: TextSource,
    *,
    sequence_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> Score:
    """Score the texts that `data` names (see `read_documents`) with a model's logits.

    A window of `sequence_length` tokens, the whole context unless given, slides over long texts.
    The other arguments are those of `score_documents`. Raises SessaError.
    """
    config, context = tokenizer.config, tokenizer.config.max_position_embeddings
    window = sequence_length if sequence_length is not None else context
    expect(
        0 < window <= context,
        "sequence_length",
        window,
        f"from 1 to the model's context of {context}",
    )
    expect(batch_size > 0, "batch_size", batch_size, "1 or more")

    names = [str(name) for name in ([data] if isinstance(data, (Path, str)) else data)]
    counts, dropped = ReadCounts(), DroppedText()

    def documents() -> Iterator[tuple[np.ndarray, int]]:
        texts = read_documents(names, source, counts)
        empty = True
        for ids, size in encode_documents(tokenizer.tokenizer, texts, dropped):
            check_ids(ids, config, "the evaluation text")
            empty = False
            yield ids, size
        if empty:
            left_out = [*counts.notes(), *dropped.notes()]
            raise SessaError("; ".join(["the evaluation text is empty", *left_out]))

    score = score_documents(
        logits,
        documents(),
        start_id=tokenizer.start_id,
        context=window,
        stride=stride,
        batch_size=batch_size,
    )
    return dataclasses.replace(
        score,
        skipped_rows=counts.null_rows,
        skipped_documents=counts.blank + dropped.documents,
        dropped_bytes=dropped.bytes,
        notes=(*counts.notes(), *dropped.notes()),
    )


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield windows (start, stop, first) over `length` targets; each scores [first, stop).

    A window covers [start, stop). Windows move by `stride`; the last one is moved back to be full.
    Every target is scored once, and after the first window it has at least context - stride tokens
    before it.
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
    stride = max(context // 2, 1) if stride is None else stride
    expect(0 < stride <= context, "stride", stride, f"from 1 to the context of {context}")
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
    # Padding on the right changes nothing, because a causal model does not see it.
    inputs = np.full((len(group), max(len(row[0]) for row in group)), filler, np.int32)
    for i, (ids, _, _) in enumerate(group):
        inputs[i, : len(ids)] = ids
    out = logits(inputs)
    return sum(
        token_losses(out[i, first : len(targets)], targets[first:]).sum()
        for i, (_, targets, first) in enumerate(group)
    )


def token_losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return -log softmax(logits)[target] of each row, in nats, float64 (T,).

    logits are (T, V), targets (T,).
    """
    wide = logits.astype(np.float64)
    top = wide.max(-1)
    total = np.log(np.exp(wide - top[:, None]).sum(-1)) + top
    return total - np.take_along_axis(wide, targets[:, None], -1)[:, 0]
