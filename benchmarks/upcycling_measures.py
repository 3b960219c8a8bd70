"""Measures of a trained model for `upcycling.py`, computed on its device in batches of rows.

Letters: n rows, T tokens of a row, D width, V vocabulary.
"""

from __future__ import annotations

import statistics
import time
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from measure import MIB
from torch import Tensor

from sessa_common.data.batches import BatchSource
from sessa_common.data.token_shards import TokenShards
from sessa_common.training.gains import USED
from sessa_torch.training import TrainBackend

PASSAGE, CUE = 16, 4  # tokens of a passage, and of its second time that are given
ROWS = 8  # rows that the device computes at once
WARM, TIMED = 3, 15


def rows_within_documents(folder: str, length: int, most: int, *, each: int) -> np.ndarray:
    """Rows int64 (n, length + 1), n at most `most`, with at most `each` of a document.

    Documents come in the order of the folder, and documents shorter than a row give none.
    """
    shards = TokenShards(folder)
    tokens = shards[0 : len(shards)].astype(np.int64)
    ends = np.flatnonzero(tokens == shards.end_id)
    rows = []
    for first, end in zip([0, *(ends[:-1] + 1)], ends, strict=True):
        starts = range(first, end - length, length)
        rows += [tokens[start : start + length + 1] for start in starts[:each]]
    return np.stack(rows[:most])


def nats_and_hits(backend: TrainBackend, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nats (n, T) of the tokens 1 to T of rows (n, T + 1), and where they were the likeliest."""
    found = []
    for first in range(0, len(rows), ROWS):
        ids = torch.from_numpy(rows[first : first + ROWS]).to(backend.device)
        with torch.no_grad():
            found.append(backend.objective(_nats_and_hits, ids[:, :-1], ids[:, 1:]).cpu().numpy())
    nats, hits = np.concatenate(found, 1)
    return nats, hits


def _nats_and_hits(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Nats and hits (2, n, T) from hidden (n, T, D), head (V, D) and targets (n, T)."""
    rows = []
    for row, wanted in zip(hidden, targets, strict=True):
        logits = (row @ head.to(row.dtype).T).float()
        nats = F.cross_entropy(logits, wanted, reduction="none")
        rows.append(torch.stack([nats, (logits.argmax(-1) == wanted).float()]))
    return torch.stack(rows, 1)


def qualities(backend: TrainBackend, rows: np.ndarray, short: np.ndarray) -> dict[str, float]:
    """Nats by position of rows (n, T + 1) and of short rows, recall by distance, and the gains."""
    T = rows.shape[1] - 1
    found = {"nats, short texts": float(nats_and_hits(backend, short)[0].mean())}
    nats, _ = nats_and_hits(backend, rows)
    for start, stop in pairwise((0, T // 8, T // 4, T // 2, T)):
        found[f"nats {start}-{stop}"] = float(nats[:, start:stop].mean())
    for distance in (T // 16, T // 4, T // 2, T - PASSAGE):
        found[f"recall {distance}"] = recall(backend, rows, distance)
    gains = backend.gains(rows[:4, :-1])
    if gains:
        sizes = np.abs(np.stack(list(gains.values())))
        found["mean gain"], found["largest gain"] = float(sizes.mean()), float(sizes.max())
        found[f"gains above {USED}"] = float((sizes > USED).mean())
    return found


def recall(backend: TrainBackend, rows: np.ndarray, distance: int) -> float:
    """Share of a random passage's last tokens that are the likeliest the second time."""
    rng = np.random.default_rng(distance)
    passages = np.stack([rng.choice(row, PASSAGE) for row in rows])
    text = np.concatenate([passages, rows[:, : distance - PASSAGE], passages], 1)
    _, hits = nats_and_hits(backend, text)
    return float(hits[:, CUE - PASSAGE :].mean())


def step_seconds(backend: TrainBackend, source: BatchSource) -> float:
    """Median seconds of a training step; a learning rate of 0 leaves the weights alone."""
    times = []
    for i in range(WARM + TIMED):
        batch = source.batch(i)
        began = time.perf_counter()
        backend.step([batch], 0.0)
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARM:])


def peak_memory() -> float:
    """The most memory in MiB that tensors of this process have held; 0 without CUDA.

    A replayed graph allocates nothing, so the peak is that of compiling and capturing its step.
    """
    return torch.cuda.max_memory_allocated() / MIB if torch.cuda.is_available() else 0.0


def validation_nats(backend: TrainBackend, source: BatchSource) -> float:
    """Mean nats of the held-out rows of a run's own data."""
    batches = source.validation()
    total = sum(float(batch.weights.sum()) for batch in batches)
    return sum(backend.evaluate(batch)[0] for batch in batches) / total
