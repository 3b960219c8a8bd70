"""Texts that must follow a JSON schema, by the library llguidance."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sessa_common.errors import SessaError
from sessa_common.extras import install
from sessa_common.json_files import parse_json

if TYPE_CHECKING:
    from sessa_common.inference.model_tokenizer import ModelTokenizer

INSTALL = install("json")


class JsonGrammar:
    """The JSON texts of a schema as sequences of a tokenizer's ids.

    Raises SessaError when llguidance is not installed, for a schema that it cannot read, for a
    tokenizer that it cannot read, and for a model without an end token.
    """

    def __init__(self, schema: Mapping[str, Any] | str, tokenizer: ModelTokenizer) -> None:
        try:
            import llguidance
        except ImportError:
            raise SessaError(
                f"`json_schema` needs the package llguidance, which is not installed; {INSTALL}"
            ) from None
        self.library, self.vocab_size = llguidance, tokenizer.config.vocab_size
        self.stop_ids = sorted(tokenizer.stop_ids)
        if not self.stop_ids:
            raise SessaError("`json_schema` needs a model with an end token (eos_token_id)")
        # Free white space would let a model write spaces for ever.
        self.grammar = llguidance.LLMatcher.grammar_from_json_schema(
            _as_text(schema), overrides={"whitespace_flexible": False}
        )
        text = tokenizer.tokenizer.to_str()
        self.tokenizer = _read_tokenizer(text, self.vocab_size, tuple(self.stop_ids))
        if wrong := llguidance.LLMatcher.validate_grammar(self.grammar, self.tokenizer):
            raise SessaError(f"`json_schema` cannot be used: {wrong.splitlines()[0]}")

    def start(self) -> JsonText:
        """Begin a text."""
        return JsonText(self)


class JsonText:
    """A JSON text in the course of being written."""

    def __init__(self, grammar: JsonGrammar) -> None:
        self.matcher = grammar.library.LLMatcher(grammar.tokenizer, grammar.grammar, log_level=0)
        self.only_end = np.zeros(grammar.vocab_size, bool)
        self.only_end[grammar.stop_ids] = True

    def allowed(self) -> np.ndarray:
        """Return True (V,) for the ids that can come next; when it is whole, only for its end."""
        if self.matcher.is_stopped():
            return self.only_end
        found = np.frombuffer(self.matcher.compute_logit_bias(), np.uint8) > 0
        self._check()
        return found

    def accept(self, token: int) -> None:
        """Add a token; what follows the end is not looked at."""
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        if self.matcher.is_error():
            raise SessaError(f"`json_schema` cannot be followed: {self.matcher.get_error()}")


@functools.lru_cache(maxsize=1)
def _read_tokenizer(text: str, vocab_size: int, stop_ids: tuple[int, ...]) -> Any:
    """The tokenizer of a tokenizer.json as llguidance has it; a server asks for it again."""
    import llguidance

    try:
        return llguidance.LLTokenizer(text, n_vocab=vocab_size, eos_token=list(stop_ids))
    except ValueError as error:
        raise SessaError(
            f"`json_schema` needs a tokenizer whose tokens are bytes of text; llguidance "
            f"cannot read this one ({error})"
        ) from None


def _as_text(schema: Mapping[str, Any] | str) -> str:
    try:
        value = parse_json(schema) if isinstance(schema, str) else dict(schema)
        if not isinstance(value, (dict, bool)):
            raise ValueError(f"expected an object, found {type(value).__name__}")
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise SessaError(f"`json_schema` is no JSON schema ({error})") from None
