"""Examples to fine-tune on: the rows of a file, the tokens that count, rows and batches."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.adapters import CONFIG as MODEL_CONFIG
from support.adapters import write_model

from sessa_common.config import SessaConfig
from sessa_common.data.corpus import say_nothing
from sessa_common.data.tokenizer import BYTES_END_ID, byte_tokenizer
from sessa_common.errors import SessaError
from sessa_common.inference.chat_template import DEFAULT_TEMPLATE, ChatTemplate
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_common.train_config import TrainConfig
from sessa_common.training.example_batches import ExampleBatches, pack_examples
from sessa_common.training.examples import Example, has_examples, read_examples
from sessa_common.training.finetuning import finetune_run

CONFIG = SessaConfig(
    vocab_size=257, hidden_size=8, max_position_embeddings=40, eos_token_id=BYTES_END_ID
)
END = "<|endoftext|>"
TEMPLATE = ChatTemplate(DEFAULT_TEMPLATE, {"eos_token": END})
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(*names: str, loss_on: str = "answers", template: ChatTemplate = TEMPLATE) -> list[Example]:
    tokenizer = ModelTokenizer.open(byte_tokenizer(), CONFIG)
    return read_examples(names, tokenizer, template, loss_on, BYTES_END_ID, say_nothing)[0]


def counted(example: Example) -> str:
    """The text of the tokens that count, the end token as a dollar sign."""
    ids = example.tokens[example.counted].tolist()
    return "".join("$" if i == BYTES_END_ID else chr(i) for i in ids)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"messages": [USER, ANSWER]}, " yo$\n"),
        ({"messages": [USER, ANSWER, USER, {**ANSWER, "content": "ok"}]}, " yo$\n ok$\n"),
        ({"prompt": "1+1=", "completion": "2"}, "2$"),
        ({"prompt": [USER], "completion": [ANSWER]}, " yo$\n"),
        ({"prompt": [USER, ANSWER, USER], "completion": [{**ANSWER, "content": "ok"}]}, " ok$\n"),
        ({"prompt": f"a{END}", "completion": END}, f"{END}$"),
    ],
)
def test_answers_and_their_end_count_and_nothing_else(row: Any, text: str, tmp_path: Path) -> None:
    (example,) = read(write(tmp_path / "a.jsonl", row))
    assert counted(example) == text
    (whole,) = read(write(tmp_path / "a.jsonl", row), loss_on="all")
    assert whole.counted.all() and np.array_equal(whole.tokens, example.tokens)


def test_generation_tags_of_a_template_mark_the_answers(tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}"
        "{% else %}{% if loop.last %}(last){% endif %}A:{% generation %}{{ m.content }};"
        "{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    name = write(tmp_path / "a.jsonl", {"messages": [USER, ANSWER, USER, ANSWER]})
    (example,) = read(name, template=ChatTemplate(source))
    assert counted(example) == "yo;yo;"
    plain = source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(SessaError, match=r"a.jsonl, line 1: .* writes answer 2 of 4 otherwise"):
        read(name, template=ChatTemplate(plain))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": "hi"}, 'line 2: expected "messages", a list of objects'),
        ({"messages": [{"role": "tool", "content": "x"}]}, "line 2: .*system, user, assistant"),
        ({"messages": [USER]}, "line 2: no message of the assistant"),
        ({"messages": [USER, ANSWER], "tools": [{}]}, 'line 2: has "tools"'),
        ({"text": "a"}, 'line 2: has "text", but earlier rows are conversations'),
        ({"prompt": "a"}, "line 2: .* must both be texts, or lists of messages"),
        ({"prompt": "a", "completion": ""}, 'line 2: the "completion" is empty'),
        ({"question": "a"}, 'line 2: expected "messages", .*; it has question'),
        ([1], "line 2: expected a JSON object, found a list"),
    ],
)
def test_a_row_that_does_not_fit_is_named(row: Any, says: str, tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", {"messages": [USER, ANSWER]}, row)
    with pytest.raises(SessaError, match=f"a.jsonl, {says}"):
        read(name)


def test_the_first_row_says_what_a_file_has(tmp_path: Path) -> None:
    chat = write(tmp_path / "chat.jsonl", {"messages": [USER, ANSWER]})
    text = write(tmp_path / "text.jsonl", {"text": "a"})
    assert has_examples([chat], "text") and not has_examples([text, "pydoc"], "text")
    assert not has_examples([write(tmp_path / "b.jsonl", {"prompt": "a", "body": "b"})], "body")
    with pytest.raises(SessaError, match=r"chat.jsonl has conversations and .*text.jsonl has"):
        has_examples([chat, text], "text")
    with pytest.raises(SessaError, match=r"chat.jsonl has conversations and pydoc has texts"):
        has_examples([chat, "pydoc"], "text")
    with pytest.raises(SessaError, match="no row in it"):
        has_examples([write(tmp_path / "c.jsonl")], "text")


def test_a_folder_of_mlx_lm_keeps_its_parts_apart(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("valid", 2), ("test", 5)):
        write(tmp_path / f"{part}.jsonl", *[{"prompt": "a", "completion": "b"}] * count)
    base = write_model(tmp_path / "base")
    settings = TrainConfig.for_finetuning()
    settings = dataclasses.replace(settings, data=(str(tmp_path),), batch_size=4)
    run = finetune_run(tmp_path / "out", base, MODEL_CONFIG, settings, say_nothing)
    assert run.source.summary.startswith("3 training examples")
    assert [len(batch.inputs) for batch in run.source.validation()] == [2]
    assert run.settings.data == (str(tmp_path / "train.jsonl"),)


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SessaError, match="`lora_rank` has no effect, because `train` is all"):
        TrainConfig(lora_rank=3)
    text = write(tmp_path / "text.jsonl", {"text": "a"})
    settings = TrainConfig(train="lora", data=(text,), packing=True)
    with pytest.raises(SessaError, match="`packing` is about conversations"):
        finetune_run(
            tmp_path / "out", write_model(tmp_path / "b"), MODEL_CONFIG, settings, say_nothing
        )


def examples(*lengths: int) -> list[Example]:
    """Examples of different tokens of which all but the first two count."""
    return [Example(np.full(n, i, np.int32), np.arange(n) > 1) for i, n in enumerate(lengths)]


def test_rows_of_one_example_are_filled_up_and_cut(tmp_path: Path) -> None:
    settings = TrainConfig(batch_size=2, validation_fraction=0, sequence_length=20)
    source = ExampleBatches(examples(30, 5, 2), CONFIG, settings)
    assert [note.split(": ")[1][:10] for note in source.notes] == ["1 of 3 exa", "1 examples"]
    batches = [source.batch(i) for i in range(2)]
    assert {batch.inputs.shape for batch in batches} == {(2, 20)}
    for batch in batches:
        rows = {int(row[0]): i for i, row in enumerate(batch.inputs)}
        # The first two tokens of an example do not count, the others do.
        assert batch.weights[rows[0]].tolist() == [0] + [1] * 19
        assert batch.weights[rows[1]].tolist() == [0] + [1] * 3 + [0] * 16
    with pytest.raises(SessaError, match="no example to learn from"):
        ExampleBatches(examples(2, 2), CONFIG, settings)
    with pytest.raises(SessaError, match="too few to hold out 1 for validation"):
        ExampleBatches(examples(9), CONFIG, TrainConfig(validation_fraction=0.1))


def test_packed_rows_hold_every_example_once() -> None:
    lengths = np.random.default_rng(0).integers(3, 41, 60)
    given = examples(*lengths)
    rows = pack_examples(given, 41)
    assert max(len(row.tokens) for row in rows) <= 41
    packed = np.concatenate([row.tokens for row in rows])
    assert np.array_equal(np.bincount(packed), lengths)
    assert sum(row.counted.sum() for row in rows) == sum(each.counted.sum() for each in given)
    assert len(rows) <= 1.2 * lengths.sum() / 41
    whole = pack_examples([Example(np.arange(3, dtype=np.int32), np.ones(3, bool))] * 2, 9)
    assert whole[0].counted.tolist() == [False, True, True] * 2


def test_packed_examples_do_not_read_each_other() -> None:
    settings = TrainConfig(batch_size=1, packing=True, sequence_length=12, validation_fraction=0)
    batch = ExampleBatches(examples(3, 5, 3), CONFIG, settings).batch(0)
    # The longest comes first; the last token of the row is a target alone.
    assert batch.inputs[0, :10].tolist() == [1] * 5 + [0] * 3 + [2] * 2
    assert batch.document_starts is not None
    assert batch.document_starts[0].tolist() == [0] * 5 + [5] * 3 + [8] * 4
    crossing = batch.inputs[0, :10] != batch.targets[0, :10]
    assert crossing.sum() == 2 and not batch.weights[0, :10][crossing].any()
    joined = dataclasses.replace(settings, documents="joined")
    assert ExampleBatches(examples(3, 5, 3), CONFIG, joined).batch(0).document_starts is None


def test_the_held_out_examples_do_not_follow_the_seed() -> None:
    runs = [
        ExampleBatches(examples(*range(5, 25)), CONFIG, TrainConfig(seed=seed, batch_size=2))
        for seed in (0, 1)
    ]
    held_out = [{int(batch.inputs[0, 0]) for batch in run.validation()} for run in runs]
    assert held_out[0] == held_out[1] and runs[0].fingerprint == runs[1].fingerprint
    trained = [[int(run.batch(i).inputs[0, 0]) for i in range(19)] for run in runs]
    assert not held_out[0] & set(trained[0]) and trained[0] != trained[1]
