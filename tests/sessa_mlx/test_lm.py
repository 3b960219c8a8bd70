"""mlx-lm runs a Sessa model: its loop, its caches and its batches give the tokens of `sessa`."""

from __future__ import annotations

import copy

import mlx.core as mx
import numpy as np
import pytest
from support.export_models import lively_weights, small_config

from sessa_common.inference.sampling import SamplingConfig

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")

from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models.cache import (
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from sessa_mlx.checkpoint import set_weights
from sessa_mlx.decoding import Decoder
from sessa_mlx.lm import Model, ModelArgs
from sessa_mlx.model import SessaForCausalLM

KINDS = {
    "sessa": "sessa",
    "narrow feedback without RoPE": "sessa",
    "gated": "gated_attention",
    "standard": ("transformer", "sessa_transformer"),
    "hybrid": ("mamba2", "sessa"),
    "mamba2": "mamba2",
}
# The kinds of caches that mlx-lm treats differently.
TRIMMABLE = ["standard"]
CACHES = [*TRIMMABLE, "hybrid"]
PROMPT = np.random.default_rng(0).integers(0, 256, 37)
COUNT = 24


def make_model(kind: str, seed: int = 2) -> Model:
    narrow = {"use_forward_rope": False, "feedback_key_dim": 4}
    more = narrow if kind.startswith("narrow") else {}
    config = small_config("untied", layer_kinds=KINDS[kind], mamba_d_head=16, **more)
    model = Model(ModelArgs.from_dict(config.to_dict()))
    set_weights(model, lively_weights(config, seed))
    return model.eval()


@pytest.fixture(scope="module", params=CACHES)
def model(request) -> Model:
    return make_model(request.param)


def own_tokens(model: Model, prompt: np.ndarray, count: int = COUNT) -> list[int]:
    own = SessaForCausalLM(model.config)
    own.update(model.parameters())
    decoder = Decoder(own)
    decoder.feed(prompt[None])
    return [int(ids[0]) for ids in decoder.draw(SamplingConfig(temperature=0), count)]


def tokens_of(steps) -> list[int]:
    return [int(step[0]) for step in steps]


@pytest.mark.parametrize("kind", KINDS)
def test_its_loop_gives_the_same_tokens(kind):
    model = make_model(kind)
    steps = generate_step(mx.array(PROMPT), model, max_tokens=COUNT, prefill_step_size=5)
    assert tokens_of(steps) == own_tokens(model, PROMPT)


@pytest.mark.parametrize("kind", TRIMMABLE)
def test_a_trimmed_cache_goes_on_as_if_the_rest_had_never_been(kind):
    model = make_model(kind)
    cache = make_prompt_cache(model)
    tokens_of(generate_step(mx.array(PROMPT), model, max_tokens=9, prompt_cache=cache))
    assert can_trim_prompt_cache(cache)
    dropped = cache[0].size() - 20
    assert trim_prompt_cache(cache, dropped) == dropped
    steps = generate_step(mx.array(PROMPT[20:]), model, max_tokens=COUNT, prompt_cache=cache)
    assert tokens_of(steps) == own_tokens(model, PROMPT)


def test_a_state_cannot_be_trimmed():
    cache = make_prompt_cache(make_model("hybrid"))
    assert not can_trim_prompt_cache(cache)
    assert trim_prompt_cache(cache, 3) == 0


def test_a_saved_cache_goes_on(model, tmp_path):
    cache = make_prompt_cache(model)
    model(mx.array(PROMPT[None, :30]), cache=cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    cache = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    steps = generate_step(mx.array(PROMPT[30:]), model, max_tokens=COUNT, prompt_cache=cache)
    assert tokens_of(steps) == own_tokens(model, PROMPT)


@pytest.mark.parametrize("chunk", [2048, 7])
def test_prompts_of_several_lengths_in_one_batch(model, chunk):
    """Prompts join while others are decoded, and rows that end early leave."""
    prompts = [PROMPT, PROMPT[:5], PROMPT[3:24], PROMPT[:1]]
    counts = [COUNT, 6, COUNT, 11]
    found = run_batch(model, prompts, counts, prefill_step_size=chunk, completion_batch_size=3)
    alone = [own_tokens(model, p, n) for p, n in zip(prompts, counts, strict=True)]
    assert found == alone


def test_rows_with_different_cached_pasts(model):
    pasts, prompts = (20, 0, 11), [PROMPT, PROMPT[5:30], PROMPT[:25]]
    caches = []
    for past, prompt in zip(pasts, prompts, strict=True):
        caches.append(make_prompt_cache(model))
        if past:
            model(mx.array(prompt[None, :past]), cache=caches[-1])
    rest = [prompt[past:] for past, prompt in zip(pasts, prompts, strict=True)]
    kept = copy.deepcopy(caches)
    found = run_batch(model, rest, [COUNT] * 3, caches=caches)
    assert found == [own_tokens(model, prompt) for prompt in prompts]
    assert found == run_batch(model, rest, [COUNT] * 3, caches=kept, prefill_step_size=6)


def run_batch(model, prompts, counts, caches=None, **options) -> list[list[int]]:
    generator = BatchGenerator(model, **options)
    uids = generator.insert([p.tolist() for p in prompts], counts, caches=caches)
    found: dict[int, list[int]] = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            found[response.uid].append(response.token)
    return [found[uid] for uid in uids]


@pytest.mark.parametrize("kind", TRIMMABLE)
def test_a_draft_model_does_not_change_the_tokens(kind):
    model, draft = make_model(kind), make_model(kind, seed=1)
    steps = speculative_generate_step(mx.array(PROMPT), model, draft, max_tokens=COUNT)
    assert tokens_of(steps) == own_tokens(model, PROMPT)


def test_a_draft_needs_a_model_that_can_be_trimmed():
    model = make_model("mamba2")
    with pytest.raises(ValueError, match="trimmable"):
        tokens_of(speculative_generate_step(mx.array(PROMPT), model, model, max_tokens=3))
