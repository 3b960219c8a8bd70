"""A token stream cut into training and validation rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from sessa_common.config import SessaConfig, TrainConfig
from sessa_common.data.batches import Batch, WindowOrder, next_token_batch
from sessa_common.errors import SessaError


def pack(documents: Iterable[np.ndarray], end_id: int, seed: int) -> np.ndarray:
    """Join documents in an order drawn from `seed`, each followed by `end_id`; int32 (n,)."""
    documents = list(documents)
    order = np.random.default_rng(seed).permutation(len(documents))
    end = np.array([end_id], np.int32)
    return np.concatenate([part for i in order for part in (documents[i], end)] or [end[:0]])


class TextBatches:
    """Training and validation batches of one or two token streams (a `BatchSource`).

    Without a validation stream the last `validation_fraction` of the training stream, at least one
    row, is held out. Raises SessaError when a stream is shorter than one row of window+1 tokens or
    has an id that the embedding has no row for.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        config: SessaConfig,
        settings: TrainConfig,
        validation: np.ndarray | None = None,
    ) -> None:
        self.window, self.batch_size = training_window(config, settings), settings.batch_size
        row = self.window + 1
        held_out = tokens[:0] if validation is None else validation
        _check_stream(tokens, row, config, "the training text")
        if validation is not None:
            _check_stream(validation, row, config, "the validation text")
        elif settings.validation_fraction > 0:
            cut = len(tokens) - max(round(len(tokens) * settings.validation_fraction), row)
            tokens, held_out = tokens[:cut], tokens[cut:]
            _check_stream(tokens, row, config, "the training text without its validation part")
        self.tokens, self.held_out = tokens, held_out
        self.order = WindowOrder(len(tokens), self.window, settings.seed)
        self.validation_rows = settings.evaluate_batches * settings.batch_size
        self.fingerprint = _fingerprint(tokens, held_out)

    @property
    def summary(self) -> str:
        """What is trained on, in a few words."""
        return f"{len(self.tokens):,} training tokens, window {self.window}"

    def batch(self, index: int) -> Batch:
        """Rows index * batch_size and following of the run's shuffled order."""
        first = index * self.batch_size
        starts = [self.order.start(i) for i in range(first, first + self.batch_size)]
        return next_token_batch(self._rows(self.tokens, starts))

    def validation(self) -> Sequence[Batch]:
        """The held-out rows, side by side from the start, evaluate_batches batches at most."""
        starts = range(0, len(self.held_out) - self.window, self.window)[: self.validation_rows]
        groups = [starts[i : i + self.batch_size] for i in range(0, len(starts), self.batch_size)]
        return [next_token_batch(self._rows(self.held_out, group)) for group in groups]

    def score(self, predicted: Sequence[np.ndarray]) -> dict[str, float]:
        """Nothing besides the loss."""
        return {}

    def _rows(self, stream: np.ndarray, starts: Iterable[int]) -> np.ndarray:
        return np.stack([stream[start : start + self.window + 1] for start in starts])


def training_window(config: SessaConfig, settings: TrainConfig) -> int:
    """Tokens in a training row; SessaError when that is more than the model has positions for."""
    window = settings.sequence_length or config.max_position_embeddings
    if window > config.max_position_embeddings:
        raise SessaError(
            f"sequence_length is {window}, but the model has max_position_embeddings "
            f"{config.max_position_embeddings}; choose a smaller sequence_length or a larger "
            "max_position_embeddings"
        )
    return window


def check_ids(ids: np.ndarray, config: SessaConfig, where: str) -> None:
    """Raise SessaError when a token id has no row in the embedding."""
    if len(ids) and (ids.min() < 0 or ids.max() >= config.vocab_size):
        bad = ids[(ids < 0) | (ids >= config.vocab_size)][0]
        raise SessaError(
            f"{where}: token id {bad} is out of range, expected 0 to {config.vocab_size - 1}"
        )


def _check_stream(tokens: np.ndarray, row: int, config: SessaConfig, what: str) -> None:
    if len(tokens) == 0:
        raise SessaError(f"{what} is empty: there is no document with text in it")
    if len(tokens) < row:
        raise SessaError(
            f"{what} has {len(tokens)} tokens, expected at least {row} for one window; "
            "give more text or a smaller sequence_length"
        )
    check_ids(tokens, config, what)


def _fingerprint(*streams: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for stream in streams:
        digest.update(len(stream).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(stream, np.int32).data)
    return digest.hexdigest()
