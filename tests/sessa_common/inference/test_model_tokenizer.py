"""Tokens that a tokenizer puts before every text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from sessa_common.checkpoint.sources import read_source
from sessa_common.inference.model_tokenizer import ModelTokenizer

STORIES = Path(__file__).parents[2] / "fixtures" / "stories260K"


@pytest.fixture(scope="module")
def config():
    return read_source(STORIES).config


def changed(folder: Path, *, adds: bool | None, template: str | None = None) -> Path:
    """A copy of the tokenizer whose settings say `adds` and that has a post-processor."""
    shutil.copytree(STORIES, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.npz"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["add_bos_token"] = adds
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if template:
        ends = [("<s>", 1), ("</s>", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_prompt_begins_as_the_story_of_a_published_model(config):
    with np.load(STORIES / "truth.npz") as truth:
        greedy = truth["greedy"].tolist()
    tokenizer = ModelTokenizer.open(STORIES, config)
    ids = tokenizer.encode("Once upon a time")
    assert len(ids) > 3 and ids == greedy[: len(ids)]
    assert tokenizer.encode("") == [1] and tokenizer.start_id == 1


@pytest.mark.parametrize(
    ("adds", "template", "prefix"),
    [
        (None, "<s> $A </s>", [1]),
        (None, None, []),
        (False, "<s> $A", []),
        (True, None, [1]),
    ],
)
def test_settings_go_before_the_post_processor(tmp_path, config, adds, template, prefix):
    tokenizer = ModelTokenizer.open(changed(tmp_path / "x", adds=adds, template=template), config)
    assert tokenizer.prefix_ids == prefix
    assert tokenizer.encode("a")[: len(prefix)] == prefix
    assert tokenizer.start_id == (1 if prefix else 2)
