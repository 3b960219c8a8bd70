"""Tokenizers: made, read, written, refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessa_common.config import SessaConfig
from sessa_common.data import tokenizer as tok
from sessa_common.errors import SessaError

TEXTS = ["the cat sat on the mat\n" * 20, "naïve café, 東京, 😀 and\ttabs"]


@given(st.text())
def test_byte_tokens_are_the_bytes_of_the_text(text):
    tokenizer = tok.byte_tokenizer()
    text = text.replace(tok.END_OF_TEXT, "")
    ids = tokenizer.encode(text).ids
    assert bytes(ids) == text.encode("utf-8")
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("spec", ["bytes", "300"])
def test_written_tokenizer_reads_back_the_same(spec, tmp_path):
    tokenizer, end = tok.choose_tokenizer(spec, TEXTS)
    tok.write_tokenizer(tmp_path, tokenizer, end, 64)
    again = tok.read_tokenizer(tmp_path)
    for text in TEXTS:
        assert again.encode(text).ids == tokenizer.encode(text).ids
        assert again.decode(again.encode(text).ids) == text
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["eos_token"] == tok.END_OF_TEXT
    ids = json.loads((tmp_path / "generation_config.json").read_text())
    assert ids["eos_token_id"] == end == tok.end_token_id(tmp_path)


def test_bpe_has_the_asked_size_and_knows_every_byte():
    tokenizer, end = tok.choose_tokenizer("280", TEXTS)
    assert tok.vocabulary_size(tokenizer) == 280
    assert end == 0
    everything = "".join(map(chr, range(1, 0x250)))
    assert tokenizer.decode(tokenizer.encode(everything).ids) == everything


def test_encode_texts_adds_no_special_token_and_keeps_order():
    tokenizer, _ = tok.choose_tokenizer("bytes", [])
    many = [str(i) for i in range(tok.ENCODE_CHUNK * 2 + 3)]
    encoded = list(tok.encode_texts(tokenizer, iter(many)))
    assert [bytes(ids.tolist()).decode() for ids in encoded] == many


def test_truncation_and_padding_of_a_foreign_tokenizer_are_switched_off(tmp_path):
    tokenizer = tok.byte_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(tok.read_tokenizer(tmp_path).encode("four").ids) == 4


@pytest.mark.parametrize("named", ["<stop>", {"content": "<stop>"}], ids=["text", "object"])
def test_end_token_comes_from_the_file_beside_it(named, tmp_path):
    tokenizer = tok.byte_tokenizer()
    tokenizer.add_special_tokens(["<stop>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tok.end_token_id(tmp_path) == 256
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
    assert tok.end_token_id(tmp_path / "tokenizer.json") == 257


def test_no_end_token_is_an_error(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(SessaError, match="no token ends a document"):
        tok.choose_tokenizer(str(tmp_path / "tokenizer.json"), [])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("12", "tokenizer size is 12, expected 257"),
        ("-300", "tokenizer size is -300"),
        ("missing.json", "missing.json: no such tokenizer file"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(SessaError, match=message):
        tok.choose_tokenizer(spec, TEXTS)


def test_damaged_file_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"version": "1.0"')
    with pytest.raises(SessaError, match=r"tokenizer\.json: not a readable"):
        tok.read_tokenizer(path)


def test_check_fits_counts_the_largest_id():
    tokenizer = tok.byte_tokenizer()
    tok.check_fits(tokenizer, SessaConfig(vocab_size=257), "here")
    with pytest.raises(SessaError, match=r"here: .* 257 tokens, .* 256 rows"):
        tok.check_fits(tokenizer, SessaConfig(vocab_size=256), "here")
