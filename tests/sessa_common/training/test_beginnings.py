"""Texts that are trained on begin as the tokenizer of the model begins them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.stories import STORIES, write_stories

from sessa_common.data.tokenization import TokenizeRequest, tokenize
from sessa_common.data.tokenizer import begin_token_ids, read_tokenizer, write_tokenizer
from sessa_common.errors import SessaError
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_common.training.preparation import TrainRequest, prepare

TEXTS = ["Once upon a time there was a cat.", "The dog ran home. It was very happy."]
FIELDS = {"sequence_length": 12, "batch_size": 1, "validation_fraction": 0.0}
BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Path:
    """The upcycled model, and beside it the texts."""
    root = tmp_path_factory.mktemp("story")
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (root / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return write_stories(root / "story", 0.0)


def documents(tokens: np.ndarray) -> list[list[int]]:
    """The documents of a sequence, in order, without the end tokens."""
    ends = np.flatnonzero(tokens == EOS)
    return sorted(part[:-1].tolist() for part in np.split(tokens, ends + 1)[:-1])


@pytest.mark.parametrize("options", [{}, {"finetune": True}, {"tokenizer": str(STORIES)}], ids=str)
def test_documents_stand_between_begin_and_end(story, tmp_path, options):
    fields = {**FIELDS, "data": str(story.parent / "texts.jsonl")}
    if "tokenizer" in options:
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        request = TrainRequest(out=tmp_path / "run", fields={**fields, **sizes, **options})
    else:
        request = TrainRequest(out=tmp_path / "run", init=story, fields=fields, **options)
    run = prepare(request)
    texts = ModelTokenizer.open(story, run.config)
    found = np.concatenate([span.tokens for span in run.source.training])
    assert documents(found) == sorted(texts.encode(text) for text in TEXTS)
    assert documents(found)[0][0] == run.config.bos_token_id == BOS
    # The tokenizer of the new folder begins texts so too.
    (tmp_path / "run").mkdir()
    if run.base is None:
        write_tokenizer(tmp_path / "run", run.tokenizer, EOS, 64, run.begin_ids)
        assert ModelTokenizer.open(tmp_path / "run", run.config).prefix_ids == [BOS]


def test_token_shards_begin_so_too(story, tmp_path):
    texts = str(story.parent / "texts.jsonl")
    shutil.copytree(story, tmp_path / "plain")
    settings = json.loads((story / "tokenizer_config.json").read_text())
    settings["add_bos_token"] = False
    (tmp_path / "plain" / "tokenizer_config.json").write_text(json.dumps(settings))
    for folder, begin in ((story, [BOS]), (tmp_path / "plain", [])):
        out = tmp_path / f"tokens {len(begin)}"
        shards = tokenize(TokenizeRequest(sources=(texts,), out=out, tokenizer=str(folder)))
        assert shards.begin_ids == begin
        assert [ids[:1] == [BOS] for ids in documents(shards[: len(shards)])] == [bool(begin)] * 2
    fields = {**FIELDS, "data": str(tmp_path / "tokens 1")}
    run = prepare(TrainRequest(out=tmp_path / "run", init=story, fields=fields))
    assert run.begin_ids == [BOS]
    fields["data"] = str(tmp_path / "tokens 0")
    with pytest.raises(SessaError, match="tokens are of another tokenizer"):
        prepare(TrainRequest(out=tmp_path / "run", init=story, fields=fields))


def test_add_bos_token_needs_a_token(tmp_path):
    tokenizer = read_tokenizer(STORIES)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    with pytest.raises(SessaError, match="add_bos_token is true, but the model has no bos token"):
        begin_token_ids(tokenizer, tmp_path)
    assert begin_token_ids(tokenizer, tmp_path, 7) == [7]
    assert begin_token_ids(tokenizer, STORIES) == [BOS]
