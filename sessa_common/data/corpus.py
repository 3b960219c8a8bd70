"""Documents packed into one sequence of tokens, and its training and validation rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from sessa_common.config import SessaConfig
from sessa_common.data.batches import Batch, RowOrder, next_token_batch
from sessa_common.data.sources import ReadCounts, TextSource, read_documents
from sessa_common.data.tokenizer import DroppedText, encode_documents
from sessa_common.errors import SessaError
from sessa_common.memory import require_memory
from sessa_common.train_config import TrainConfig

# Receives a few words about what goes on.
Tell = Callable[[str], None]
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


def read_text_batches(
    tokenizer: Tokenizer,
    end_id: int,
    config: SessaConfig,
    settings: TrainConfig,
    tell: Tell = say_nothing,
) -> TextBatches:
    """Read and tokenize the text of a training run; its notes say what was left out.

    `tell` is called with a few words while the text is read.

    Raises SessaError for text that cannot be read and as `TextBatches` does.
    """
    notes: list[str] = []

    def packed(names: Sequence[str], what: str) -> np.ndarray:
        counts, dropped = ReadCounts(), DroppedText()
        texts = told(
            read_documents(names, TextSource.of(settings), counts), f"tokenizing {what}", tell
        )
        # The order does not follow the run's seed, so that every seed holds out the same documents.
        tokens = pack((ids for ids, _ in encode_documents(tokenizer, texts, dropped)), end_id, 0)
        left_out = counts.notes() + dropped.notes()
        if len(tokens) == 0:
            raise SessaError("; ".join([f"{what} is empty", *left_out]))
        notes.extend(f"{what}: {note}" for note in left_out)
        return tokens

    validation = None
    if settings.validation_data:
        validation = packed(settings.validation_data, "the validation text")
    tokens = packed(settings.data, "the training text")
    return TextBatches(tokens, config, settings, validation, notes=notes)


class TextBatches:
    """Training and validation batches of one or two packed sequences (a `BatchSource`).

    Without a validation sequence the last `validation_fraction` of the training sequence, at least
    one row, is held out. Raises SessaError when a sequence is shorter than one row of
    sequence_length+1 tokens or has an id that the embedding has no row for.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        config: SessaConfig,
        settings: TrainConfig,
        validation: np.ndarray | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.sequence_length = training_sequence_length(config, settings)
        self.batch_size, self.notes = settings.batch_size, notes
        row = self.sequence_length + 1
        # Inputs, targets and their weights take 4 bytes a token each.
        require_memory(12 * row * self.batch_size, f"a batch of {self.batch_size:,} rows")
        held_out = tokens[:0] if validation is None else validation
        _check_tokens(tokens, row, config, "the training text")
        if validation is not None:
            _check_tokens(validation, row, config, "the validation text")
        elif settings.validation_fraction > 0:
            cut = len(tokens) - max(round(len(tokens) * settings.validation_fraction), row)
            if cut < row:
                raise SessaError(
                    f"the training text has {len(tokens)} tokens, too few for a training row and "
                    f"a validation row of {row} each; give more text, a smaller "
                    "`sequence_length`, a `validation_fraction` of 0, or `validation_data`"
                )
            tokens, held_out = tokens[:cut], tokens[cut:]
        self.tokens, self.held_out = tokens, held_out
        self.order = RowOrder(len(tokens), self.sequence_length, settings.seed)
        self.validation_rows = settings.evaluate_batches * settings.batch_size
        self.fingerprint = _fingerprint(tokens, held_out)

    @property
    def summary(self) -> str:
        """The number of training tokens and the length of a row."""
        return f"{len(self.tokens):,} training tokens, rows of {self.sequence_length}"

    def batch(self, index: int) -> Batch:
        """Rows index * batch_size and following of the run's shuffled order."""
        first = index * self.batch_size
        starts = [self.order.start(i) for i in range(first, first + self.batch_size)]
        return next_token_batch(self._rows(self.tokens, starts))

    def validation(self) -> Sequence[Batch]:
        """The held-out rows in their order, evaluate_batches batches at most."""
        length = self.sequence_length
        starts = range(0, len(self.held_out) - length, length)[: self.validation_rows]
        groups = [starts[i : i + self.batch_size] for i in range(0, len(starts), self.batch_size)]
        return [next_token_batch(self._rows(self.held_out, group)) for group in groups]

    def score(self, predicted: Sequence[np.ndarray]) -> dict[str, float]:
        """Nothing: text has no measure besides the loss."""
        return {}

    def _rows(self, tokens: np.ndarray, starts: Iterable[int]) -> np.ndarray:
        return np.stack([tokens[start : start + self.sequence_length + 1] for start in starts])


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


def _check_tokens(tokens: np.ndarray, row: int, config: SessaConfig, what: str) -> None:
    if len(tokens) == 0:
        raise SessaError(f"{what} is empty")
    if len(tokens) < row:
        raise SessaError(
            f"{what} has {len(tokens)} tokens, expected at least {row} for one row; "
            "give more text or a smaller `sequence_length`"
        )
    check_ids(tokens, config, what)


def _fingerprint(*sequences: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tokens in sequences:
        digest.update(len(tokens).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(tokens, np.int32).data)
    return digest.hexdigest()
