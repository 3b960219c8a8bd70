"""Files of prompts: their lines, what is refused, what a stop leaves and how it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.decoders import ReferenceDecoder
from support.export_models import lively_weights, small_config

from sessa_common.data.tokenizer import byte_tokenizer
from sessa_common.errors import SessaError
from sessa_common.inference import prompt_file
from sessa_common.inference.chat_template import ChatTemplate
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_common.inference.prompt_file import Progress, PromptFile
from sessa_common.inference.sampling import SamplingConfig
from sessa_common.inference.texts import TextWriter, generate_texts

BYTES = ModelTokenizer.open(byte_tokenizer(), small_config("untied"))
SAMPLING = SamplingConfig(temperature=0.9, seed=5)
PROMPTS = ["The feedback solve", "a", "of a batch", "bb", "The", "x" * 30, "last one"]
TEMPLATE = ChatTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")


class FailingDecoder(ReferenceDecoder):
    """The reference, which fails after so many texts were begun."""

    def __init__(self, config, weights) -> None:
        self.left = 10**9
        super().__init__(config, weights)

    def step(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        if self.cache is None:
            self.left -= len(tokens)
            if self.left < 0:
                raise KeyboardInterrupt
        return super().step(tokens, mask)


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> TextWriter:
    monkeypatch.setattr(prompt_file, "BATCHES_PER_WRITE", 2)
    config = small_config("untied")
    decoder = FailingDecoder(config, lively_weights(config))
    return TextWriter(decoder, BYTES, SAMPLING, max_tokens=12, batch_size=2)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    lines = [json.dumps({"id": i, "prompt": text}) for i, text in enumerate(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("\ufeff" + "\r\n\n".join(lines), encoding="utf-8")
    return tmp_path / "prompts.jsonl"


def complete(writer: TextWriter, source: Path, force: bool = False, **options) -> Progress:
    lines = PromptFile.open(source, source.with_name("out.jsonl"), force=force)
    return lines.complete(writer, **{"template": TEMPLATE, **options})


def read(source: Path) -> list[dict]:
    text = source.with_name("out.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_lines_come_in_their_order_with_their_texts(writer, source: Path) -> None:
    seen: list[Progress] = []
    done = complete(writer, source, on_progress=seen.append)
    expected = generate_texts(writer.decoder, BYTES, PROMPTS, SAMPLING, max_tokens=12)
    assert read(source) == [
        {"id": i, "prompt": text, "text": made.text, "tokens": 12, "finish": "length"}
        for i, (text, made) in enumerate(zip(PROMPTS, expected, strict=True))
    ]
    assert done == seen[-1] == Progress(7, 7, 84)
    assert [progress.done for progress in seen] == list(range(1, 8))
    assert sorted(path.name for path in source.parent.iterdir()) == ["out.jsonl", "prompts.jsonl"]


@pytest.mark.parametrize("cut", [0, 5])
def test_a_stopped_file_goes_on_and_ends_alike(writer, source: Path, cut: int) -> None:
    complete(writer, source)
    expected = read(source)
    source.with_name("out.jsonl").unlink()
    writer.decoder.left = 6
    with pytest.raises(KeyboardInterrupt):
        complete(writer, source)
    partial = source.with_name("out.jsonl.partial")
    assert not source.with_name("out.jsonl").exists()
    if cut:
        partial.write_bytes(partial.read_bytes() + b'{"id": 4, "te')
    # Four texts were written; only the other three are made again.
    writer.decoder.left = 3
    seen: list[Progress] = []
    complete(writer, source, on_progress=seen.append)
    assert seen[0].done == 5 and read(source) == expected and not partial.exists()


def test_another_request_does_not_go_on(writer, source: Path) -> None:
    writer.decoder.left = 6
    with pytest.raises(KeyboardInterrupt):
        complete(writer, source, model="one")
    changes = [{"model": "two"}, {"model": "one", "chat": True}, {"model": "one", "system": "s"}]
    for change in changes:
        with pytest.raises(SessaError, match=r"out\.jsonl\.partial holds 4 texts of another"):
            complete(writer, source, **change)
    writer.max_tokens = 11
    with pytest.raises(SessaError, match="of another request"):
        complete(writer, source, model="one")


def test_chats_use_the_template(writer, source: Path) -> None:
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "?"}]
    lines = [{"prompt": "Hi"}, {"messages": said}]
    source.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    complete(writer, source, chat=True, system="Short.")
    texts = ["[system]Short.[user]Hi", "[system]Short.[user]Hi[assistant]?"]
    expected = generate_texts(writer.decoder, BYTES, texts, SAMPLING, max_tokens=12)
    assert [line["text"] for line in read(source)] == [made.text for made in expected]
    complete(writer, source, force=True)
    plain = generate_texts(writer.decoder, BYTES, ["Hi"], SAMPLING, max_tokens=12)
    assert read(source)[0]["text"] == plain[0].text


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": "a"}\n\n{"prompt": ', "line 3: not readable JSON"),
        ('{"prompt": "a"}\n[1]', "line 2: expected an object, found list"),
        ('{"text": "a"}', 'line 1: expected a "prompt"'),
        ('{"prompt": 3}', 'line 1: expected a "prompt"'),
        ('{"prompt": "a", "messages": []}', 'line 1: expected a "prompt"'),
        ('{"messages": [{"role": "me", "content": ""}]}', 'line 1: expected "messages"'),
        ('{"prompt": "a"}\n{"prompt": "' + "x" * 290 + '"}', "line 2: the prompt has 290 tokens"),
        ('{"prompt": "\\ud800"}', "line 1: not readable JSON"),
        ("\n\n", "has no prompts"),
    ],
)
def test_a_bad_line_is_named_before_the_model_runs(writer, source: Path, text, message) -> None:
    source.write_text(text, encoding="utf-8")
    writer.decoder.left = 0
    with pytest.raises(SessaError, match=message):
        complete(writer, source)
    assert [path.name for path in source.parent.iterdir()] == ["prompts.jsonl"]


def test_bytes_that_are_no_text_are_refused(writer, source: Path) -> None:
    source.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}')
    with pytest.raises(SessaError, match="line 2: not UTF-8"):
        complete(writer, source)


def test_a_finished_file_is_not_replaced_unless_asked(writer, source: Path) -> None:
    source.with_name("out.jsonl").write_text("mine", encoding="utf-8")
    with pytest.raises(SessaError, match=r"out\.jsonl is there already"):
        complete(writer, source)
    complete(writer, source, force=True)
    assert len(read(source)) == 7
    with pytest.raises(SessaError, match="no such folder"):
        PromptFile.open(source, source.parent / "none/out.jsonl")
