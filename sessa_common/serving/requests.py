"""Requests of the OpenAI API: JSON bodies in, checked and tokenised needs out."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sessa_common.errors import SessaError
from sessa_common.inference.chat_template import ChatTemplate, check_messages
from sessa_common.inference.generation import token_budget
from sessa_common.inference.logit_rules import LogitRules, PreparedRules, prepare_rules
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_common.inference.sampling import SamplingConfig

# Defaults and limits of the API, which are not those of this library.
TEMPERATURE, COMPLETION_TOKENS = 1.0, 16
MOST_STOPS, MOST_LIKELIEST = 4, 20
PENALTIES, LARGEST_PENALTY, LARGEST_BIAS = ("presence_penalty", "frequency_penalty"), 2, 100

SAMPLING = {"temperature": float, "top_p": float, "top_k": int, "min_p": float, "seed": int}
RULES = {"presence_penalty": float, "frequency_penalty": float, "repetition_penalty": float}
COMMON = {
    **SAMPLING,
    **RULES,
    "model": str,
    "n": int,
    "max_tokens": int,
    "stream": bool,
    "stream_options": dict,
    "logit_bias": dict,
}
COMPLETION = {**COMMON, "logprobs": int}
CHAT = {
    **COMMON,
    "messages": list,
    "max_completion_tokens": int,
    "logprobs": bool,
    "top_logprobs": int,
    "response_format": dict,
}
# Fields of any type, read by a function of their own.
FREE = {"stop", "prompt"}
# Fields that change no text.
IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Fields that ask for what is not there, with the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "suffix": ("",),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
TYPE_NAMES = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}


class ApiError(Exception):
    """A request that is refused, with what the API says beside the message."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request that was checked: prompts as ids, and how each is to be continued.

    `budgets` has the largest number of tokens for each prompt. `likeliest` is None without
    log-probabilities, else the number of likeliest tokens to tell.
    """

    chat: bool
    prompts: list[list[int]]
    budgets: list[int]
    n: int
    sampling: SamplingConfig
    rules: PreparedRules | None
    stop_texts: tuple[str, ...]
    likeliest: int | None
    stream: bool
    include_usage: bool


class RequestReader:
    """Reads requests for one model, which any of `names` names; one thread at a time."""

    def __init__(
        self, tokenizer: ModelTokenizer, template: ChatTemplate, names: Sequence[str]
    ) -> None:
        self.tokenizer, self.template, self.names = tokenizer, template, names

    def completion(self, body: Mapping[str, Any]) -> Asked:
        """Read the body of POST /v1/completions; ApiError or SessaError for what does not fit."""
        given = _checked(body, COMPLETION)
        self._require_model(given)
        prompts = self._prompts(given.get("prompt"))
        wanted = given.get("max_tokens", COMPLETION_TOKENS)
        return self._asked(given, prompts, wanted, chat=False, likeliest=given.get("logprobs"))

    def chat(self, body: Mapping[str, Any]) -> Asked:
        """Read the body of POST /v1/chat/completions; errors as in `completion`."""
        given = _checked(body, CHAT)
        self._require_model(given)
        messages = check_messages([*map(_message, given.get("messages", []))], "the request")
        ids = self.template.encode(self.tokenizer, messages)
        wanted = given.get("max_completion_tokens", given.get("max_tokens"))
        likeliest = given.get("top_logprobs", 0) if given.get("logprobs") else None
        if likeliest is None and given.get("top_logprobs"):
            raise ApiError("top_logprobs asks for logprobs to be true", param="top_logprobs")
        return self._asked(given, [ids], wanted, chat=True, likeliest=likeliest)

    def _asked(
        self,
        given: Mapping[str, Any],
        prompts: list[list[int]],
        wanted: int | None,
        *,
        chat: bool,
        likeliest: int | None,
    ) -> Asked:
        if likeliest is not None and not 0 <= likeliest <= MOST_LIKELIEST:
            raise ApiError(f"at most {MOST_LIKELIEST} log-probabilities of a token can be had")
        sampling = {name: given[name] for name in SAMPLING if name in given}
        # Two requests without a seed must not write the same text.
        sampling = {"temperature": TEMPERATURE, "seed": secrets.randbits(63), **sampling}
        options = given.get("stream_options") or {}
        return Asked(
            chat=chat,
            prompts=prompts,
            budgets=[self._budget(prompt, wanted, chat) for prompt in prompts],
            n=given.get("n", 1),
            sampling=SamplingConfig(**sampling),
            rules=self._rules(given),
            stop_texts=(*_stops(given.get("stop")), *(self.template.stop_texts if chat else ())),
            likeliest=likeliest,
            stream=given.get("stream", False),
            include_usage=bool(options.get("include_usage")),
        )

    def _require_model(self, given: Mapping[str, Any]) -> None:
        name = given.get("model")
        if name is None:
            raise ApiError(f"`model` is missing; this server has {self.names[0]!r}", param="model")
        if name not in self.names:
            raise ApiError(
                f"the model {name!r} is not here; this server has {self.names[0]!r}",
                status=404,
                param="model",
                code="model_not_found",
            )

    def _prompts(self, given: Any) -> list[list[int]]:
        """Ids of a text, of a list of texts, or of one or several lists of ids."""
        if isinstance(given, str):
            return [self.tokenizer.encode(given)]
        if isinstance(given, list) and given:
            if all(isinstance(text, str) for text in given):
                return [self.tokenizer.encode(text) for text in given]
            rows = [given] if isinstance(given[0], int) else given
            if all(isinstance(row, list) and row and all(map(self._is_id, row)) for row in rows):
                return rows
        last = self.tokenizer.config.vocab_size - 1
        raise ApiError(
            f"`prompt` must be a text, a list of texts, or lists of token ids 0..{last}",
            param="prompt",
        )

    def _is_id(self, given: Any) -> bool:
        return type(given) is int and 0 <= given < self.tokenizer.config.vocab_size

    def _budget(self, prompt: Sequence[int], wanted: int | None, chat: bool) -> int:
        config = self.tokenizer.config
        if wanted is not None and wanted < 1:
            raise ApiError(f"`max_tokens` is {wanted}, expected at least 1", param="max_tokens")
        try:
            room = max(config.max_position_embeddings - len(prompt), 1)
            return token_budget(config, len(prompt), wanted or room)
        except SessaError as error:
            param = "messages" if chat else "prompt"
            raise ApiError(str(error), param=param, code="context_length_exceeded") from None

    def _rules(self, given: Mapping[str, Any]) -> PreparedRules | None:
        fields = {name: given[name] for name in RULES if name in given}
        for name in PENALTIES:
            if abs(given.get(name, 0)) > LARGEST_PENALTY:
                raise ApiError(f"`{name}` must be between -2 and 2", param=name)
        fields["logit_bias"] = _bias(given.get("logit_bias") or {})
        fields["json_schema"] = _schema(given.get("response_format"))
        return prepare_rules(LogitRules(**fields), self.tokenizer)


def _checked(body: Mapping[str, Any], types: Mapping[str, type]) -> dict[str, Any]:
    """Return the fields that are not null; ApiError for unknown fields and wrong types."""
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name in REFUSED:
            if value not in REFUSED[name]:
                raise ApiError(f"`{name}` is not supported by this server", param=name)
        elif name not in types and name not in FREE | IGNORED:
            raise ApiError(f"`{name}` is not a known field of this request", param=name)
        elif name in types and not _fits(value, types[name]):
            expected = TYPE_NAMES.get(types[name], f"a {types[name].__name__}")
            raise ApiError(f"`{name}` must be {expected}", param=name)
    return given


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _message(given: Any) -> dict[str, Any]:
    """A message whose content may be a list of texts, as the API allows."""
    if not isinstance(given, dict):
        raise ApiError("`messages` must be a list of objects", param="messages")
    if given.get("tool_calls"):
        raise ApiError("`tool_calls` is not supported by this server", param="messages")
    role, content = given.get("role"), given.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        texts = [text for text in parts if isinstance(text, str)]
        if len(texts) < len(parts):
            raise ApiError("only texts can be the content of a message", param="messages")
        content = "".join(texts)
    return {"role": "system" if role == "developer" else role, "content": content}


def _stops(given: Any) -> tuple[str, ...]:
    texts = [given] if isinstance(given, str) else given or []
    fits = isinstance(texts, list) and all(isinstance(text, str) and text for text in texts)
    if not fits or len(texts) > MOST_STOPS:
        raise ApiError(f"`stop` must be a text or at most {MOST_STOPS} texts", param="stop")
    return tuple(texts)


def _bias(given: Mapping[str, Any]) -> dict[int, float]:
    values = given.values()
    fits = all(_fits(value, float) and abs(value) <= LARGEST_BIAS for value in values)
    if not fits or not all(token.isdecimal() for token in given):
        message = f"`logit_bias` must map token ids to numbers of at most {LARGEST_BIAS}"
        raise ApiError(message, param="logit_bias")
    return {int(token): float(value) for token, value in given.items()}


def _schema(given: Mapping[str, Any] | None) -> Any:
    """The JSON schema that a response_format asks for, None without."""
    kind = None if given is None else given.get("type")
    if given is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    named = given.get("json_schema")
    if kind == "json_schema" and isinstance(named, dict) and isinstance(named.get("schema"), dict):
        return named["schema"]
    raise ApiError(
        "`response_format` must have the type text, json_object, or json_schema with a schema",
        param="response_format",
    )
