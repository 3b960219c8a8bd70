"""The contract of a decoder, which every runtime keeps: draws, trimming, rows, copies of caches."""

from __future__ import annotations

from contextlib import closing
from itertools import islice, permutations
from pathlib import Path

import numpy as np
import pytest
from support.export_models import small_config, write_checkpoint

import sessa_export.runtime
import sessa_mlx.decoding
import sessa_torch.decoding
from sessa_common.errors import SessaError
from sessa_common.inference.cache_contents import cache_shapes
from sessa_common.inference.generation import left_pad, reuse_prefix
from sessa_common.inference.sampling import GumbelNoise, SamplingConfig, choose
from sessa_export.exporter import Options, export_checkpoint

FRAMEWORKS = {"torch": sessa_torch.decoding, "mlx": sessa_mlx.decoding}
LAYOUTS = ["natural", "uniform", "buffer"]
CONFIG = small_config("untied", num_key_value_heads=2)
HYBRID = small_config(
    layer_kinds=("mamba2", "transformer", "sessa"),
    num_hidden_layers=3,
    mamba_d_state=12,
    mamba_d_head=16,
)
PROMPTS = [list(b"The feedback"), list(b"abcd"), list(b"one row more")]
SAMPLED = SamplingConfig(temperature=0.9, top_p=0.9, seed=4)


@pytest.fixture(scope="module")
def decoders(tmp_path_factory) -> dict:
    """A decoder of each runtime for one model, and of each framework for one with Mamba-2."""
    root = tmp_path_factory.mktemp("decoders")
    write_checkpoint(root / "rows", CONFIG)
    write_checkpoint(root / "hybrid", HYBRID)
    found = {name: module.load_decoder(root / "rows") for name, module in FRAMEWORKS.items()}
    for name, module in FRAMEWORKS.items():
        found[f"{name}, hybrid"] = module.load_decoder(root / "hybrid")
    for layout in LAYOUTS:
        export_checkpoint(root / "rows", root / layout, Options(layout=layout))
        found[layout] = sessa_export.runtime.load_decoder(root / layout)
    return found


NAMES = ["torch", "mlx", "torch, hybrid", "mlx, hybrid", *LAYOUTS]
OF_ROWS = ["torch", "mlx", *LAYOUTS]


@pytest.fixture(params=NAMES)
def decoder(decoders, request):
    decoders[request.param].reset()
    return decoders[request.param]


@pytest.fixture(params=OF_ROWS)
def decoder_of_rows(decoders, request):
    decoders[request.param].reset()
    return decoders[request.param]


def follow(decoder, ids: list[np.ndarray]) -> np.ndarray:
    """The logits behind the prompts and the given columns of ids, from an empty cache."""
    decoder.reset()
    logits = decoder.step(*left_pad(PROMPTS))
    for column in ids:
        logits = decoder.step(column[:, None])
    return logits


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("sampling", [SAMPLED, SamplingConfig(temperature=0)], ids=["seed", "top"])
def test_draw_yields_what_the_sampler_chooses(decoder, sampling) -> None:
    noise = GumbelNoise(sampling.seed, range(3), decoder.config.vocab_size)
    expected, logits = [], follow(decoder, [])
    for _ in range(12):
        expected.append(choose(logits, sampling, noise))
        logits = decoder.step(expected[-1][:, None])
    follow(decoder, [])
    drawn = list(decoder.draw(sampling, 12))
    assert all(ids.dtype == np.int64 and ids.shape == (3,) for ids in drawn)
    np.testing.assert_array_equal(drawn, expected)
    assert decoder.length == len(PROMPTS[0]) + 11


@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_closed_draw_leaves_every_id_but_the_last(decoder, count: int) -> None:
    follow(decoder, [])
    noise = GumbelNoise(SAMPLED.seed, range(3), decoder.config.vocab_size)
    with closing(decoder.draw(SAMPLED, 9, noise)) as drawn:
        ids = list(islice(drawn, count))
    assert decoder.length == len(PROMPTS[0]) + max(count - 1, 0)
    next_column = ids[-1] if ids else np.array([7, 8, 9])
    got = decoder.step(next_column[:, None])
    assert_close(got, follow(decoder, ids or [next_column]))
    # The noise goes on behind the ids that were yielded.
    expected = GumbelNoise(SAMPLED.seed, range(3), decoder.config.vocab_size)
    np.testing.assert_array_equal(noise.peek(), expected.peek(count))


def test_draw_goes_on_after_rows_have_left(decoder) -> None:
    follow(decoder, [])
    whole = list(decoder.draw(SAMPLED, 10))
    follow(decoder, [])
    noise = GumbelNoise(SAMPLED.seed, range(3), decoder.config.vocab_size)
    with closing(decoder.draw(SAMPLED, 10, noise)) as drawn:
        ids = list(islice(drawn, 4))
    rows = [2, 1]
    decoder.keep(rows)
    noise.keep(rows)
    decoder.feed(ids[-1][rows, None])
    rest = list(decoder.draw(SAMPLED, 6, noise))
    np.testing.assert_array_equal(rest, [column[rows] for column in whole[4:]])


def test_rows_join_and_leave_a_running_batch(decoder) -> None:
    """Every row goes on as alone, whatever is beside it, longer or shorter."""
    alone = {}
    for prompt in PROMPTS:
        decoder.reset()
        decoder.feed(np.array([prompt]))
        alone[bytes(prompt)] = [ids[0] for ids in decoder.draw(SamplingConfig(temperature=0), 9)]
    decoder.reset()
    batch, written = decoder.fork(), {}
    for turn, prompt in enumerate(PROMPTS):  # 12, 4 and 12 ids: each side is once the longer one
        new = decoder.fork()
        new.feed(np.array([prompt]))
        written[bytes(prompt)] = []
        if turn:
            batch.join(new)
        else:
            batch = new
        write(batch, written, alone, 2)
    batch, gone = batch.fork([2, 1]), written.pop(bytes(PROMPTS[0]))
    assert batch.length == len(PROMPTS[2]) + 2
    written = {bytes(PROMPTS[i]): written[bytes(PROMPTS[i])] for i in (2, 1)}
    write(batch, written, alone, 3)
    assert gone == alone[bytes(PROMPTS[0])][:6]
    assert all(ids == alone[prompt][: len(ids)] for prompt, ids in written.items())
    assert decoder.length == 0


def write(
    batch, written: dict[bytes, list[int]], alone: dict[bytes, list[int]], count: int
) -> None:
    """Feed the next ids of every text and check those that the model then writes."""
    for _ in range(count):
        column = [alone[prompt][len(ids)] for prompt, ids in written.items()]
        for ids, token in zip(written.values(), column, strict=True):
            ids.append(token)
        logits = batch.step(np.array(column)[:, None])
        for prompt, ids, found in zip(written, written.values(), logits.argmax(-1), strict=True):
            assert found == alone[prompt][len(ids)]


def test_a_row_is_copied_several_times(decoder) -> None:
    expected = follow(decoder, [np.array([1, 2, 3])])
    follow(decoder, [])
    copies = decoder.fork([1, 1, 0])
    # The padding of row 1 is left out where row 0 is not beside it.
    assert copies.length == len(PROMPTS[0]) and decoder.fork([1, 1]).length == len(PROMPTS[1])
    assert_close(copies.step(np.array([[2], [2], [1]])), expected[[1, 1, 0]])
    assert_close(decoder.step(np.array([[1], [2], [3]])), expected)
    with pytest.raises(SessaError, match="feed a token"):
        next(decoder.fork([0]).draw(SAMPLED, 1))


def test_a_single_row_without_padding_goes_on(decoder) -> None:
    expected = follow(decoder, [np.array([1, 2, 3])])[0]
    follow(decoder, [])
    decoder.keep([0])
    assert_close(decoder.step(np.array([[1]])), expected[None])


def test_trim_is_exact(decoder_of_rows) -> None:
    decoder = decoder_of_rows
    columns = [np.array([i, i + 1, i + 2]) for i in range(9)]
    follow(decoder, columns)
    decoder.trim(5)
    assert decoder.trimmable and decoder.length == len(PROMPTS[0]) + 4
    got = decoder.step(columns[7][:, None])
    assert_close(got, follow(decoder, [*columns[:4], columns[7]]))


def test_trim_refuses(decoder) -> None:
    expected = follow(decoder, [np.array([1, 2, 3])])
    follow(decoder, [])
    for count in (-1, decoder.length + 1):
        with pytest.raises(SessaError, match="cannot drop"):
            decoder.trim(count)
    if not decoder.trimmable:
        with pytest.raises(SessaError, match="Mamba-2"):
            decoder.trim(1)
    assert_close(decoder.step(np.array([[1], [2], [3]])), expected)
    decoder.trim(decoder.length)
    assert decoder.length == 0


def test_a_restored_cache_goes_on_bit_for_bit(decoder) -> None:
    column = np.array([[1], [2], [3]])
    follow(decoder, [])
    arrays = decoder.cache_arrays()
    expected = decoder.step(column)
    follow(decoder, [np.array([5, 6, 7])] * 300)
    decoder.restore_cache(arrays)
    assert decoder.length == len(PROMPTS[0])
    np.testing.assert_array_equal(decoder.step(column), expected)
    decoder.restore_cache({})
    assert decoder.length == 0 and decoder.cache_arrays() == {}


def test_the_names_are_those_of_the_table(decoder) -> None:
    follow(decoder, [])
    shapes = {name: array.shape for name, array in decoder.cache_arrays().items()}
    assert shapes == cache_shapes(decoder.config, 3, len(PROMPTS[0]))


@pytest.mark.parametrize("source, target", list(permutations(OF_ROWS, 2)))
def test_a_cache_of_one_runtime_goes_on_in_another(decoders, source, target) -> None:
    column = np.array([[1], [2], [3]])
    expected = follow(decoders[source], [column[:, 0]])
    decoders[target].reset()
    follow(decoders[source], [])
    decoders[target].restore_cache(decoders[source].cache_arrays())
    assert_close(decoders[target].step(column), expected)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_cache_in_bfloat16_keeps_its_dtypes(tmp_path: Path, framework: str) -> None:
    write_checkpoint(tmp_path, HYBRID)
    decoder = FRAMEWORKS[framework].load_decoder(tmp_path, dtype="bfloat16")
    follow(decoder, [])
    arrays = decoder.cache_arrays()
    dtypes = {name.rpartition(".")[2]: array.dtype.name for name, array in arrays.items()}
    rows = dict.fromkeys(("k", "v", "k_fb", "conv"), "bfloat16")
    assert dtypes == {**rows, "s": "float32", "state": "float32", "mask": "bool"}
    expected = decoder.step(np.array([[1], [2], [3]]))
    decoder.restore_cache(arrays)
    np.testing.assert_array_equal(decoder.step(np.array([[1], [2], [3]])), expected)
    other = FRAMEWORKS[framework].load_decoder(tmp_path)
    with pytest.raises(SessaError, match="is bfloat16, expected float32"):
        other.restore_cache(arrays)


def test_a_wrong_cache_is_refused_and_changes_nothing(decoder_of_rows) -> None:
    decoder = decoder_of_rows
    expected = follow(decoder, [np.array([1, 2, 3])])
    follow(decoder, [])
    arrays = decoder.cache_arrays()
    k = arrays["layers.0.k"]
    wrong = [
        ({name: a for name, a in arrays.items() if name != "layers.1.s"}, "layers.1.s is missing"),
        ({**arrays, "layers.2.k": k}, "layers.2.k does not belong"),
        ({**arrays, "layers.0.k": k[:, :, :-1]}, "layers.0.k has shape"),
        ({**arrays, "layers.0.k": k.astype(np.float16)}, "is float16, expected float32"),
        ({name: a for name, a in arrays.items() if name != "mask"}, "no array `mask`"),
        ({**arrays, "mask": arrays["mask"].astype(np.int64)}, "no array `mask`"),
    ]
    for given, message in wrong:
        with pytest.raises(SessaError, match=message):
            decoder.restore_cache(given)
    assert_close(decoder.step(np.array([[1], [2], [3]])), expected)


def test_draw_needs_a_fed_token(decoder) -> None:
    changes = [
        decoder.reset,
        lambda: decoder.trim(decoder.length),
        lambda: decoder.keep([0]),
        lambda: decoder.restore_cache(decoder.cache_arrays()),
    ]
    for change in changes:
        follow(decoder, [])
        change()
        with pytest.raises(SessaError, match="feed a token"):
            next(decoder.draw(SAMPLED, 1))


@pytest.mark.parametrize(
    "cached, prompt, stays",
    [
        (b"abcdef", b"abcxyz", 3),
        (b"abcdef", b"abcdefgh", 6),
        (b"abcdef", b"abcdef", 5),
        (b"abcdef", b"ab", 1),
        (b"abcdef", b"xyz", 0),
        (b"", b"xyz", 0),
    ],
)
def test_a_common_prefix_is_read_once(decoder, cached: bytes, prompt: bytes, stays: int) -> None:
    expected = decoder.step(np.array([list(prompt)]))
    decoder.reset()
    if cached:
        decoder.feed(np.array([list(cached)]))
    if not decoder.trimmable and stays < len(cached):
        stays = 0
    assert reuse_prefix(decoder, list(cached), list(prompt)) == stays == decoder.length
    assert_close(decoder.step(np.array([list(prompt)[stays:]])), expected)
