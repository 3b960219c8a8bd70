"""Training text that is read while it trains, from a Hugging Face data set that fits no disk.

Documents come in the order of the data set, without a shuffle buffer, and are packed one after the
other. A save keeps the place of the data set and of the token in its document, so that a run goes
on with the next token. Every process reads the whole stream, so that the rows are the same for any
number of processes.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sessa_common.config import SessaConfig
from sessa_common.data.batches import ALL_ROWS, Batch, next_token_batch
from sessa_common.data.corpus import (
    Tell,
    TextBatches,
    read_corpus,
    read_text_batches,
    say_nothing,
    training_sequence_length,
)
from sessa_common.data.encoding import encode_texts
from sessa_common.data.formats import field_of
from sessa_common.data.sources import STREAM_PREFIX, TextSource, hub_errors, open_hub
from sessa_common.errors import require
from sessa_common.train_config import TrainConfig

# Documents that are tokenized at once, and whose text tells one data set from another.
DOCUMENTS = 64
# Batches whose place is remembered: a save asks for the one that comes next.
PLACES = 1024


def is_stream(names: Sequence[str]) -> bool:
    """Return True for the data of a `StreamBatches`; SessaError when other data stand beside it."""
    streams = [name for name in names if name.startswith(STREAM_PREFIX)]
    require(
        not streams or len(names) == 1,
        f"`data` has {', '.join(streams)} beside other names; a stream is read alone, in its order",
    )
    return bool(streams)


def read_batches(
    tokenizer: Tokenizer,
    end_id: int,
    config: SessaConfig,
    settings: TrainConfig,
    tell: Tell = say_nothing,
    begin: Sequence[int] = (),
) -> TextBatches | StreamBatches:
    """Read the text of a training run as `read_text_batches` does, or open it as a stream."""
    require(not is_stream(settings.validation_data), "`validation_data` is a stream; give a file")
    if not is_stream(settings.data):
        return read_text_batches(tokenizer, end_id, config, settings, tell, begin)
    validation = None
    if names := settings.validation_data:
        source, what = TextSource(text_field=settings.text_field), "the validation text"
        corpus = read_corpus(tokenizer, end_id, names, source, what, tell, begin)
        validation = TextBatches(corpus, config, settings, corpus, end_id=end_id)
    return StreamBatches(tokenizer, end_id, config, settings, validation, begin)


class StreamBatches:
    """Training batches of the documents of a data set, in its order (a `BatchSource`).

    `batch` must be called with numbers that follow each other; `place` and `seek` take a run up
    where it was saved. The fingerprint follows the name, the commit on the hub and the first
    documents, because the whole is never read. Held-out text is `validation`; a stream has no end
    that could be held out. The data set begins anew when it ends.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        end_id: int,
        config: SessaConfig,
        settings: TrainConfig,
        validation: TextBatches | None = None,
        begin: Sequence[int] = (),
    ) -> None:
        fraction = settings.validation_fraction
        require(
            validation is not None or fraction == 0,
            f"`validation_fraction` is {fraction:g}, but a stream has no end that could be held "
            "out; give `validation_data`, or a fraction of 0",
        )
        require(settings.max_documents == 0, "`max_documents` ends no stream; give hf: as the name")
        self.name = settings.data[0].removeprefix(STREAM_PREFIX)
        self.source, self.tokenizer = TextSource.of(settings), tokenizer
        self.begin, self.end = np.array(begin, np.int32), np.array([end_id], np.int32)
        self.length, self.size = training_sequence_length(config, settings), settings.batch_size
        self.end_id = end_id if settings.documents == "separate" else None
        self.held_out = validation
        self.notes = [] if validation is None else validation.notes
        self._lock, self._next = threading.Lock(), 0
        self._places: dict[int, dict[str, Any]] = {}
        # Documents with the state of the data set before each; the first has lost `_taken` tokens.
        self._waiting: deque[tuple[Any, np.ndarray]] = deque()
        self._taken = 0
        self._open(None)
        self.fingerprint = self._fingerprint()
        self._open(None)

    @property
    def summary(self) -> str:
        """The name of the data set and the length of a row."""
        return f"a stream of {self.name}, rows of {self.length}"

    def batch(self, index: int, rows: slice = ALL_ROWS) -> Batch:
        """Return the batch that follows the last one."""
        with self._lock:
            assert index == self._next, (index, self._next)
            self._places[index] = self._place()
            self._places.pop(index - PLACES, None)
            self._next += 1
            tokens = np.stack([self._row() for _ in range(self.size)])
        return next_token_batch(tokens[rows], self.end_id)

    def place(self, index: int) -> dict[str, Any]:
        """Return the place in the data set at which a batch begins, as JSON."""
        with self._lock:
            return self._place() if index == self._next else self._places[index]

    def seek(self, index: int, place: Any) -> None:
        """Let the batch of that number be the next, at a place that `place` returned."""
        with hub_errors(self.name):
            self._open(place["state"])
            self._next, self._taken = index, int(place["tokens"])

    def validation(self) -> Sequence[Batch]:
        """Return the batches of the held-out text."""
        return () if self.held_out is None else self.held_out.validation()

    def score(self, predicted: Sequence[np.ndarray]) -> dict[str, float]:
        """Nothing: text has no measure besides the loss."""
        return {}

    def _open(self, state: Any) -> None:
        """Begin to read at a state of the data set, or at its beginning."""
        with hub_errors(self.name):
            self._rows, self._commit = open_hub(self.name, self.source)
            if state is not None:
                self._rows.load_state_dict(state)
            self._state, self._iterator = state, iter(self._rows)
        # A run that was saved in the middle has found text before.
        self._has_text = state is not None
        self._waiting.clear()

    def _place(self) -> dict[str, Any]:
        state = self._waiting[0][0] if self._waiting else self._state
        return {"state": state, "tokens": self._taken}

    def _row(self) -> np.ndarray:
        """Return the next row, whose last token is the first of the row after it."""
        while sum(len(ids) for _, ids in self._waiting) - self._taken <= self.length:
            self._read()
        ids = np.concatenate([ids for _, ids in self._waiting])[self._taken :]
        self._taken += self.length
        while self._taken >= len(self._waiting[0][1]):
            self._taken -= len(self._waiting.popleft()[1])
        return ids[: self.length + 1]

    def _read(self) -> None:
        """Tokenize some more documents."""
        texts, states = [], []
        for state, text in islice(self._texts(), DOCUMENTS):
            states.append(state)
            texts.append(text)
        if not texts:
            require(self._has_text, f"{STREAM_PREFIX}{self.name}: the data set has no text")
            waiting = list(self._waiting)
            self._open(None)
            self._waiting.extend(waiting)
        for state, ids in zip(states, encode_texts(self.tokenizer, texts), strict=True):
            if len(ids):
                self._has_text = True
                self._waiting.append((state, np.concatenate([self.begin, ids, self.end])))

    def _texts(self) -> Any:
        """Yield the state of the data set before each document, and its text."""
        with hub_errors(self.name):
            for row in self._iterator:
                before, self._state = self._state, self._rows.state_dict()
                text = field_of(row, self.source.text_field, f"{STREAM_PREFIX}{self.name}").text
                if text is not None and text.strip():
                    yield before, text

    def _fingerprint(self) -> str:
        about = (self.name, self._commit, self.source, self.length, self.size, self.end_id)
        found = hashlib.blake2b(repr(about).encode(), digest_size=16)
        found.update(self.tokenizer.to_str().encode())
        for _, text in islice(self._texts(), DOCUMENTS):
            found.update(text.encode())
        return found.hexdigest()
