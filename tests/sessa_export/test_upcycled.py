"""Upcycled models in ONNX Runtime and its clients: the published story, then with a gain."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.stories import greedy_ids, write_stories

from sessa_common.data.tokenizer import read_tokenizer
from sessa_common.errors import SessaError
from sessa_common.inference.generation import generate
from sessa_common.inference.sampling import SamplingConfig
from sessa_export.exporter import export
from sessa_export.runtime import load_decoder

COUNT = 24
TEXT_CLIENTS = ("genai", "web", "transformers-js")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """The story model without feedback, with a gain of 0, and with a gain that changes it."""
    root = tmp_path_factory.mktemp("stories")
    gains = {"plain": None, "zero": 0.0, "gain": 0.2}
    return {name: write_stories(root / name, gain) for name, gain in gains.items()}


def told(decoder, prompt: list[int], count: int = COUNT) -> list[int]:
    """The prompt and its likeliest continuation."""
    steps = generate(decoder, [prompt], SamplingConfig(temperature=0), max_tokens=count)
    return prompt + np.array(list(steps))[:, 0].tolist()


@pytest.mark.parametrize(("name", "layout"), [("plain", "natural"), ("zero", "buffer")])
def test_the_published_story_is_told_word_for_word(checkpoints, tmp_path, name, layout) -> None:
    export(checkpoints[name], tmp_path / "out", layout=layout)
    assert told(load_decoder(tmp_path / "out"), [1]) == greedy_ids(COUNT + 1)


def test_feedback_with_a_gain_is_the_same_everywhere(checkpoints, tmp_path) -> None:
    torch_decoding = pytest.importorskip("sessa_torch.decoding")
    export(checkpoints["gain"], tmp_path / "out", layout="uniform", clients=TEXT_CLIENTS)
    prompts = [greedy_ids(n) for n in (40, 7, 1)]
    ours, theirs = load_decoder(tmp_path / "out"), torch_decoding.load_decoder(checkpoints["gain"])
    wanted = [told(theirs, prompt) for prompt in prompts]
    assert wanted[2] != greedy_ids(COUNT + 1)
    sampling = SamplingConfig(temperature=0)
    found = np.array(list(generate(ours, prompts, sampling, max_tokens=COUNT))).T.tolist()
    assert [a + b for a, b in zip(prompts, found, strict=True)] == wanted
    genai = pytest.importorskip("onnxruntime_genai")
    parameters = genai.GeneratorParams(model := genai.Model(str(tmp_path / "out")))
    parameters.set_search_options(max_length=len(wanted[2]), do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens([prompts[2]])
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0).tolist() == wanted[2]
    page = json.loads((tmp_path / "out" / "web.json").read_text())
    assert page["prefix"] == [1] and page["stop"] == [1, 2]
    # transformers.js reads tokenizer.json alone.
    own, whole = (read_tokenizer(folder) for folder in (checkpoints["gain"], tmp_path / "out"))
    assert whole.encode("Once").ids == [1, *own.encode("Once").ids]


def test_genai_is_refused_caches_that_it_cannot_hold(checkpoints, tmp_path) -> None:
    with pytest.raises(SessaError, match="needs keys and values of one width"):
        export(checkpoints["zero"], tmp_path / "out", clients=TEXT_CLIENTS)
    assert not (tmp_path / "out").exists()


def test_four_bits_keep_the_story_likely(checkpoints, tmp_path) -> None:
    (tmp_path / "story.txt").write_text("Once upon a time, there was a little girl. " * 20)
    data = (str(tmp_path / "story.txt"),)
    report = export(checkpoints["gain"], tmp_path / "out", dtype="int4", data=data)
    assert report.cost is not None and report.cost.growth < 1.2
