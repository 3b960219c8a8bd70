"""Decoding on a CUDA device: steps, prompts, graphs and draws; skipped where there is none."""

from __future__ import annotations

from contextlib import closing
from itertools import islice

import numpy as np
import pytest
import torch
from support.step_cases import error_of_steps, in_float64, lively_model

from sessa_common.inference.generation import draw_on_host, generate, left_pad
from sessa_common.inference.sampling import GumbelNoise, SamplingConfig
from sessa_torch.decoding import Decoder

if not torch.cuda.is_available():
    pytest.skip("PyTorch finds no CUDA device here", allow_module_level=True)

SAMPLED = SamplingConfig(temperature=0.9, top_k=15, top_p=0.95, min_p=0.01, seed=4)
# The modules themselves are 6e-2 from float64 in bfloat16, because these weights are large.
LIMITS = {"float32": 5e-5, "bfloat16": 8e-2}
KINDS = ["grouped", "sessa_transformer", "hybrid", "llama", "qwen3"]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("kind", ["grouped", "sessa_transformer", "llama", "qwen3"])
def test_steps_and_prompts_equal_a_prefill_in_float64(kind, dtype):
    model = lively_model(kind, dtype, width=192, device="cuda")
    for B, padded in ((1, False), (3, True), (16, False)):
        for past in (0, 1, 64, 255, 257, 1000):
            steps = [1, 1, 1, 2, 2, 7, 16, -20, 1] + ([] if padded else [17, 512, 1])
            if not (padded and past == 0):
                error = error_of_steps(model, B, past, steps, padded)
                assert error <= LIMITS[dtype], (B, past)


@pytest.mark.parametrize("kind", ["hybrid", "rms", "qwen2", "biased"])
def test_steps_of_further_kinds_equal_a_prefill_in_float64(kind):
    model = lively_model(kind, "float32", device="cuda")
    assert error_of_steps(model, 3, 40, [1] * 5 + [2] * 3, True) <= LIMITS["float32"]


@pytest.fixture(scope="module", params=KINDS)
def decoder(request) -> Decoder:
    return Decoder(lively_model(request.param, "float32", device="cuda"))


def prompts(B: int) -> list[list[int]]:
    return [np.random.default_rng(i).integers(0, 20, 30 + 9 * i).tolist() for i in range(B)]


@pytest.mark.parametrize("B", [1, 3])
def test_a_graph_gives_the_tokens_of_its_kernels(decoder, B):
    found = []
    for graphs in (False, True):
        decoder._runner.graphs = graphs
        for _ in range(2):
            found.append(list(generate(decoder, prompts(B), SAMPLED, max_tokens=300)))
    assert decoder._runner.captured and decoder._runner.graphs
    assert found == [found[0]] * 4


@pytest.mark.parametrize("sampling", [SAMPLED, SamplingConfig(temperature=0)], ids=["seed", "top"])
def test_the_device_draws_what_the_host_does(decoder, sampling):
    decoder.reset()
    logits = decoder.step(*left_pad(prompts(3)))
    want = list(draw_on_host(decoder, logits, sampling, 60))
    decoder.reset()
    decoder.feed(*left_pad(prompts(3)))
    np.testing.assert_array_equal(list(decoder.draw(sampling, 60)), want)


def test_a_closed_draw_leaves_every_id_but_the_last(decoder):
    tokens, mask = left_pad(prompts(2))
    decoder.reset()
    decoder.feed(tokens, mask)
    noise = GumbelNoise(0, range(2), 20)
    with closing(decoder.draw(SAMPLED, 30, noise)) as drawn:
        ids = list(islice(drawn, 9))
    assert decoder.length == tokens.shape[1] + 8
    np.testing.assert_array_equal(noise.peek(), GumbelNoise(0, range(2), 20).peek(9))
    got = decoder.step(ids[-1][:, None])
    whole = np.concatenate([tokens, np.stack(ids, 1)], 1)
    seen = np.concatenate([mask, np.ones((2, 9))], 1) != 0
    exact = in_float64(decoder.model)
    want = exact(torch.from_numpy(whole), attention_mask=torch.from_numpy(seen))[:, -1]
    assert np.abs(got - want.detach().numpy()).max() <= 1e-5 * want.abs().max()


def test_a_restored_cache_goes_on_bit_for_bit(decoder):
    decoder.reset()
    decoder.feed(*left_pad(prompts(2)))
    arrays = decoder.cache_arrays()
    first = list(decoder.draw(SAMPLED, 20))
    last = decoder.step(first[-1][:, None])
    decoder.restore_cache(arrays)
    for ids in first:
        again = decoder.step(ids[:, None])
    np.testing.assert_array_equal(again, last)


def test_damaged_weights_are_an_error(decoder):
    model = lively_model("gated", "float32", device="cuda")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    damaged = Decoder(model)
    damaged.feed(np.array([[1, 2, 3]]))
    with pytest.raises(Exception, match="weights are damaged"):
        next(damaged.draw(SAMPLED, 2))
