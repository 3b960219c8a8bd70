"""Rules that change logits before a token is drawn, on the host, the same for every runtime."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sessa_common.errors import SessaError, expect
from sessa_common.inference.json_schema import JsonGrammar

if TYPE_CHECKING:
    from sessa_common.inference.model_tokenizer import ModelTokenizer


@dataclass(frozen=True, kw_only=True)
class LogitRules:
    """Changes to the logits of a next token, applied in this order before sampling.

    repetition_penalty divides positive and multiplies negative logits of the tokens that the prompt
    or the text holds (section 4.1 of arXiv 1909.05858). presence_penalty is subtracted once from
    the logits of tokens that the new text holds, frequency_penalty as often as it holds them.
    logit_bias maps ids to numbers that are added, -inf to forbid. json_schema, an object or its
    JSON text, allows only tokens that go on towards a JSON text of that schema. Raises SessaError
    for a number out of its range.
    """

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    json_schema: Mapping[str, Any] | str | None = None

    def __post_init__(self) -> None:
        r = self.repetition_penalty
        expect(0 < r < math.inf, "repetition_penalty", r, "above 0 (1 is off), finite")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            expect(math.isfinite(value), name, value, "a finite number (0 is off)")
        for token, value in (self.logit_bias or {}).items():
            ok = isinstance(token, int) and value < math.inf
            expect(ok, "logit_bias", {token: value}, "ids with numbers, or -inf to forbid a token")

    @property
    def active(self) -> bool:
        """Return True when any rule changes logits."""
        penalties = self.repetition_penalty != 1, self.presence_penalty, self.frequency_penalty
        return any((*penalties, self.logit_bias, self.json_schema is not None))


class PreparedRules:
    """Rules for one tokenizer; what takes long is done once, for any number of batches."""

    def __init__(self, rules: LogitRules, tokenizer: ModelTokenizer) -> None:
        self.rules, self.vocab_size = rules, tokenizer.config.vocab_size
        for token in rules.logit_bias or {}:
            expect(
                0 <= token < self.vocab_size, "logit_bias", token, f"ids 0..{self.vocab_size - 1}"
            )
        self.grammar = None
        if rules.json_schema is not None:
            self.grammar = JsonGrammar(rules.json_schema, tokenizer)

    def start(self, prompts: Sequence[Sequence[int]]) -> RowRules:
        """Begin texts after the given prompts."""
        return RowRules(self, prompts)


def prepare_rules(
    rules: LogitRules | PreparedRules | None, tokenizer: ModelTokenizer
) -> PreparedRules | None:
    """Return rules for a tokenizer, None where no rule changes a logit.

    Prepared rules stay as they are. Raises SessaError for rules that do not fit the tokenizer.
    """
    if isinstance(rules, PreparedRules):
        return rules
    return PreparedRules(rules, tokenizer) if rules is not None and rules.active else None


class RowRules:
    """Rules in the course of a batch: they know what each row holds so far."""

    def __init__(self, prepared: PreparedRules, prompts: Sequence[Sequence[int]]) -> None:
        B, V = len(prompts), prepared.vocab_size
        self.rules = prepared.rules
        self.counts = np.zeros((B, V), np.int32)  # of the new text
        self.in_prompt = np.zeros((B, V), bool)
        for row, prompt in enumerate(prompts):
            self.in_prompt[row, list(prompt)] = True
        bias = prepared.rules.logit_bias or {}
        self.bias = np.zeros(V, np.float32)
        self.bias[list(bias)] = list(bias.values())
        grammar = prepared.grammar
        self.texts = None if grammar is None else [grammar.start() for _ in prompts]

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """Return changed logits (B, V) float32."""
        r, rules = np.float32(self.rules.repetition_penalty), self.rules
        logits = np.asarray(logits, np.float32)
        if not np.isfinite(logits.max(axis=-1)).all():
            return logits  # the sampler refuses them
        if r != 1:
            held = self.in_prompt | (self.counts > 0)
            logits = np.where(held, np.where(logits > 0, logits / r, logits * r), logits)
        if rules.presence_penalty or rules.frequency_penalty:
            logits = logits - np.float32(rules.presence_penalty) * (self.counts > 0)
            logits = logits - np.float32(rules.frequency_penalty) * self.counts
        if rules.logit_bias:
            logits = logits + self.bias
        if self.texts is not None:
            allowed = np.stack([text.allowed() for text in self.texts])
            logits = np.where(allowed, logits, -np.inf)
        if np.isneginf(logits.max(axis=-1)).any():
            raise SessaError("`logit_bias` forbids every token that could come next")
        return logits.astype(np.float32)

    def accept(self, ids: np.ndarray) -> None:
        """Add the drawn ids (B,) to the rows."""
        self.counts[np.arange(len(ids)), ids] += 1
        for text, token in zip(self.texts or (), ids.tolist(), strict=self.texts is not None):
            text.accept(token)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch."""
        self.counts, self.in_prompt = self.counts[list(rows)], self.in_prompt[list(rows)]
        if self.texts is not None:
            self.texts = [self.texts[row] for row in rows]
