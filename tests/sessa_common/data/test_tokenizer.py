"""Tokenizers: made, read, written, refused."""

import _thread
import json
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from sessa_common.config import SessaConfig
from sessa_common.data import tokenizer as tok
from sessa_common.data.encoding import (
    ENCODE_CHUNK,
    DroppedText,
    encode_documents,
    encode_text,
    encode_texts,
)
from sessa_common.errors import SessaError

LETTERS = "abcdefghijklmnop"
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
    many = [str(i) for i in range(ENCODE_CHUNK * 2 + 3)]
    encoded = list(encode_texts(tokenizer, iter(many)))
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


@pytest.mark.parametrize("named", [5, ["a"], {"content": 1.5}])
def test_an_end_token_that_is_no_text_is_named(named, tmp_path):
    tok.byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
    with pytest.raises(SessaError, match=r"tokenizer_config\.json: eos_token is"):
        tok.end_token_id(tmp_path)


def test_no_end_token_is_an_error(tmp_path):
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(SessaError, match="no token ends a document"):
        tok.choose_tokenizer(str(tmp_path / "tokenizer.json"), [])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("12", "tokenizer size is 12, expected from 257"),
        ("-300", "tokenizer size is -300"),
        ("100000000", "tokenizer size is 100000000, .* to 1048576"),
        ("missing.json", "missing.json: no such file"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(SessaError, match=message):
        tok.choose_tokenizer(spec, TEXTS)


@pytest.mark.parametrize("parse", [False, True])
def test_the_name_of_a_special_token_is_text_unless_asked(parse, tmp_path):
    made = tok.byte_tokenizer(), tok.train_bpe(TEXTS, 260)
    made[0].save(str(tmp_path / "tokenizer.json"))
    for tokenizer in (*made, tok.read_tokenizer(tmp_path)):
        end = tokenizer.token_to_id(tok.END_OF_TEXT)
        tok.parse_special_tokens(tokenizer, parse)
        text = f"a{tok.END_OF_TEXT}b"
        [[ids, size]] = encode_documents(tokenizer, [text])
        assert (end in ids) == parse
        assert size == len(text)
        assert encode_text(tokenizer, text) == ids.tolist()
        if not parse:
            assert tokenizer.decode(ids.tolist()) == text


def test_special_tokens_are_plain_text_by_default():
    for tokenizer in (tok.byte_tokenizer(), tok.train_bpe(TEXTS, 260)):
        ids = encode_text(tokenizer, tok.END_OF_TEXT)
        assert tokenizer.token_to_id(tok.END_OF_TEXT) not in ids


def lossy(kind):
    """A tokenizer without byte fallback that knows a, b and the word "ab" at most."""
    words = {"[UNK]": 0, "a": 1, "b": 2, "ab": 3, "##b": 4, "c": 5}
    if kind == "BPE":
        made = Tokenizer(models.BPE(vocab=words, merges=[("a", "b")]))
    elif kind == "BPE with unknown":
        made = Tokenizer(models.BPE(vocab=words, merges=[("a", "b")], unk_token="[UNK]"))
    elif kind == "words":
        made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    elif kind == "word pieces":
        made = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    else:
        made = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.0)], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("BPE", [4, 1]),
        ("BPE with unknown", [4, 1]),
        ("words", [2, 1]),
        ("word pieces", [2, 1]),
        ("unigram", [4, 1]),
    ],
)
def test_text_that_no_token_stands_for_is_not_counted(kind, kept):
    # The spaces are lost too: these pre-tokenizers drop them.
    texts = ["ab aЖb", "Ж ы", "a"]
    dropped = DroppedText()
    assert [size for _, size in encode_documents(lossy(kind), texts, dropped)] == kept
    assert dropped.bytes == sum(len(text.encode()) for text in texts) - sum(kept)
    assert dropped.documents == 1
    assert len(dropped.notes()) == 2


def test_a_byte_level_tokenizer_drops_nothing():
    dropped = DroppedText()
    for tokenizer in (tok.byte_tokenizer(), tok.train_bpe(TEXTS, 300)):
        sizes = [size for _, size in encode_documents(tokenizer, TEXTS, dropped)]
        assert sizes == [len(text.encode()) for text in TEXTS]
    assert dropped.notes() == []


def test_ordinary_text_is_not_cut():
    texts = [*TEXTS, "x" * tok.LONGEST_WORD, "，".join(["東京"] * 5000), "a1" * 5000, " \n" * 900]
    for text in texts:
        assert list(tok.cut_long_words(text)) == [text]


@given(st.lists(st.tuples(st.sampled_from(["a", "1", "-", " ", "ab ", "\n"]), st.integers(1, 300))))
def test_long_words_are_cut_and_nothing_is_lost(runs):
    limit, tok.LONGEST_WORD = tok.LONGEST_WORD, 64
    try:
        text = "".join(unit * count for unit, count in runs)
        pieces = list(tok.cut_long_words(text))
    finally:
        tok.LONGEST_WORD = limit
    assert "".join(pieces) == text
    splitter = tok.byte_tokenizer().pre_tokenizer
    for piece in pieces:
        # A space before a word and the white space before it may be counted with it.
        assert all(last - first <= 66 for _, (first, last) in splitter.pre_tokenize_str(piece))


def test_very_many_letters_without_a_space_train_soon():
    text = "".join(random.Random(0).choices(LETTERS, k=400_000))
    started = time.monotonic()
    tokenizer = tok.train_bpe([text], 280)
    assert time.monotonic() - started < 20
    assert tok.vocabulary_size(tokenizer) == 280


def test_an_interrupt_is_heard_while_a_tokenizer_trains():
    def slowly():
        _thread.interrupt_main()
        while True:
            yield "a text"
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        tok.train_bpe(slowly(), 300)


def test_an_error_of_the_texts_reaches_the_caller():
    def texts():
        yield "a text"
        raise SessaError("unreadable")

    with pytest.raises(SessaError, match="unreadable"):
        tok.train_bpe(texts(), 300)


def damaged(change):
    content = json.loads(tok.byte_tokenizer().to_str())
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: (c["model"].update(vocab={}), c.update(added_tokens=[])), "has no token"),
        (lambda c: c["model"]["vocab"].update(zz=2**26), "258 tokens, but ids up to 67,108,864"),
        (lambda c: c.update(pre_tokenizer={"type": "FixedLength", "length": 0}), "fails on a"),
        (lambda c: c.update(pre_tokenizer={"type": "None"}), "not a readable tokenizer.json"),
    ],
    ids=["no token", "unused ids", "panic", "unknown part"],
)
def test_a_tokenizer_that_cannot_work_is_refused_in_one_line(change, message, tmp_path, capfd):
    (tmp_path / "tokenizer.json").write_text(damaged(change))
    with pytest.raises(SessaError, match=rf"tokenizer\.json: .*{message}"):
        tok.read_tokenizer(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_a_pattern_that_fails_on_a_later_text_is_refused_in_one_line(tmp_path, capfd):
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    pattern = {**split, "pattern": {"Regex": "(a+)+$"}}
    (tmp_path / "tokenizer.json").write_text(damaged(lambda c: c.update(pre_tokenizer=pattern)))
    tokenizer = tok.read_tokenizer(tmp_path)
    with pytest.raises(SessaError, match=r"the tokenizer fails on the text \(Onig"):
        encode_text(tokenizer, "a" * 40 + "b")
    assert capfd.readouterr() == ("", "")


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
