"""An exported model in ONNX Runtime, with and without the native operator, against PyTorch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support.export_clients import PROMPTS, export_clients, greedy_tokens, need

from sessa_common.inference.generation import generate, left_pad
from sessa_common.inference.sampling import SamplingConfig
from sessa_export import native
from sessa_export.runtime import Decoder, load_decoder
from sessa_torch.decoding import load_decoder as load_torch


@pytest.fixture(scope="module", params=["natural", "uniform", "buffer"])
def folders(request, tmp_path_factory) -> tuple[Path, Path]:
    return export_clients(tmp_path_factory.mktemp("ort"), clients=(), layout=request.param)


@pytest.fixture(scope="module", params=["standard", "native"])
def decoder(request, folders) -> Decoder:
    if request.param == "standard":
        return load_decoder(folders[1], threads=1)
    compiler = None
    try:
        compiler = native.find_compiler()
    except ValueError as error:
        need(compiler, "a C++ compiler", str(error))
    native.build()
    return load_decoder(folders[1], threads=1, native=True)


def random_tokens(B: int, T: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (B, T))


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())
    assert (got.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize("T", [1, 17, 130])
def test_prefill(folders, decoder, T: int) -> None:
    tokens = random_tokens(2, T)
    decoder.reset()
    assert_same(decoder.logits(tokens), load_torch(folders[0]).logits(tokens))


def test_chunks_and_decode(folders, decoder) -> None:
    tokens = random_tokens(2, 150)
    decoder.reset()
    cuts = [0, 70, 71, 140, *range(141, 151)]
    got = np.concatenate([decoder.logits(tokens[:, a:b]) for a, b in pairwise(cuts)], axis=1)
    assert_same(got, load_torch(folders[0]).logits(tokens))


def test_uneven_prompts(folders, decoder) -> None:
    tokens, mask = left_pad(PROMPTS)
    torch = load_torch(folders[0])
    decoder.reset()
    assert_same(decoder.step(tokens, mask), torch.step(tokens, mask))
    for column in random_tokens(6, len(PROMPTS), seed=1):
        assert_same(decoder.step(column[:, None]), torch.step(column[:, None]))


def test_greedy_tokens(folders, decoder) -> None:
    expected = greedy_tokens(folders[0], PROMPTS)
    steps = generate(decoder, PROMPTS, SamplingConfig(temperature=0), max_tokens=len(expected[0]))
    assert np.array(list(steps)).T.tolist() == expected


def test_four_threads_on_one_session(decoder) -> None:
    prompts = [random_tokens(1, T, seed=T) for T in (90, 64, 21, 8)]

    def run(tokens: np.ndarray) -> np.ndarray:
        mine = Decoder(decoder.session, decoder.config)
        first = mine.logits(tokens[:, :5])
        rest = [mine.step(tokens[:, i : i + 1])[:, None] for i in range(5, tokens.shape[1])]
        return np.concatenate([first, *rest], axis=1)

    alone = [run(tokens) for tokens in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, prompts * 3))
    for one, other in zip(alone * 3, together, strict=True):
        np.testing.assert_array_equal(one, other)
