"""Diffuse MQAR: recall of values by multi-token keys, across noise that holds look-alike entries.

    <bos> (key <assign> value) x pairs <sep> noise <sep> (<query> key <assign> value) x queries

A key is a prefix that `group` pairs share and a suffix from a small pool, so neither part of it is
enough. The noise is filler with distractors: entries in the memory's syntax with other keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sessa_common.data.tasks import Examples
from sessa_common.errors import SessaError

SPECIAL = ("<pad>", "<bos>", "<sep>", "<assign>", "<query>")
PAD, BOS, SEP, ASSIGN, QUERY = range(len(SPECIAL))
SHARE_OF_MEMORY_PREFIXES = 0.75  # of the distractors
SHARE_OF_POOL_SUFFIXES = 0.5  # of the distractors with a memory key's prefix


@dataclass(frozen=True)
class Memory:
    """The pairs of N examples: keys as numbers (prefix * key_tokens + suffix), values as tokens."""

    keys: np.ndarray  # (N, pairs)
    values: np.ndarray  # (N, pairs)
    pool: np.ndarray  # (N, pool): the suffixes that the keys are made of


@dataclass(frozen=True)
class Plan:
    """Where the anchor and its source lie, and how long the noise is, in N examples."""

    lag: np.ndarray  # (N,): of the anchor query, in tokens
    anchor: np.ndarray  # (N,): which query
    source: np.ndarray  # (N,): which pair of the memory
    noise: np.ndarray  # (N,): tokens


@dataclass(frozen=True, kw_only=True)
class DiffuseMqar:
    """The task's parameters; `make` draws examples and `measure` judges predictions.

    Lags are in tokens, from a source value to the value asked for; density is the share of the
    noise that is distractors (0: the easy control); `test_examples` counts each lag. Raises
    SessaError naming the option that cannot be used.
    """

    name: ClassVar[str] = "diffuse-mqar"

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
            self._need(option, getattr(self, option) >= low, f"at least {low}")
        self._need("density", 0 <= self.density <= 1, "from 0 to 1")
        self._need("queries", self.queries <= self.pairs, f"at most pairs ({self.pairs})")
        self._need("pairs", self.pairs % self.group == 0, f"a multiple of group ({self.group})")
        values = f"at most value_tokens ({self.value_tokens})"
        self._need("pairs", self.pairs <= self.value_tokens, values)
        self._need("group", self.group <= self.pool, f"at most pool ({self.pool})")
        self._need("pool", self.pool <= self.key_tokens, f"at most key_tokens ({self.key_tokens})")
        self._need("key_tokens", self.key_tokens > self.group, f"above group ({self.group})")
        prefixes, groups = self.key_tokens**self.prefix, self.pairs // self.group
        short = f"long enough for {groups} prefixes of {self.key_tokens} key tokens"
        self._need("prefix", prefixes >= groups, short)
        self._need("prefix", prefixes * self.key_tokens < 2**62, "shorter: keys are 64-bit numbers")
        self._check_lags()

    def _check_lags(self) -> None:
        shortest = 2 + self.queries * (self.entry + 1)
        fits = f"at least {shortest}, which the query block takes (or use fewer queries)"
        self._need("min_lag", self.min_lag >= shortest, fits)
        self._need("max_lag", self.max_lag >= self.min_lag, f"at least min_lag ({self.min_lag})")
        lags = self.test_lags
        self._need("test_lags", 0 < len(set(lags)) == len(lags), "one lag or more, each once")
        self._need("test_lags", min(lags) >= shortest, fits)

    def _need(self, option: str, holds: bool, wanted: str) -> None:
        if not holds:
            given = getattr(self, option)
            raise SessaError(f"{self.name}: {option} is {given!r}; it must be {wanted}")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every token: the special ones, then keys k0.., values v0.. and fillers f0..."""
        counts = {"k": self.key_tokens, "v": self.value_tokens, "f": self.filler_tokens}
        return SPECIAL + tuple(f"{kind}{i}" for kind, n in counts.items() for i in range(n))

    @property
    def context(self) -> int:
        """Tokens of the longest example; test examples are padded to it."""
        return self._length(max(self.max_lag, *self.test_lags))

    @property
    def training_length(self) -> int:
        """Tokens of the longest training example; training and validation are padded to it."""
        return self._length(self.max_lag)

    @property
    def entry(self) -> int:
        """Tokens of a pair: prefix, suffix, <assign>, value."""
        return self.prefix + 3

    @property
    def first_value(self) -> int:
        """The token of v0."""
        return len(SPECIAL) + self.key_tokens

    @property
    def first_filler(self) -> int:
        """The token of f0."""
        return self.first_value + self.value_tokens

    def make(self, split: str, count: int, seed: Sequence[int]) -> Examples:
        """Draw `count` examples ("train", "validation"), or `count` for each test lag ("test").

        Anchor lags are log-uniform in [min_lag, max_lag], or the test lags in their order. Facts,
        for each example: `anchor_lag`, `anchor` (which query); for each query `lags`, `positions`
        (of the value), `answers` (the value) and `sources` (which pair); `memory_keys`,
        `memory_values`, `distractor_keys`, `distractor_values` (-1 where there is no more).
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
        facts = {
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
        # Files of tensors want contiguous arrays; some of these are views.
        facts = {name: np.ascontiguousarray(fact) for name, fact in facts.items()}
        return Examples(tokens, weights, facts)

    def _noise_limit(self, lag: int) -> int:
        """The longest noise: the last pair is asked for by the first query."""
        return lag - 2 - (self.entry + 1)

    def _length(self, lag: int) -> int:
        blocks = 3 + self.entry * self.pairs + (self.entry + 1) * self.queries
        return blocks + self._noise_limit(lag)

    def _draw_lags(self, rng: np.random.Generator, count: int) -> np.ndarray:
        low, high = np.log(self.min_lag), np.log(self.max_lag + 1)
        lag = np.exp(rng.uniform(low, high, count)).astype(np.int64)
        return np.clip(lag, self.min_lag, self.max_lag)

    def _draw_plan(self, rng: np.random.Generator, lag: np.ndarray) -> Plan:
        """For a short lag only the memory's last pairs can be the source."""
        anchor = rng.integers(0, self.queries, len(lag))
        fixed = 2 + (self.entry + 1) * (anchor + 1)  # tokens after the memory, without the noise
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
        """Distinct pairs in random order, with the anchor's source at the anchor."""
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
        """Keys and values (N, limit), -1 beyond an example's count; no key is in the memory."""
        there = np.arange(limit) < self._distractor_counts(plan)[:, None]
        keys = np.full(there.shape, -1)
        row, column = np.nonzero(there)
        while row.size:  # a memory key is drawn anew as a whole, so fewer than 0.75 share a prefix
            keys[row, column] = self._draw_keys(rng, memory, row)
            taken = (keys[row, column, None] == memory.keys[row]).any(axis=1)
            row, column = row[taken], column[taken]
        values = self.first_value + rng.integers(0, self.value_tokens, there.shape)
        return keys, np.where(there, values, -1)

    def _draw_keys(self, rng: np.random.Generator, memory: Memory, row: np.ndarray) -> np.ndarray:
        """A key for each of the rows (M,), often like one of that row's memory."""
        count = len(row)
        shares = rng.random(count) < SHARE_OF_MEMORY_PREFIXES
        pooled = shares & (rng.random(count) < SHARE_OF_POOL_SUFFIXES)
        like = memory.keys[row, rng.integers(0, self.pairs, count)] // self.key_tokens
        pool = memory.pool[row, rng.integers(0, self.pool, count)]
        prefix = np.where(shares, like, rng.integers(0, self.key_tokens**self.prefix, count))
        suffix = np.where(pooled, pool, rng.integers(0, self.key_tokens, count))
        return prefix * self.key_tokens + suffix

    def _key_tokens_of(self, keys: np.ndarray) -> np.ndarray:
        """(...) numbers to (..., prefix + 1) tokens."""
        powers = self.key_tokens ** np.arange(self.prefix, -1, -1)
        return len(SPECIAL) + keys[..., None] // powers % self.key_tokens

    def _entries(self, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """(...) keys and values to (..., entry) tokens."""
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
        """Fillers, and the distractors at uniformly drawn places among them."""
        begin = 2 + self.entry * self.pairs
        width = int(plan.noise.max(initial=0))
        filler = self.first_filler + rng.integers(0, self.filler_tokens, (len(tokens), width))
        inside = np.arange(width) < plan.noise[:, None]
        tokens[:, begin : begin + width] = np.where(inside, filler, PAD)
        counts = self._distractor_counts(plan)[:, None]
        slots = plan.noise[:, None] - counts * (self.entry - 1)  # a distractor or a filler each
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
        """Write the last separator and the queries; gives the values' positions (N, queries)."""
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

        `by_lag` takes the examples whose anchor has that test lag and counts all their queries,
        whose own lags lie around it; `anchor_by_lag` counts the anchor only, whose lag is exact.
        `errors_by_lag` has shares of all queries; an answer of two kinds counts as the first:
        same_prefix, distractor, other_context, other_value, not_a_value. `heuristics_by_lag` has
        the expected accuracy, on these examples, of a uniform guess among all earlier entries
        (memory, noise and the queries before) that fit.
        """
        facts = examples.facts
        answers = np.take_along_axis(predicted, facts["positions"], axis=1)
        right = answers == facts["answers"]  # (N, queries)
        kinds, heuristics = self._errors(facts, answers), self._heuristics(facts)
        result: dict[str, Any] = {
            "accuracy": float(right.mean()),
            "examples": len(right),
            "chance": 1 / self.value_tokens,
        }
        tables = ("by_lag", "anchor_by_lag", "errors_by_lag", "heuristics_by_lag")
        result |= {table: {} for table in tables}
        for lag in self.test_lags:
            at = facts["anchor_lag"] == lag
            if not at.any():
                continue
            anchored = np.take_along_axis(right[at], facts["anchor"][at, None], axis=1)
            result["by_lag"][str(lag)] = float(right[at].mean())
            result["anchor_by_lag"][str(lag)] = float(anchored.mean())
            result["errors_by_lag"][str(lag)] = _means(kinds, at)
            result["heuristics_by_lag"][str(lag)] = _means(heuristics, at)
        return result

    def _errors(self, facts: dict[str, np.ndarray], answers: np.ndarray) -> dict[str, np.ndarray]:
        """For each kind of error, which answers (N, queries) are of it; each is of one at most."""
        asked = np.take_along_axis(facts["memory_keys"], facts["sources"], axis=1)
        prefixes = facts["memory_keys"] // self.key_tokens
        same = prefixes[:, None] == asked[:, :, None] // self.key_tokens  # (N, queries, pairs)
        hit = facts["memory_values"][:, None] == answers[:, :, None]
        distractor = facts["distractor_values"][:, None] == answers[:, :, None]
        tests = {
            "same_prefix": (hit & same).any(axis=2),
            "distractor": distractor.any(axis=2),
            "other_context": hit.any(axis=2),
            "other_value": (answers >= self.first_value) & (answers < self.first_filler),
            "not_a_value": np.ones(answers.shape, bool),
        }
        left, kinds = answers != facts["answers"], {}
        for kind, holds in tests.items():
            kinds[kind] = left & holds
            left = left & ~holds
        return kinds

    def _heuristics(self, facts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Expected accuracy of each heuristic for each query (N, queries)."""
        asked = np.take_along_axis(facts["memory_keys"], facts["sources"], axis=1)
        keys = np.concatenate([facts["memory_keys"], facts["distractor_keys"], asked], axis=1)
        parts = (facts["memory_values"], facts["distractor_values"], facts["answers"])
        right = np.concatenate(parts, axis=1)[:, None] == facts["answers"][:, :, None]
        # Entries that are there and before the query: (N, queries, entries).
        there = np.repeat(keys[:, None] >= 0, self.queries, axis=1)
        there[:, :, -self.queries :] = np.tri(self.queries, k=-1, dtype=bool)
        keys, asked = keys[:, None], asked[:, :, None]
        fits = {
            "prefix_only": there & (keys // self.key_tokens == asked // self.key_tokens),
            "last_key_token": there & (keys % self.key_tokens == asked % self.key_tokens),
            "any_context_value": there,
        }
        levels = {name: (fit & right).sum(axis=2) / fit.sum(axis=2) for name, fit in fits.items()}
        return {**levels, "uniform": np.full(facts["answers"].shape, 1 / self.value_tokens)}


def _means(shares: dict[str, np.ndarray], at: np.ndarray) -> dict[str, float]:
    return {name: float(share[at].mean()) for name, share in shares.items()}


def _distinct(rng: np.random.Generator, limit: int, shape: tuple[int, int]) -> np.ndarray:
    """In each row different integers below `limit`, uniform and in random order (Floyd)."""
    rows, count = shape
    chosen = np.full(shape, -1, np.int64)
    for i in range(count):
        last = limit - count + i
        drawn = rng.integers(0, last + 1, rows)
        repeated = (chosen[:, :i] == drawn[:, None]).any(axis=1)
        chosen[:, i] = np.where(repeated, last, drawn)
    return rng.permuted(chosen, axis=1)
