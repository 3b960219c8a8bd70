"""Conversations: what stays cached, what leaves the context, what an interruption leaves behind."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from support.decoders import ScriptedDecoder
from support.export_models import small_config, write_checkpoint

import sessa_export.runtime
import sessa_mlx.decoding
import sessa_torch.decoding
from sessa_common.data.tokenizer import byte_tokenizer
from sessa_common.errors import SessaError
from sessa_common.inference.chat_template import ChatTemplate
from sessa_common.inference.conversation import Conversation
from sessa_common.inference.logit_rules import LogitRules
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_common.inference.sampling import SamplingConfig
from sessa_export.exporter import export_checkpoint

CONFIG = small_config("untied", num_key_value_heads=2)
MAMBA = small_config("untied", layer_kinds=("mamba2", "sessa"), mamba_d_state=12, mamba_d_head=16)
# Only printable ASCII, so that the bytes of an answer are those of its text when it is read again.
PRINTABLE = LogitRules(logit_bias={i: -np.inf for i in range(256) if not 33 <= i < 127})
TEMPLATE = ChatTemplate(
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}",
    {"eos_token": "<|endoftext|>"},
)
GREEDY = SamplingConfig(temperature=0)


@pytest.fixture(scope="module")
def decoders(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("chat")
    write_checkpoint(root / "rows", CONFIG)
    write_checkpoint(root / "mamba", MAMBA)
    export_checkpoint(root / "rows", root / "exported")
    return {
        "torch": sessa_torch.decoding.load_decoder(root / "rows"),
        "mlx": sessa_mlx.decoding.load_decoder(root / "rows"),
        "onnx": sessa_export.runtime.load_decoder(root / "exported"),
        "torch, mamba": sessa_torch.decoding.load_decoder(root / "mamba"),
        "mlx, mamba": sessa_mlx.decoding.load_decoder(root / "mamba"),
    }


class Counting:
    """A decoder that counts the tokens that it reads."""

    def __init__(self, decoder) -> None:
        self.decoder, self.read = decoder, 0

    def __getattr__(self, name: str):
        return getattr(self.decoder, name)

    def feed(self, tokens, mask=None) -> None:
        self.read += tokens.size
        self.decoder.feed(tokens, mask)

    def step(self, tokens, mask=None):
        self.read += tokens.size
        return self.decoder.step(tokens, mask)


def begin(decoder, template=TEMPLATE, sampling=GREEDY, **options) -> Conversation:
    tokenizer = ModelTokenizer.open(byte_tokenizer(), decoder.config)
    options = {"rules": PRINTABLE, "max_tokens": 20, **options}
    return Conversation(decoder, tokenizer, template, sampling, **options)


def say(talk: Conversation, text: str) -> str:
    return "".join(talk.reply(text))


NAMES = ["torch", "mlx", "onnx", "torch, mamba", "mlx, mamba"]


@pytest.mark.parametrize("name", NAMES)
def test_cached_turns_change_no_answer(decoders, name: str) -> None:
    for sampling in (GREEDY, SamplingConfig(temperature=0.9, seed=3)):
        talk = begin(decoders[name], sampling=sampling, system="Short.")
        answers = [say(talk, text) for text in ("Hello", "And then?", "Why")]
        assert all(answers) and len(set(answers)) > 1
        anew = begin(decoders[name], sampling=sampling, system="Short.")
        for text, answer in zip(("Hello", "And then?"), answers, strict=False):
            anew.turns += [
                {"role": "user", "content": text},
                {"role": "assistant", "content": answer},
            ]
        assert say(anew, "Why") == answers[2]


@pytest.mark.parametrize("name", NAMES)
def test_only_new_tokens_are_read(decoders, name: str) -> None:
    decoder = Counting(decoders[name])
    talk = begin(decoder)
    say(talk, "Hello, who is there")
    decoder.read = 0
    answer = say(talk, "Me")
    # The last id of the answer before, its end and what is around "Me"; then the answer itself.
    again = len("[u]Hello, who is there!") + len("[a]") if "mamba" in name else 0
    assert len(answer) == 20
    assert decoder.read - again <= 1 + 1 + len("[u]Me!") + len("[a]") + 20 + (20 if again else 0)
    assert bool(again) or decoder.read < 40


def test_the_oldest_turns_leave_a_full_context(decoders) -> None:
    talk = begin(decoders["torch"], system="Short.", max_tokens=60)
    for i in range(6):
        say(talk, f"{i} " + "x" * 40)
    assert talk.dropped > 0 and talk.dropped % 2 == 0
    assert len(talk.messages) == 13
    short = begin(decoders["torch"], system="Short.", max_tokens=60)
    short.turns = talk.turns[talk.dropped : -2]
    # The random stream of a turn is its number, so only a greedy answer is the same.
    assert say(short, "5 " + "x" * 40) == talk.turns[-1]["content"]


def test_several_turns_leave_at_once(decoders) -> None:
    decoder = Counting(decoders["torch"])
    talk = begin(decoder, max_tokens=8)
    reads, dropped = [], []
    for i in range(14):
        decoder.read = 0
        say(talk, f"{i} and so on")
        reads.append(decoder.read)
        dropped.append(talk.dropped)
    # Turns without a drop read what is new; one that drops reads three quarters of a context.
    moved = [one != other for one, other in pairwise([0, *dropped])]
    assert 1 <= sum(moved) <= 3
    assert all(
        count > 100 if moves else count < 50 for count, moves in zip(reads, moved, strict=True)
    )


def test_a_message_that_cannot_fit_changes_nothing(decoders) -> None:
    talk = begin(decoders["torch"])
    say(talk, "Hello")
    before = [*talk.turns]
    with pytest.raises(SessaError, match=r"the message has 407 tokens .* at most 300"):
        say(talk, "x" * 400)
    assert talk.turns == before and talk.dropped == 0
    assert say(talk, "Me")


@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_answer_is_kept_and_the_cache_goes_on(decoders, name: str) -> None:
    talk = begin(decoders[name])
    heard: list[str] = []
    heard.extend(talk.reply("Hello", is_stopped=lambda: len(heard) >= 4))
    answer = talk.turns[-1]["content"]
    assert answer == "".join(heard) and 4 <= len(answer) <= 5
    following = say(talk, "Me")
    anew = begin(decoders[name])
    anew.turns = talk.turns[:2]
    assert say(anew, "Me") == following


@pytest.mark.parametrize("name", NAMES)
def test_a_stop_is_heard_while_a_long_message_is_read(decoders, monkeypatch, name: str) -> None:
    monkeypatch.setattr("sessa_common.inference.generation.PREFILL_CHUNK", 16)
    inner = decoders[name].fork()
    inner.prefill_tokens = 16
    decoder = Counting(inner)
    talk = begin(decoder)
    text = "A long message that is read in several pieces, one after the other"
    expected = say(begin(decoders[name]), text)
    assert list(talk.reply(text, is_stopped=lambda: decoder.read >= 32)) == []
    assert decoder.read == 32 and talk.turns == []
    # What was read stays in the cache.
    decoder.read = 0
    assert say(talk, text) == expected
    again = 0 if decoder.trimmable or inner.length == 0 else 32
    assert decoder.read <= len(f"[u]{text}![a]") - 32 + 20 + again


def test_an_error_in_a_step_empties_the_cache(decoders) -> None:
    decoder = decoders["torch"]
    talk = begin(decoder)
    expected = [say(talk, "Hello"), say(talk, "Me")]
    talk.reset()
    say(talk, "Hello")

    def stop() -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(talk.reply("Me", stop))
    # What was heard before the error stays said; a message without an answer does not.
    assert [m["role"] for m in talk.turns] == ["user", "assistant"] * 2
    assert decoder.length == 0 and talk.cached == []
    talk.turns = talk.turns[:2]
    assert say(talk, "Me") == expected[1]


def test_an_answer_has_room(decoders) -> None:
    with pytest.raises(SessaError, match="max_tokens is 0"):
        begin(decoders["torch"], max_tokens=0)


def test_reset_and_restore(decoders) -> None:
    talk = begin(decoders["torch"], system="Short.")
    answers = [say(talk, "Hello"), say(talk, "Me")]
    saved = talk.messages
    talk.reset()
    assert talk.messages == saved[:1] and say(talk, "Hello") == answers[0]
    other = begin(decoders["torch"])
    other.restore(saved[:3])
    assert other.messages == saved[:3] and say(other, "Me") == answers[1]
    with pytest.raises(SessaError, match="in turn"):
        other.restore(saved[:2])
    with pytest.raises(SessaError, match="only one"):
        begin(decoders["torch"], ChatTemplate("{{ raise_exception('only one') }}")).restore([])


def test_the_plain_template_ends_an_answer_where_the_user_would_speak(decoders) -> None:
    ids = [*b"Yes\nUser: more"]
    decoder = ScriptedDecoder(ids)
    decoder.trimmable = True
    decoder.trim = lambda count: setattr(decoder, "length", decoder.length - count)
    talk = begin(decoder, ChatTemplate(), rules=None, max_tokens=None)
    assert say(talk, "Hello") == "Yes"
    assert talk.turns[-1] == {"role": "assistant", "content": "Yes"}
