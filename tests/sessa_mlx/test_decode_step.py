"""Decoding in MLX: launches of a step, memory of a step and of long texts, weights that change."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from support.block_options import FAMILIES
from support.mlx_pool import VIEWS, Pool, primitives, replay

from sessa_common.config import SessaConfig
from sessa_common.inference.sampling import SamplingConfig
from sessa_mlx._step import TokenStep, held_arrays
from sessa_mlx.attention import apply_rope, rope_of, rope_tables
from sessa_mlx.cache import GrowingBuffer, SessaCache
from sessa_mlx.checkpoint import new_model
from sessa_mlx.decoding import CLEAR_EVERY, Decoder
from sessa_mlx.model import SessaForCausalLM

# mlx-lm's Llama has 17. On a Mac softmax and the mean of the states are two launches, not one.
LAUNCHES = {"cuda": 17, "metal": 18}


def small_config(**options) -> SessaConfig:
    given = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return SessaConfig(**{**given, **options})


def fed(model: SessaForCausalLM, length: int) -> SessaCache:
    """A cache of `length` positions."""
    cache = SessaCache(model.config)
    ids = mx.array(np.random.default_rng(0).integers(0, model.config.vocab_size, (1, length)))
    mx.eval(model(ids, cache=cache, logits_to_keep=1), held_arrays(cache))
    return cache


@contextmanager
def fused_on_a_gpu(gpu: str) -> Iterator[None]:
    """Let each fused operation be one primitive, as on a GPU; the CPU has them in parts."""

    def one(x, *others, **options):
        arrays = [x for x in (*others, *options.values()) if isinstance(x, mx.array)]
        return mx.depends([mx.sort(x, -1)], arrays)[0]

    with (
        mock.patch("sessa_mlx.attention.on_gpu", lambda: True),
        mock.patch("sessa_mlx._step_layers.on_gpu", lambda: True),
        mock.patch("sessa_mlx._step_layers.on_cuda", lambda: gpu == "cuda"),
        mock.patch.object(mx.fast, "layer_norm", one),
        mock.patch.object(mx.fast, "rope", one),
        mock.patch.object(mx.fast, "scaled_dot_product_attention", one),
    ):
        yield


def launches(layers: int, dtype: str, gpu: str, folder: Path) -> list[str]:
    """Kernels of the second step behind a prompt."""
    model = new_model(small_config(num_hidden_layers=layers, hidden_size=64), dtype=dtype)
    cache, step = fed(model, 3), TokenStep(model)
    step.refresh()
    mx.eval(step(mx.array([[1]]), cache), held_arrays(cache))
    step = TokenStep(model)
    with fused_on_a_gpu(gpu):
        step.refresh()
        logits = step(mx.array([[1]]), cache)
        mx.export_to_dot(str(folder / "step.dot"), logits, *held_arrays(cache))
    names = re.findall(r'label ="([^"]+)"', (folder / "step.dot").read_text())
    return [name for name in names if name not in VIEWS]


@pytest.mark.parametrize("gpu", LAUNCHES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_takes_few_launches(dtype, gpu, tmp_path):
    found = [launches(layers, dtype, gpu, tmp_path) for layers in (2, 3, 4)]
    two, three, four = map(len, found)
    assert four - three == three - two == LAUNCHES[gpu]
    # On CUDA either would be a call of cuBLAS.
    assert "AddMM" not in found[0] and ("Softmax" in found[0]) == (gpu == "metal")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_copies_no_buffer(dtype):
    model = new_model(small_config(hidden_size=64, max_position_embeddings=4096), dtype=dtype)
    decoder = Decoder(model)
    decoder.feed(np.random.default_rng(0).integers(0, 60, (1, 1100)))
    smallest = min(
        held.buffer.nbytes
        for layer in decoder.cache.layers
        for held in vars(layer).values()
        if held.buffer is not None
    )
    with closing(decoder.draw(SamplingConfig(temperature=0), 40)) as drawn:
        list(islice(drawn, 10))
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        list(islice(drawn, 20))
        assert mx.get_peak_memory() - before < smallest


@pytest.mark.parametrize("tokens", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_is_flat_over_long_texts(tokens):
    config = small_config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=10_100
    )
    decoder = Decoder(new_model(config))
    decoder.feed(np.array([[1, 2, 3]]))
    besides, pooled = [], 0
    for turn, _ in enumerate(decoder.draw(SamplingConfig(temperature=0), tokens + 1)):
        if turn % 500 == 250:
            held = sum(array.nbytes for array in held_arrays(decoder.cache))
            besides.append(mx.get_active_memory() - held)
            pooled = max(pooled, mx.get_cache_memory())
    assert decoder.length == tokens + 3
    # Some vectors as long as the text, such as scores and weights; a token that left its graph
    # behind would add more than a kilobyte.
    assert max(besides) - besides[0] < 64 * tokens + 2**16, besides
    # A CPU has no use for the vectors of the tokens since the pool was cleared.
    assert pooled < 16 * tokens * CLEAR_EVERY


def rooms(tokens: int) -> list[int]:
    """The rows for which a buffer has room while it grows by single rows to `tokens`."""
    buffer, found = GrowingBuffer(1), []
    for _ in range(tokens):
        buffer.append(mx.zeros((1, 1, 1)))
        found.append(buffer.buffer.shape[1])
    mx.eval(buffer.buffer)
    return found


def step_graph(step: TokenStep, past: int, room: int) -> list[dict]:
    """The primitives of a step behind `past` cached tokens; nothing is computed."""
    config = step.model.config
    heads = (2, 1, config.num_key_value_heads, room, config.head_dim)
    kv = mx.zeros(heads, dtype=mx.bfloat16)
    k_fb, s, newest = (mx.zeros((1, n, config.hidden_size)) for n in (room, room, 1))
    arrays = [kv, k_fb, s, newest] * config.num_hidden_layers

    def run(ids, *arrays):
        cache, given = SessaCache(config), iter(arrays)
        cache.length = past
        for layer in cache.layers:
            for held in vars(layer).values():
                held.buffer, held.length = next(given), past
            layer.s.pending = next(given)
        return [step(ids, cache), *held_arrays(cache)]

    return primitives(run, mx.array([[1]]), *arrays)


def largest_pool(tokens: int, *, clears: bool, grown: list[int]) -> float:
    """The largest ratio of pooled to live bytes while tokens are decoded, by MLX's rule."""
    config = small_config(hidden_size=512, num_attention_heads=8)
    step, pool, worst = TokenStep(new_model(config, dtype="bfloat16")), Pool(), 0.0
    step.refresh()
    pool.live = sum(array.nbytes for _, array in tree_flatten(step.model.parameters()))
    held: list[int] = []
    for turn, room in enumerate(grown[:tokens]):
        if turn == 0 or room != grown[turn - 1]:
            sizes = [2048 * room] * 6  # three buffers of two layers, each with as many bytes a row
            old, held = held, [pool.allocate(size) for size in sizes]
            for size in old:
                pool.free(size)
            if clears:
                pool.clear()
        if clears and turn % 256 == 0:
            pool.clear()
        if turn % 128 == 1:
            replay(step_graph(step, turn, room + 65), pool)
        worst = max(worst, pool.pooled / pool.live)
    return worst


def test_the_pool_stays_small_over_eight_thousand_tokens():
    grown = rooms(8192)
    assert largest_pool(8192, clears=True, grown=grown) <= 2
    # The simulation sees buffers that grow by chunks and are never given back.
    by_chunks = [-(-(turn + 1) // 256) * 256 for turn in range(8192)]
    assert largest_pool(8192, clears=False, grown=by_chunks) > 4
    assert len(set(grown)) < 12


def test_projections_are_joined_without_a_second_copy():
    model = new_model(small_config(hidden_size=256))
    mx.synchronize()
    before = mx.get_active_memory()
    TokenStep(model).refresh()
    # A second copy would have 2.6 MB.
    assert mx.get_active_memory() - before < 10**6


def test_new_weights_are_used():
    model = new_model(small_config())
    decoder = Decoder(model)
    decoder.step(np.array([[1, 2, 3]]))
    old = decoder.step(np.array([[4]]))
    model.update(new_model(small_config(), seed=1).parameters())
    decoder.trim(1)
    fresh = Decoder(model)
    fresh.restore_cache(decoder.cache_arrays())
    new = decoder.step(np.array([[4]]))
    assert np.abs(new - old).max() > 1e-2
    np.testing.assert_allclose(new, fresh.step(np.array([[4]])), atol=1e-6)


@pytest.mark.parametrize("first", [0, 500, 8000])
def test_rotary_positions_are_as_exact_as_their_tables(first):
    config = small_config(hidden_size=256)
    x = np.random.default_rng(0).standard_normal((2, 4, 3, 64)).astype(np.float32)
    rows = mx.zeros((2, 3, 256))
    positions = first + np.arange(3)
    angles = positions[:, None] * config.rope_theta ** (-np.arange(0, 64, 2) / 64)
    even, odd = x[..., ::2].astype(np.float64), x[..., 1::2].astype(np.float64)
    cos, sin = np.cos(angles), np.sin(angles)
    want = np.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)
    tables = rope_tables(mx.array(positions)[None], 64, config.rope_theta, mx.float32)
    with mock.patch("sessa_mlx.attention.on_gpu", lambda: True):
        rope = rope_of(config, rows, first)
    assert not isinstance(rope, tuple)
    errors = [
        np.abs(np.array(apply_rope(mx.array(x), rope)) - want).max() for rope in (rope, tables)
    ]
    # Half a unit in the last place of the largest angle, on both sides of a sum.
    assert errors[0] <= max(1.5 * errors[1], 1e-6) and errors[1] <= 1e-6 + first * 1.2e-7


@pytest.mark.parametrize("bits", [0, 4])
def test_quantised_and_plain_layers_take_the_same_launches(bits, tmp_path):
    """A quantised product takes the place of a plain one; no bias has a launch of its own."""
    model = new_model(small_config(hidden_size=64))
    if bits:
        nn.quantize(model, 32, bits, class_predicate=lambda path, _: path.endswith("W_in"))
    cache, step = fed(model, 3), TokenStep(model)
    wanted = np.array(model(mx.array([[1]]), cache=fed(model, 3))[:, 0])
    step.refresh()
    np.testing.assert_allclose(step(mx.array([[1]]), cache), wanted, atol=1e-5)
    names = Counter(record["name"] for record in step_graph(step, 5, 256))
    assert names["QuantizedMatmul"] == (2 if bits else 0) and not names["AddMM"]


STEPS = {name: {"layer_kinds": name} for name in ("sessa", "transformer", "mamba2")} | FAMILIES


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_step_equals_the_call_of_the_model(kind, padded):
    """Also as on CUDA, and when the buffers grow."""
    given = {"num_key_value_heads": 2, "hidden_size": 128, **STEPS[kind]}
    config = small_config(**given)
    model, cache, plain = new_model(config), SessaCache(config), SessaCache(config)
    ids = mx.array(np.random.default_rng(3).integers(0, 60, (1 + padded, 270)))
    mask = mx.array(np.arange(190) >= np.array([[0], [7]])) if padded else None
    for each in (cache, plain):
        mx.eval(model(ids[:, :190], cache=each, attention_mask=mask), held_arrays(each))
    step = TokenStep(model)
    with (
        mock.patch("sessa_mlx.attention.on_gpu", lambda: True),
        mock.patch("sessa_mlx._step_layers.on_cuda", lambda: True),
    ):
        step.refresh()
        found = [step(ids[:, t : t + 1], cache) for t in range(190, 210)]
    wanted = [model(ids[:, t : t + 1], cache=plain)[:, 0] for t in range(190, 210)]
    np.testing.assert_allclose(np.stack(found), np.stack(wanted), atol=2e-5)
    for name, rows in plain.tensors().items():
        np.testing.assert_allclose(cache.tensors()[name], rows, atol=2e-5)


def test_steps_and_calls_of_the_model_alternate():
    """Buffers that a call has filled are grown by the step, in layers of every kind."""
    config = small_config(layer_kinds=("transformer", "sessa"))
    model, cache, plain = new_model(config), SessaCache(config), SessaCache(config)
    ids = mx.array(np.random.default_rng(3).integers(0, 60, (1, 270)))
    step = TokenStep(model)
    step.refresh()
    # The first call leaves a state without a buffer, and the last one fills its own.
    for start, stop in ((0, 1), (2, 190), (191, 256), (256, 257), (258, 259)):
        for each in (cache, plain):
            mx.eval(model(ids[:, start:stop], cache=each), held_arrays(each))
        if stop not in (256, 259):
            found = step(ids[:, stop : stop + 1], cache)
            wanted = model(ids[:, stop : stop + 1], cache=plain)[:, 0]
            np.testing.assert_allclose(found, wanted, atol=2e-5)
    np.testing.assert_allclose(
        cache.tensors()["layers.1.s"], plain.tensors()["layers.1.s"], atol=2e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_operations_equal_their_parts(dtype):
    model = new_model(small_config(hidden_size=64, num_hidden_layers=1), dtype=dtype)
    found = []
    for on_gpu in (False, True):
        cache, step = fed(model, 5), TokenStep(model)
        with mock.patch("sessa_mlx._step_layers.on_gpu", lambda on_gpu=on_gpu: on_gpu):
            step.refresh()
            found.append(np.array(step(mx.array([[1]]), cache)))
    np.testing.assert_allclose(*found, atol=1e-5 if dtype == "float32" else 2e-2)
