"""Rules on logits: each changes what it says, alike in every runtime, and fits its tokenizer."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from support.export_models import small_config, write_checkpoint

import sessa_export.runtime
import sessa_mlx.decoding
import sessa_torch.decoding
from sessa_common.data.tokenizer import byte_tokenizer, train_bpe, word_tokenizer
from sessa_common.errors import SessaError
from sessa_common.inference.logit_rules import LogitRules, PreparedRules
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_common.inference.sampling import SamplingConfig
from sessa_common.inference.texts import generate_texts
from sessa_export.exporter import export_checkpoint

BYTES = ModelTokenizer.open(byte_tokenizer(), small_config())
LOGITS = np.linspace(-2, 2, 257, dtype=np.float32)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Zoë"]}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def changed(rules: LogitRules, prompts: list[list[int]], *ids: list[int]) -> np.ndarray:
    """LOGITS for every row after the given columns of ids."""
    state = PreparedRules(rules, BYTES).start(prompts)
    for column in ids:
        state.accept(np.array(column))
    return state.apply(np.tile(LOGITS, (len(prompts), 1)))


def test_repetition_penalty_makes_what_was_there_less_likely() -> None:
    got = changed(LogitRules(repetition_penalty=2.0), [[0, 200], [5]], [7, 0], [250, 5])
    expected = np.tile(LOGITS, (2, 1))
    for row, tokens in enumerate(([0, 200, 7, 250], [5, 0])):
        for token in tokens:
            expected[row, token] *= 0.5 if LOGITS[token] > 0 else 2
    np.testing.assert_array_equal(got, expected)


def test_presence_and_frequency_count_the_new_text_only() -> None:
    rules = LogitRules(presence_penalty=1.0, frequency_penalty=0.25)
    difference = LOGITS - changed(rules, [[0, 200]], [7], [7], [250])[0]
    expected = np.zeros(257)
    expected[7], expected[250] = 1.5, 1.25
    np.testing.assert_allclose(difference, expected, atol=1e-6)


def test_bias_is_added_and_forbids() -> None:
    got = changed(LogitRules(logit_bias={3: 1.5, 256: -math.inf}), [[0]])[0]
    assert got[3] == LOGITS[3] + np.float32(1.5) and np.isneginf(got[256])
    assert (np.delete(got, [3, 256]) == np.delete(LOGITS, [3, 256])).all()
    with pytest.raises(SessaError, match="forbids every token"):
        changed(LogitRules(logit_bias=dict.fromkeys(range(257), -math.inf)), [[0]])


def test_rows_that_stay_keep_what_they_hold() -> None:
    rules = PreparedRules(LogitRules(repetition_penalty=3.0, frequency_penalty=0.5), BYTES)
    state, alone = rules.start([[1], [2], [3]]), rules.start([[3]])
    state.accept(np.array([9, 9, 250]))
    alone.accept(np.array([250]))
    state.keep([2])
    np.testing.assert_array_equal(state.apply(LOGITS[None]), alone.apply(LOGITS[None]))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"presence_penalty": math.inf}, "presence_penalty is inf"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan"),
        ({"logit_bias": {1: math.nan}}, "logit_bias is"),
        ({"logit_bias": {257: 1.0}}, r"logit_bias is 257, expected ids 0\.\.256"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias is -1"),
    ],
)
def test_bad_rules_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(SessaError, match=message):
        PreparedRules(LogitRules(**fields), BYTES)


def test_rules_are_off_by_default() -> None:
    assert not LogitRules().active and not LogitRules(logit_bias={}).active
    assert LogitRules(json_schema={}).active and LogitRules(presence_penalty=-1).active


@pytest.fixture(scope="module")
def decoders(tmp_path_factory) -> list:
    root = tmp_path_factory.mktemp("rules")
    write_checkpoint(root / "checkpoint", small_config("untied", num_key_value_heads=2))
    export_checkpoint(root / "checkpoint", root / "exported")
    twins = [sessa_torch.decoding, sessa_mlx.decoding]
    return [
        *(twin.load_decoder(root / "checkpoint") for twin in twins),
        sessa_export.runtime.load_decoder(root / "exported"),
    ]


def test_every_runtime_writes_the_same_text_under_rules(decoders) -> None:
    prompts = ["The feedback", "of", "one row more"]
    rules = LogitRules(repetition_penalty=1.3, frequency_penalty=0.4, logit_bias={256: 4.0})
    sampling = SamplingConfig(temperature=0.8, seed=1)
    found = [
        generate_texts(decoder, BYTES, prompts, sampling, rules=rules, max_tokens=60)
        for decoder in decoders
    ]
    assert found[1:] == found[:-1]
    assert len({made.tokens for made in found[0]}) > 1, "no row left the batch before another"
    plain = generate_texts(decoders[0], BYTES, prompts, sampling, max_tokens=60)
    assert plain != found[0]


@pytest.fixture
def llguidance():
    return pytest.importorskip("llguidance")


@pytest.mark.parametrize("seed", range(3))
def test_a_schema_is_followed_in_every_runtime(decoders, llguidance, seed: int) -> None:
    sampling, rules = SamplingConfig(temperature=2.0, seed=seed), LogitRules(json_schema=SCHEMA)
    for decoder in decoders:
        for made in generate_texts(decoder, BYTES, ["a", "The row"], sampling, rules=rules):
            value = json.loads(made.text)
            assert made.finish == "stop" and value.keys() == {"name", "age"}
            assert value["name"] in ("Ada", "Zoë") and value["age"] <= 99


def test_a_schema_works_with_merged_tokens(llguidance) -> None:
    bpe = train_bpe(['{"name": "Ada", "age": 12}'] * 20, 280)
    config = small_config(vocab_size=300, eos_token_id=0)
    rules = PreparedRules(
        LogitRules(json_schema=json.dumps(SCHEMA)), ModelTokenizer.open(bpe, config)
    )
    state, ids = rules.start([[1]]), []
    # The likeliest token is always the longest one that is allowed.
    lengths = np.zeros((1, 300), np.float32)
    for token, index in bpe.get_vocab().items():
        lengths[0, index] = len(token)
    while not ids or ids[-1] != 0:
        ids.append(int(state.apply(lengths).argmax()))
        state.accept(np.array(ids[-1:]))
        assert len(ids) < 99
        if len(ids) > 20:
            lengths[0, 0] = 1e3
    assert json.loads(bpe.decode(ids)).keys() == {"name", "age"}
    assert len(ids) < len(bpe.decode(ids))


@pytest.mark.parametrize(
    "schema, tokenizer, message",
    [
        ('{"type": "objekt"}', BYTES, "cannot be used: .*objekt"),
        ("[1", BYTES, "is no JSON schema"),
        ("[1]", BYTES, "expected an object, found list"),
        ({"type": {1, 2}}, BYTES, "is no JSON schema"),
        (
            SCHEMA,
            ModelTokenizer.open(byte_tokenizer(), small_config(eos_token_id=None)),
            "needs a model with an end token",
        ),
        (
            SCHEMA,
            ModelTokenizer.open(word_tokenizer(["one", "two"]), small_config()),
            "tokens are bytes of text",
        ),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused(llguidance, schema, tokenizer, message) -> None:
    with pytest.raises(SessaError, match=message):
        PreparedRules(LogitRules(json_schema=schema), tokenizer)


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(SessaError, match=r"llguidance.*pip install 'sessa-toolchain\[json\]'"):
        PreparedRules(LogitRules(json_schema=SCHEMA), BYTES)
    pyproject = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'json = ["llguidance' in pyproject
