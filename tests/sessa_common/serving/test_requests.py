"""Bodies of requests: what fits, and what is refused in which words."""

from __future__ import annotations

import pytest
from support.export_models import small_config

from sessa_common.data.tokenizer import byte_tokenizer
from sessa_common.errors import SessaError
from sessa_common.inference.chat_template import ChatTemplate
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_common.serving.requests import ApiError, RequestReader

READER = RequestReader(
    ModelTokenizer.open(byte_tokenizer(), small_config()), ChatTemplate(), ["m", "runs/m"]
)
SAID = [{"role": "user", "content": "Hi"}]


def completion(**body):
    return READER.completion({"model": "m", "prompt": "ab", **body})


def chat(**body):
    return READER.chat({"model": "m", "messages": SAID, **body})


def test_defaults_are_those_of_the_api() -> None:
    asked = completion()
    assert asked.prompts == [[97, 98]] and asked.budgets == [16] and asked.n == 1
    assert asked.sampling.temperature == 1 and asked.sampling.top_p == 1
    assert asked.rules is None and asked.likeliest is None and not asked.stream
    assert asked.sampling.seed != completion().sampling.seed
    said = chat()
    # A chat may fill the context, and the plain template ends it where the user speaks.
    assert said.budgets == [300 - len(said.prompts[0])] and said.stop_texts == ("\nUser:",)
    assert bytes(said.prompts[0]) == b"User: Hi\nAssistant:"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        ("", [[256]]),
    ],
)
def test_prompts(prompt, expected) -> None:
    asked = completion(prompt=prompt)
    assert asked.prompts == expected and asked.budgets == [16] * len(expected)


def test_every_field_arrives() -> None:
    asked = completion(
        model="runs/m",
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        min_p=0.1,
        seed=7,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.2,
        logit_bias={"5": -100},
        stop="end",
        logprobs=2,
        max_tokens=9,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
        user="someone",
        best_of=None,
        echo=False,
    )
    s, r = asked.sampling, asked.rules.rules
    assert (s.temperature, s.top_p, s.top_k, s.min_p, s.seed) == (0.5, 0.9, 3, 0.1, 7)
    assert (r.presence_penalty, r.frequency_penalty, r.repetition_penalty) == (0.5, -0.5, 1.2)
    assert r.logit_bias == {5: -100} and asked.stop_texts == ("end",) and asked.likeliest == 2
    assert asked.budgets == [9] and asked.n == 2 and asked.stream and asked.include_usage


def test_messages_in_parts_and_of_a_developer() -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    said = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert bytes(chat(messages=said).prompts[0]) == b"Be brief.\nUser: Hi\nAssistant:"


def test_schemas() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert chat(response_format=named).rules.rules.json_schema == schema
    assert chat(response_format={"type": "json_object"}).rules.rules.json_schema["type"] == "object"
    assert chat(response_format={"type": "text"}).rules is None


def test_tokens_of_a_chat() -> None:
    assert chat(max_tokens=5).budgets == chat(max_completion_tokens=5, max_tokens=9).budgets == [5]
    assert chat(logprobs=True).likeliest == 0 and chat(logprobs=False).likeliest is None
    assert chat(logprobs=True, top_logprobs=3).likeliest == 3


LONG = {"prompt": "x" * 280, "max_tokens": 21}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (LONG, "the prompt has 280 tokens and 21 more were asked for, but the model reads at most"),
        ({"prompt": "x" * 301}, "reads at most 300"),
        ({"prompt": None}, "`prompt` must be"),
        ({"prompt": []}, "`prompt` must be"),
        ({"prompt": [[]]}, "`prompt` must be"),
        ({"prompt": [257]}, "token ids 0..256"),
        ({"prompt": [True]}, "`prompt` must be"),
        ({"prompt": ["a", 5]}, "`prompt` must be"),
        ({"model": "other"}, "the model 'other' is not here; this server has 'm'"),
        ({"model": None}, "`model` is missing"),
        ({"temperature": "hot"}, "`temperature` must be a number"),
        ({"temperature": True}, "`temperature` must be a number"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"n": 1.5}, "`n` must be an integer"),
        ({"max_tokens": 0}, "`max_tokens` is 0, expected at least 1"),
        ({"stop": ["a"] * 5}, "at most 4 texts"),
        ({"stop": ""}, "`stop` must be"),
        ({"stop": 5}, "`stop` must be"),
        ({"stop": {"a": 1}}, "`stop` must be"),
        ({"logprobs": 21}, "at most 20"),
        ({"logit_bias": {"a": 1}}, "`logit_bias` must map"),
        ({"logit_bias": {"5": "1"}}, "`logit_bias` must map"),
        ({"logit_bias": {"5": 101}}, "`logit_bias` must map"),
        ({"presence_penalty": 2.5}, "`presence_penalty` must be between -2 and 2"),
        ({"logit_bias": {"999": 1}}, "ids 0..256"),
        ({"echo": True}, "`echo` is not supported"),
        ({"best_of": 2}, "`best_of` is not supported"),
        ({"suffix": "x"}, "`suffix` is not supported"),
        ({"messages": SAID}, "`messages` is not a known field"),
        ({"stream_options": 5}, "`stream_options` must be a dict"),
    ],
)
def test_completions_that_are_refused(body, says) -> None:
    with pytest.raises((ApiError, SessaError), match="^.*" + says.replace("[", r"\[")):
        completion(**body)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"messages": []}, 'expected "messages"'),
        ({"messages": "Hi"}, "`messages` must be a list"),
        ({"messages": ["Hi"]}, "must be a list of objects"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 'expected "messages"'),
        ({"messages": [{"role": "user"}]}, 'expected "messages"'),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only texts"),
        ({"messages": [{**SAID[0], "content": "x" * 300}]}, "reads at most 300"),
        ({"tools": [{"type": "function"}]}, "`tools` is not supported"),
        ({"top_logprobs": 2}, "asks for logprobs"),
        ({"logprobs": 2}, "`logprobs` must be true or false"),
        ({"response_format": {"type": "xml"}}, "`response_format` must have the type"),
        ({"response_format": {"type": "json_schema"}}, "json_schema with a schema"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "nothing"}},
                }
            },
            "`json_schema` cannot be used",
        ),
    ],
)
def test_chats_that_are_refused(body, says) -> None:
    with pytest.raises((ApiError, SessaError), match=says):
        chat(**body)


def test_what_a_client_does_about_it() -> None:
    with pytest.raises(ApiError) as long:
        completion(**LONG)
    assert (long.value.status, long.value.code) == (400, "context_length_exceeded")
    with pytest.raises(ApiError) as other:
        completion(model="other")
    assert (other.value.status, other.value.code) == (404, "model_not_found")
