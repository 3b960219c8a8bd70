"""Diffuse MQAR: recall of values by multi-token keys, across noise with similar entries.

    <bos> (key <assign> value) x pairs <sep> noise <sep> (<query> key <assign> value) x queries

A key is a prefix that `group` pairs share, followed by a suffix from a small pool; a model needs
both parts to find the value. The noise is filler tokens with distractors: entries in the syntax of
the memory whose keys are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sessa_common.data.tasks import Examples, require
from sessa_common.errors import SessaError

SPECIAL = ("<pad>", "<bos>", "<sep>", "<assign>", "<query>")
PAD, BOS, SEP, ASSIGN, QUERY = range(len(SPECIAL))
# Shares of the distractors that have a prefix of a memory key, and of those, a suffix of the pool.
SHARE_OF_MEMORY_PREFIXES = 0.75
SHARE_OF_POOL_SUFFIXES = 0.5


@dataclass(frozen=True)
class Memory:
    """The pairs of N examples; a key is the number prefix * key_tokens + suffix."""

    keys: np.ndarray  # (N, pairs)
    values: np.ndarray  # (N, pairs): tokens
    pool: np.ndarray  # (N, pool): the suffixes of the keys


@dataclass(frozen=True)
class Plan:
    """Positions in N examples: the anchor is the query whose lag is drawn, the source its pair."""

    lag: np.ndarray  # (N,): tokens from the source's value to the anchor's value
    anchor: np.ndarray  # (N,): index of the anchor among the queries
    source: np.ndarray  # (N,): index of the source among the pairs
    noise: np.ndarray  # (N,): length of the noise in tokens


@dataclass(frozen=True, kw_only=True)
class DiffuseMqar:
    """The options of the task; `make` draws examples and `measure` judges predictions.

    A lag is the distance in tokens from a value in the memory to the same value after its query.
    `density` is the share of the noise that is distractors; 0 makes the easy control.
    `test_examples` is the number of test examples per lag. Raises SessaError, naming the option,
    for options that cannot be used.
    """

    name: ClassVar[str] = "diffuse-mqar"
    easy_options: ClassVar[tuple[str, ...]] = ("density=0",)

    train_examples: int = 0
    validation_examples: int = 512
    test_examples: int = 500
    min_lag: int = 64
    max_lag: int = 256
    test_lags: tuple[int, ...] = (128, 256, 512, 1024)
    pairs: int = 16
    queries: int = 8
    prefix: int = 2
    group: int = 2
    pool: int = 4
    density: float = 0.5
    key_tokens: int = 64
    value_tokens: int = 480
    filler_tokens: int = 64
    data_seed: int = 0

    def __post_init__(self) -> None:
        least = {"train_examples": 0, "data_seed": 0, "validation_examples": 1, "test_examples": 1}
        blocks = ("pairs", "queries", "prefix", "group", "pool", "key_tokens", "filler_tokens")
        for option, low in {**least, **dict.fromkeys(blocks, 1), "value_tokens": 1}.items():
            require(self, option, getattr(self, option) >= low, f"at least {low}")
        require(self, "density", 0 <= self.density <= 1, "from 0 to 1")
        require(self, "queries", self.queries <= self.pairs, f"at most pairs ({self.pairs})")
        require(self, "pairs", self.pairs % self.group == 0, f"a multiple of group ({self.group})")
        values = f"at most value_tokens ({self.value_tokens})"
        require(self, "pairs", self.pairs <= self.value_tokens, values)
        require(self, "group", self.group <= self.pool, f"at most pool ({self.pool})")
        require(
            self, "pool", self.pool <= self.key_tokens, f"at most key_tokens ({self.key_tokens})"
        )
        require(self, "key_tokens", self.key_tokens > self.group, f"above group ({self.group})")
        prefixes, groups = self.key_tokens**self.prefix, self.pairs // self.group
        short = f"long enough for {groups} prefixes of {self.key_tokens} key tokens"
        require(self, "prefix", prefixes >= groups, short)
        require(
            self, "prefix", prefixes * self.key_tokens < 2**62, "shorter: keys are 64-bit numbers"
        )
        self._check_lags()

    def _check_lags(self) -> None:
        shortest = 2 + self.queries * (self.entry + 1)
        fits = f"at least {shortest}, which the query block takes (or use fewer queries)"
        require(self, "min_lag", self.min_lag >= shortest, fits)
        require(self, "max_lag", self.max_lag >= self.min_lag, f"at least min_lag ({self.min_lag})")
        lags = self.test_lags
        require(self, "test_lags", 0 < len(set(lags)) == len(lags), "one lag or more, each once")
        require(self, "test_lags", min(lags) >= shortest, fits)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Special tokens, then the keys k0, k1, ..., the values v0, ... and the fillers f0, ..."""
        counts = {"k": self.key_tokens, "v": self.value_tokens, "f": self.filler_tokens}
        return SPECIAL + tuple(f"{kind}{i}" for kind, n in counts.items() for i in range(n))

    @property
    def context(self) -> int:
        """Length of the longest example in tokens; test examples are padded to it."""
        return self._length(max(self.max_lag, *self.test_lags))

    @property
    def entry(self) -> int:
        """Length of a pair in tokens: prefix, suffix, <assign>, value."""
        return self.prefix + 3

    @property
    def first_value(self) -> int:
        """Id of the token v0."""
        return len(SPECIAL) + self.key_tokens

    @property
    def first_filler(self) -> int:
        """Id of the token f0."""
        return self.first_value + self.value_tokens

    def make(self, split: str, count: int, seed: Sequence[int]) -> Examples:
        """Draw `count` examples of "train" or "validation", or `count` for each lag of "test".

        Anchor lags are log-uniform in [min_lag, max_lag]; in "test" they are the test lags in
        their order. The metadata of an example are `anchor_lag` and `anchor` (index of the query);
        for each query `lags`, `positions` (of the value), `answers` (the value) and `sources`
        (index of the pair); `memory_keys`, `memory_values`, `distractor_keys` and
        `distractor_values`, -1 after the last distractor.
        """
        rng = np.random.default_rng([*seed])
        if split == "test":
            lag, longest = np.repeat(self.test_lags, count), max(self.max_lag, *self.test_lags)
        elif split in ("train", "validation"):
            lag, longest = self._draw_lags(rng, count), self.max_lag
        else:
            raise SessaError(f"split is {split!r}; it must be train, validation or test")
        plan, memory = self._draw_plan(rng, lag), self._draw_memory(rng, len(lag))
        sources = self._draw_sources(rng, plan)  # (N, queries)
        distractor_limit = int(self.density * self._noise_limit(longest) / self.entry)
        keys, values = self._draw_distractors(rng, plan, memory, distractor_limit)
        tokens = np.zeros((len(lag), self._length(longest)), np.int32)
        self._write_memory(tokens, memory)
        self._write_noise(rng, tokens, plan, keys, values)
        positions = self._write_queries(tokens, plan, memory, sources)
        weights = np.zeros(tokens.shape, np.float32)
        np.put_along_axis(weights, positions, 1, axis=1)
        metadata = {
            "anchor_lag": plan.lag,
            "anchor": plan.anchor,
            "lags": positions - self.entry * (sources + 1),
            "positions": positions,
            "answers": np.take_along_axis(memory.values, sources, axis=1),
            "sources": sources,
            "memory_keys": memory.keys,
            "memory_values": memory.values,
            "distractor_keys": keys,
            "distractor_values": values,
        }
        # safetensors writes contiguous arrays only, and some of these are views.
        metadata = {name: np.ascontiguousarray(value) for name, value in metadata.items()}
        return Examples(tokens, weights, metadata)

    def _noise_limit(self, lag: int) -> int:
        """Length of the longest noise: the first query asks for the last pair."""
        return lag - 2 - (self.entry + 1)

    def _length(self, lag: int) -> int:
        blocks = 3 + self.entry * self.pairs + (self.entry + 1) * self.queries
        return blocks + self._noise_limit(lag)

    def _draw_lags(self, rng: np.random.Generator, count: int) -> np.ndarray:
        low, high = np.log(self.min_lag), np.log(self.max_lag + 1)
        lag = np.exp(rng.uniform(low, high, count)).astype(np.int64)
        return np.clip(lag, self.min_lag, self.max_lag)

    def _draw_plan(self, rng: np.random.Generator, lag: np.ndarray) -> Plan:
        """Draw anchor and source; when the lag is short, only the last pairs can be the source."""
        anchor = rng.integers(0, self.queries, len(lag))
        # Tokens from the end of the memory to the anchor's value, without the noise.
        fixed = 2 + (self.entry + 1) * (anchor + 1)
        first = np.maximum(self.pairs - 1 - (lag - fixed) // self.entry, 0)
        source = rng.integers(first, self.pairs)
        noise = lag - fixed - self.entry * (self.pairs - 1 - source)
        return Plan(lag, anchor, source, noise)

    def _draw_memory(self, rng: np.random.Generator, count: int) -> Memory:
        groups = self.pairs // self.group
        prefixes = _distinct(rng, self.key_tokens**self.prefix, (count, groups))
        pool = _distinct(rng, self.key_tokens, (count, self.pool))
        pools = rng.permuted(np.repeat(pool[:, None], groups, axis=1), axis=2)
        keys = prefixes[:, :, None] * self.key_tokens + pools[:, :, : self.group]
        order = rng.permuted(np.tile(np.arange(self.pairs), (count, 1)), axis=1)
        values = self.first_value + _distinct(rng, self.value_tokens, (count, self.pairs))
        keys = np.take_along_axis(keys.reshape(count, self.pairs), order, axis=1)
        return Memory(keys, values, pool)

    def _draw_sources(self, rng: np.random.Generator, plan: Plan) -> np.ndarray:
        """Draw distinct pairs (N, queries) in random order, the anchor's source at the anchor."""
        rows = np.arange(len(plan.lag))
        order = rng.permuted(np.tile(np.arange(self.pairs), (len(rows), 1)), axis=1)
        there = np.argmax(order == plan.source[:, None], axis=1)
        order[rows, there] = order[rows, plan.anchor]
        order[rows, plan.anchor] = plan.source
        return order[:, : self.queries]

    def _distractor_counts(self, plan: Plan) -> np.ndarray:
        return (self.density * plan.noise / self.entry).astype(np.int64)

    def _draw_distractors(
        self, rng: np.random.Generator, plan: Plan, memory: Memory, limit: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw keys and values (N, limit), -1 after the last; no key is in the memory."""
        there = np.arange(limit) < self._distractor_counts(plan)[:, None]
        keys = np.full(there.shape, -1)
        row, column = np.nonzero(there)
        # A key that the memory holds is drawn again, prefix included, so the share of distractors
        # with a prefix of the memory is below SHARE_OF_MEMORY_PREFIXES.
        while row.size:
            keys[row, column] = self._draw_keys(rng, memory, row)
            taken = (keys[row, column, None] == memory.keys[row]).any(axis=1)
            row, column = row[taken], column[taken]
        values = self.first_value + rng.integers(0, self.value_tokens, there.shape)
        return keys, np.where(there, values, -1)

    def _draw_keys(self, rng: np.random.Generator, memory: Memory, row: np.ndarray) -> np.ndarray:
        """Draw a key for each of the rows (M,), often with parts of a key in that row's memory."""
        count = len(row)
        shares = rng.random(count) < SHARE_OF_MEMORY_PREFIXES
        pooled = shares & (rng.random(count) < SHARE_OF_POOL_SUFFIXES)
        like = memory.keys[row, rng.integers(0, self.pairs, count)] // self.key_tokens
        pool = memory.pool[row, rng.integers(0, self.pool, count)]
        prefix = np.where(shares, like, rng.integers(0, self.key_tokens**self.prefix, count))
        suffix = np.where(pooled, pool, rng.integers(0, self.key_tokens, count))
        return prefix * self.key_tokens + suffix

    def _key_tokens_of(self, keys: np.ndarray) -> np.ndarray:
        """Convert key numbers (...) to tokens (..., prefix + 1)."""
        powers = self.key_tokens ** np.arange(self.prefix, -1, -1)
        return len(SPECIAL) + keys[..., None] // powers % self.key_tokens

    def _entries(self, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Convert keys and values (...) to the tokens of their pairs (..., entry)."""
        assign = np.full_like(values, ASSIGN)
        tail = np.stack([assign, values], axis=-1)
        return np.concatenate([self._key_tokens_of(keys), tail], axis=-1)

    def _write_memory(self, tokens: np.ndarray, memory: Memory) -> None:
        end = 1 + self.entry * self.pairs
        tokens[:, 0] = BOS
        tokens[:, 1:end] = self._entries(memory.keys, memory.values).reshape(len(tokens), -1)
        tokens[:, end] = SEP

    def _write_noise(
        self,
        rng: np.random.Generator,
        tokens: np.ndarray,
        plan: Plan,
        keys: np.ndarray,
        values: np.ndarray,
    ) -> None:
        """Write the fillers, and the distractors at uniformly drawn positions among them."""
        begin = 2 + self.entry * self.pairs
        width = int(plan.noise.max(initial=0))
        filler = self.first_filler + rng.integers(0, self.filler_tokens, (len(tokens), width))
        inside = np.arange(width) < plan.noise[:, None]
        tokens[:, begin : begin + width] = np.where(inside, filler, PAD)
        counts = self._distractor_counts(plan)[:, None]
        # A slot holds one filler or one whole distractor.
        slots = plan.noise[:, None] - counts * (self.entry - 1)
        score = np.where(np.arange(width) < slots, rng.random((len(tokens), width)), 2.0)
        rank = score.argsort(axis=1).argsort(axis=1)
        row, slot = np.nonzero(rank < counts)
        which = (np.cumsum(rank < counts, axis=1) - 1)[row, slot]
        start = begin + slot + which * (self.entry - 1)
        entries = self._entries(keys[row, which], values[row, which])
        tokens[row[:, None], start[:, None] + np.arange(self.entry)] = entries

    def _write_queries(
        self, tokens: np.ndarray, plan: Plan, memory: Memory, sources: np.ndarray
    ) -> np.ndarray:
        """Write the last separator and the queries; return the values' positions (N, queries)."""
        separator = 2 + self.entry * self.pairs + plan.noise[:, None]
        np.put_along_axis(tokens, separator, SEP, axis=1)
        keys = np.take_along_axis(memory.keys, sources, axis=1)
        values = np.take_along_axis(memory.values, sources, axis=1)
        query = np.full((*keys.shape, 1), QUERY)
        block = np.concatenate([query, self._entries(keys, values)], axis=2)
        block = block.reshape(len(tokens), -1)
        where = separator + 1 + np.arange(block.shape[1])
        np.put_along_axis(tokens, where, block.astype(np.int32), axis=1)
        return where[:, self.entry :: self.entry + 1]

    def measure(self, examples: Examples, predicted: np.ndarray) -> dict[str, Any]:
        """Judge the predicted tokens (N, T) at the examples' weighted positions.

        `by_lag` is the accuracy over all queries of the examples whose anchor has that test lag;
        the lags of the other queries lie around it. `anchor_by_lag` counts the anchors only, whose
        lag is exact. `errors_by_lag` has shares of all queries; a wrong answer counts as the first
        that fits of same_prefix, distractor, other_context, other_value, not_a_value.
        `heuristics_by_lag` has the expected accuracy, on these examples, of a uniform guess among
        the earlier entries (memory, noise and previous queries) that match the query in part.
        """
        metadata = examples.metadata
        answers = np.take_along_axis(predicted, metadata["positions"], axis=1)
        right = answers == metadata["answers"]  # (N, queries)
        kinds, heuristics = self._errors(metadata, answers), self._heuristics(metadata)
        result: dict[str, Any] = {
            "accuracy": float(right.mean()),
            "examples": len(right),
            "chance": 1 / self.value_tokens,
        }
        tables = ("by_lag", "anchor_by_lag", "errors_by_lag", "heuristics_by_lag")
        result |= {table: {} for table in tables}
        for lag in self.test_lags:
            at = metadata["anchor_lag"] == lag
            if not at.any():
                continue
            anchored = np.take_along_axis(right[at], metadata["anchor"][at, None], axis=1)
            result["by_lag"][str(lag)] = float(right[at].mean())
            result["anchor_by_lag"][str(lag)] = float(anchored.mean())
            result["errors_by_lag"][str(lag)] = _means(kinds, at)
            result["heuristics_by_lag"][str(lag)] = _means(heuristics, at)
        return result

    def _errors(
        self, metadata: dict[str, np.ndarray], answers: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Mark the answers (N, queries) of each kind of error; an answer has one kind at most."""
        asked = np.take_along_axis(metadata["memory_keys"], metadata["sources"], axis=1)
        prefixes = metadata["memory_keys"] // self.key_tokens
        same = prefixes[:, None] == asked[:, :, None] // self.key_tokens  # (N, queries, pairs)
        hit = metadata["memory_values"][:, None] == answers[:, :, None]
        distractor = metadata["distractor_values"][:, None] == answers[:, :, None]
        tests = {
            "same_prefix": (hit & same).any(axis=2),
            "distractor": distractor.any(axis=2),
            "other_context": hit.any(axis=2),
            "other_value": (answers >= self.first_value) & (answers < self.first_filler),
            "not_a_value": np.ones(answers.shape, bool),
        }
        left, kinds = answers != metadata["answers"], {}
        for kind, holds in tests.items():
            kinds[kind] = left & holds
            left = left & ~holds
        return kinds

    def _heuristics(self, metadata: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the expected accuracy of each heuristic for each query (N, queries)."""
        asked = np.take_along_axis(metadata["memory_keys"], metadata["sources"], axis=1)
        keys = np.concatenate([metadata["memory_keys"], metadata["distractor_keys"], asked], axis=1)
        parts = (metadata["memory_values"], metadata["distractor_values"], metadata["answers"])
        right = np.concatenate(parts, axis=1)[:, None] == metadata["answers"][:, :, None]
        # Entries that exist and come before the query: (N, queries, entries).
        there = np.repeat(keys[:, None] >= 0, self.queries, axis=1)
        there[:, :, -self.queries :] = np.tri(self.queries, k=-1, dtype=bool)
        keys, asked = keys[:, None], asked[:, :, None]
        fits = {
            "prefix_only": there & (keys // self.key_tokens == asked // self.key_tokens),
            "last_key_token": there & (keys % self.key_tokens == asked % self.key_tokens),
            "any_context_value": there,
        }
        levels = {name: (fit & right).sum(axis=2) / fit.sum(axis=2) for name, fit in fits.items()}
        return {**levels, "uniform": np.full(metadata["answers"].shape, 1 / self.value_tokens)}


def _means(shares: dict[str, np.ndarray], at: np.ndarray) -> dict[str, float]:
    return {name: float(share[at].mean()) for name, share in shares.items()}


def _distinct(rng: np.random.Generator, limit: int, shape: tuple[int, int]) -> np.ndarray:
    """Draw distinct integers below `limit` for each row, in random order (Floyd's algorithm)."""
    rows, count = shape
    chosen = np.full(shape, -1, np.int64)
    for i in range(count):
        last = limit - count + i
        drawn = rng.integers(0, last + 1, rows)
        repeated = (chosen[:, :i] == drawn[:, None]).any(axis=1)
        chosen[:, i] = np.where(repeated, last, drawn)
    return rng.permuted(chosen, axis=1)
