"""Chat templates: where they are read from, what they render, how transformers renders them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support.export_models import small_config

from sessa_common.data.tokenizer import byte_tokenizer, write_tokenizer
from sessa_common.errors import SessaError
from sessa_common.inference.chat_template import ChatTemplate, check_messages, with_system
from sessa_common.inference.model_tokenizer import ModelTokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hé <there>\n"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Go on"},
]
TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- generation %}A:{{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}
    {%- elif message.role == 'user' %}
        {{- 'U:' + message.content | trim + eos_token + '\\n' }}
    {%- else %}
        {{- 'S:' + ({'text': message.content} | tojson) + '\\n' }}
        {%- continue %}
    {%- endif %}
{% endfor %}
{% if add_generation_prompt %}A:{% endif %}
"""
RENDERED = (
    '<|endoftext|>S:{"text": "Be brief."}\n'
    "U:Hé <there><|endoftext|>\n"
    "A:Yes?<|endoftext|>"
    "U:Go on<|endoftext|>\n"
    "A:"
)


def folder_with(path: Path, *, jinja: str | None = None, config: object = None) -> Path:
    write_tokenizer(path, byte_tokenizer(), 256, 300)
    settings = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    if config is not None:
        settings["chat_template"] = config
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if jinja is not None:
        (path / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "files",
    [
        {"jinja": TEMPLATE},
        {"config": TEMPLATE},
        {"config": [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]},
        {"jinja": TEMPLATE, "config": "another"},
    ],
    ids=["file", "config", "named", "both"],
)
def test_a_template_is_found_and_rendered_as_transformers_does(tmp_path: Path, files) -> None:
    folder = folder_with(tmp_path, **files)
    template = ChatTemplate.open(folder)
    assert template.render(MESSAGES) == RENDERED
    assert template.stop_texts == ()
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert template.render(MESSAGES) == expected


def test_names_of_special_tokens_become_tokens_and_the_tokenizer_stays(tmp_path: Path) -> None:
    tokenizer = ModelTokenizer.open(byte_tokenizer(), small_config())
    ids = ChatTemplate.open(folder_with(tmp_path, jinja=TEMPLATE)).encode(tokenizer, MESSAGES)
    assert ids[0] == 256 and ids.count(256) == 4
    # Outside of a template the name is plain text, as for every prompt.
    assert 256 not in tokenizer.encode("<|endoftext|>")
    assert 256 not in ChatTemplate().encode(tokenizer, [{"role": "user", "content": RENDERED}])


def test_the_plain_template() -> None:
    expected = "Be brief.\nUser: Hé <there>\nAssistant: Yes?\nUser: Go on\nAssistant:"
    assert ChatTemplate().render(MESSAGES) == expected
    assert ChatTemplate().stop_texts == ("\nUser:",)


def test_a_folder_without_a_template_has_the_plain_one(tmp_path: Path) -> None:
    assert ChatTemplate.open(folder_with(tmp_path)).source is None
    assert ChatTemplate.open(tmp_path / "none").source is None
    assert ChatTemplate.open(None).source is None


@pytest.mark.parametrize(
    "source, message",
    [
        ("{% if %}", "the chat template failed"),
        ("{{ messages[9].content }}", "the chat template failed"),
        ("{{ raise_exception('only one turn') }}", "refuses this conversation: only one turn"),
        # The sandbox of Jinja keeps a template from the rest of the program, and from changes.
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "the chat template failed"),
    ],
)
def test_a_template_that_fails_or_refuses(source: str, message: str) -> None:
    with pytest.raises(SessaError, match=message):
        ChatTemplate(source).render(MESSAGES)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SessaError, match="chat_template is a int"):
        ChatTemplate.open(folder_with(tmp_path, config=3))


def test_a_missing_jinja_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("jinja2.ext", "jinja2.sandbox"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SessaError, match=r"jinja2.*pip install 'sessa-toolchain\[chat\]'"):
        ChatTemplate("a").render(MESSAGES)
    assert ChatTemplate().render(MESSAGES)


def test_messages_are_checked() -> None:
    assert check_messages(MESSAGES, "here") == MESSAGES
    assert with_system(MESSAGES[1:], "Be brief.") == MESSAGES
    assert with_system(MESSAGES, None) == MESSAGES
    bad = [[], None, "text", [{"role": "user"}], [{"role": "tool", "content": "x"}], [["a", "b"]]]
    for given in [*bad, [{"role": "user", "content": 3}]]:
        with pytest.raises(SessaError, match='here: expected "messages"'):
            check_messages(given, "here")
