"""Documents packed into one sequence of tokens, and its training and validation rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from sessa_common.config import SessaConfig
from sessa_common.data.batches import ALL_ROWS, Batch, next_token_batch
from sessa_common.data.encoding import DroppedText, encode_documents
from sessa_common.data.row_order import MixtureOrder, RowOrder
from sessa_common.data.sources import ReadCounts, TextSource, read_documents, split_weights
from sessa_common.data.token_shards import TokenShards, is_token_folder
from sessa_common.data.tokenizer import read_tokenizer
from sessa_common.errors import SessaError
from sessa_common.memory import require_memory
from sessa_common.train_config import TrainConfig

# Receives a few words about what goes on.
Tell = Callable[[str], None]
# A packed sequence: an array in memory, or one on disk.
Tokens = np.ndarray | TokenShards
TOLD_EVERY = 1_000_000


def pack(documents: Iterable[np.ndarray], end_id: int, seed: int) -> np.ndarray:
    """Join documents in an order drawn from `seed`, each followed by `end_id`; int32 (n,)."""
    documents = list(documents)
    order = np.random.default_rng(seed).permutation(len(documents))
    end = np.array([end_id], np.int32)
    return np.concatenate([part for i in order for part in (documents[i], end)] or [end[:0]])


def say_nothing(activity: str) -> None:
    """Ignore words about progress."""


def told(texts: Iterable[str], activity: str, tell: Tell) -> Iterator[str]:
    """Pass texts on and tell, every million characters, how many of them there were."""
    count, next_count = 0, 0
    for text in texts:
        yield text
        count += len(text)
        if count >= next_count:
            tell(f"{activity}: {count:,} characters")
            next_count = count + TOLD_EVERY


@dataclass(frozen=True)
class Corpus:
    """The packed sequences of a run: their tokens and their weights in a mixture.

    A sequence is an int32 array or a `TokenShards`.
    """

    sequences: Sequence[Tokens]
    weights: Sequence[float]
    notes: Sequence[str] = ()


def read_corpus(
    tokenizer: Tokenizer,
    end_id: int,
    names: Sequence[str],
    source: TextSource,
    what: str,
    tell: Tell = say_nothing,
    begin: Sequence[int] = (),
) -> Corpus:
    """Read and tokenize the texts of `names`, and open those that are folders of tokens.

    Texts without weights become one sequence, every other name becomes one of its own. Without
    weights a sequence has the weight of its number of tokens. A document stands between the ids
    `begin` and the end token. Raises SessaError for text that
    cannot be read, for an empty one, and for tokens of another tokenizer.
    """
    names, weights = split_weights(names)
    notes: list[str] = []

    def packed(names: Sequence[str]) -> np.ndarray:
        counts, dropped = ReadCounts(), DroppedText()
        texts = told(read_documents(names, source, counts), f"tokenizing {what}", tell)
        # The order does not follow the run's seed, so that every seed holds out the same documents.
        documents = encode_documents(tokenizer, texts, dropped, begin)
        tokens = pack((ids for ids, _ in documents), end_id, 0)
        left_out = counts.notes() + dropped.notes()
        if len(tokens) == 0:
            raise SessaError("; ".join([f"{what} is empty", *left_out]))
        notes.extend(f"{what}: {note}" for note in left_out)
        return tokens

    texts = [name for name in names if not is_token_folder(name)]
    groups = [[name] for name in names] if weights else [texts] if texts else []
    if not weights:
        groups += [[name] for name in names if is_token_folder(name)]
    sequences: list[Tokens] = []
    for group in groups:
        if is_token_folder(group[0]):
            sequences.append(_open_tokens(group[0], tokenizer, end_id, begin))
        else:
            sequences.append(packed(group))
    return Corpus(sequences, weights or [len(tokens) for tokens in sequences], notes)


def _open_tokens(name: str, tokenizer: Tokenizer, end_id: int, begin: Sequence[int]) -> TokenShards:
    """The tokens of a folder; SessaError when another tokenizer than the run's made them."""
    shards = TokenShards(name)
    own = read_tokenizer(name)
    bounds = (shards.begin_ids, shards.end_id)
    if bounds != (list(begin), end_id) or own.get_vocab() != tokenizer.get_vocab():
        raise SessaError(
            f"{name}: these tokens are of another tokenizer than the model's; tokenize the text "
            "again with the tokenizer of the model"
        )
    return shards


def read_text_batches(
    tokenizer: Tokenizer,
    end_id: int,
    config: SessaConfig,
    settings: TrainConfig,
    tell: Tell = say_nothing,
    begin: Sequence[int] = (),
) -> TextBatches:
    """Read and tokenize the text of a training run; its notes say what was left out.

    The ids `begin` stand before every document, and `end_id` behind it. `tell` is called with a few
    words while the text is read.

    Raises SessaError as `read_corpus` and `TextBatches` do.
    """

    def read(names: Sequence[str], what: str) -> Corpus:
        return read_corpus(tokenizer, end_id, names, TextSource.of(settings), what, tell, begin)

    validation = None
    if settings.validation_data:
        validation = read(settings.validation_data, "the validation text")
    corpus = read(settings.data, "the training text")
    return TextBatches(corpus, config, settings, validation, end_id=end_id)


class TextBatches:
    """Training and validation batches of packed sequences (a `BatchSource`).

    Without validation sequences the last `validation_fraction` of every training sequence, at least
    one row, is held out. With `documents` "separate" and an `end_id` the documents that this token
    ends do not read each other. Raises SessaError when a sequence is shorter than one row of
    sequence_length+1 tokens or has an id that the embedding has no row for.
    """

    def __init__(
        self,
        tokens: Corpus | np.ndarray,
        config: SessaConfig,
        settings: TrainConfig,
        validation: Corpus | None = None,
        *,
        end_id: int | None = None,
    ) -> None:
        corpus = tokens if isinstance(tokens, Corpus) else Corpus([tokens], [1.0])
        self.sequence_length = training_sequence_length(config, settings)
        self.batch_size = settings.batch_size
        self.end_id = end_id if settings.documents == "separate" else None
        self.notes = [note for part in (validation, corpus) if part for note in part.notes]
        row = self.sequence_length + 1
        # Inputs, targets and their weights take 4 bytes a token each.
        require_memory(12 * row * self.batch_size, f"a batch of {self.batch_size:,} rows")
        for sequence in corpus.sequences:
            _check_tokens(sequence, row, config, "the training text")
        for sequence in validation.sequences if validation else ():
            _check_tokens(sequence, row, config, "the validation text")
        cuts = [len(sequence) for sequence in corpus.sequences]
        if validation is None and settings.validation_fraction > 0:
            cuts = [_cut(len(x), row, settings.validation_fraction) for x in corpus.sequences]
        parts = list(zip(corpus.sequences, cuts, strict=True))
        self.training = [Span(tokens, 0, cut) for tokens, cut in parts]
        self.held_out = [Span(tokens, cut, len(tokens)) for tokens, cut in parts]
        held_weights = corpus.weights
        if validation is not None:
            self.held_out = [Span(tokens, 0, len(tokens)) for tokens in validation.sequences]
            held_weights = validation.weights
        self.orders = [RowOrder(cut, self.sequence_length, settings.seed) for cut in cuts]
        self.mixture = MixtureOrder(corpus.weights, settings.seed)
        rows = settings.evaluate_batches * settings.batch_size
        self.validation_starts = self._validation_starts(rows, held_weights)
        self.fingerprint = _fingerprint(corpus, self.training, self.held_out)
        if self.end_id is not None:
            self.fingerprint += ", separate documents"

    @property
    def summary(self) -> str:
        """The number of training tokens and the length of a row."""
        total = sum(len(span) for span in self.training)
        return f"{total:,} training tokens, rows of {self.sequence_length}"

    def batch(self, index: int, rows: slice = ALL_ROWS) -> Batch:
        """Rows index * batch_size and following of the run's shuffled order."""
        first = index * self.batch_size
        numbers = range(first, first + self.batch_size)[rows]
        return self._batch([self._training_row(number) for number in numbers])

    def validation(self) -> Sequence[Batch]:
        """The first held-out rows of every sequence, evaluate_batches batches at most."""
        rows = [
            self._row(span, start)
            for span, starts in zip(self.held_out, self.validation_starts, strict=True)
            for start in starts
        ]
        size = self.batch_size
        return [self._batch(rows[i : i + size]) for i in range(0, len(rows), size)]

    def score(self, predicted: Sequence[np.ndarray]) -> dict[str, float]:
        """Nothing: text has no measure besides the loss."""
        return {}

    def _training_row(self, number: int) -> np.ndarray:
        part, own = self.mixture.locate(number)
        return self._row(self.training[part], self.orders[part].start(own))

    def _row(self, span: Span, start: int) -> np.ndarray:
        return span.read(start, self.sequence_length + 1)

    def _batch(self, rows: Sequence[np.ndarray]) -> Batch:
        return next_token_batch(np.stack([row.astype(np.int32) for row in rows]), self.end_id)

    def _validation_starts(self, rows: int, weights: Sequence[float]) -> list[range]:
        """Starts of the held-out rows of every sequence, in the shares of the mixture."""
        length = self.sequence_length
        return [
            range(0, len(span) - length, length)[: math.ceil(rows * weight / sum(weights))]
            for span, weight in zip(self.held_out, weights, strict=True)
        ]


@dataclass(frozen=True)
class Span:
    """A part of a sequence, from token `start` to before `stop`."""

    tokens: Tokens
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens of the span, (count,)."""
        return self.tokens[self.start + start : self.start + start + count]


def _cut(length: int, row: int, fraction: float) -> int:
    """The place in a sequence where its held-out part begins."""
    cut = length - max(round(length * fraction), row)
    if cut < row:
        raise SessaError(
            f"the training text has {length} tokens, too few for a training row and "
            f"a validation row of {row} each; give more text, a smaller "
            "`sequence_length`, a `validation_fraction` of 0, or `validation_data`"
        )
    return cut


def training_sequence_length(config: SessaConfig, settings: TrainConfig) -> int:
    """Tokens in a training row; SessaError when that is more than the model has positions for."""
    length = settings.sequence_length or config.max_position_embeddings
    if length > config.max_position_embeddings:
        raise SessaError(
            f"sequence_length is {length}, but the model has max_position_embeddings "
            f"{config.max_position_embeddings}; choose a smaller `sequence_length` or a larger "
            "`max_position_embeddings`"
        )
    return length


def check_ids(ids: np.ndarray, config: SessaConfig, where: str) -> None:
    """Raise SessaError when a token id has no row in the embedding."""
    if len(ids) and (ids.min() < 0 or ids.max() >= config.vocab_size):
        bad = ids[(ids < 0) | (ids >= config.vocab_size)][0]
        raise SessaError(
            f"{where}: token id {bad} is out of range, expected 0 to {config.vocab_size - 1}"
        )


def _check_tokens(tokens: Tokens, row: int, config: SessaConfig, what: str) -> None:
    if len(tokens) == 0:
        raise SessaError(f"{what} is empty")
    if len(tokens) < row:
        raise SessaError(
            f"{what} has {len(tokens)} tokens, expected at least {row} for one row; "
            "give more text or a smaller `sequence_length`"
        )
    ids = np.array([tokens.largest_id]) if isinstance(tokens, TokenShards) else tokens
    check_ids(ids, config, what)


def _fingerprint(corpus: Corpus, training: Sequence[Span], held_out: Sequence[Span]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for span in (*training, *held_out):
        digest.update(len(span).to_bytes(8, "little"))
        if isinstance(span.tokens, TokenShards):
            digest.update(f"{span.tokens.fingerprint} {span.start}".encode())
        else:
            tokens = span.tokens[span.start : span.stop]
            digest.update(np.ascontiguousarray(tokens, np.int32).data)
    if len(training) > 1:
        digest.update(repr(list(map(float, corpus.weights))).encode())
    return digest.hexdigest()
