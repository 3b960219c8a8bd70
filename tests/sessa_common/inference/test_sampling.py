"""Sampling: filters, probabilities, random streams."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sessa_common.errors import SessaError
from sessa_common.inference.sampling import GumbelNoise, SamplingConfig, choose, filter_logits


def probabilities(logits: np.ndarray, **options) -> np.ndarray:
    (scores,) = filter_logits(np.asarray(logits)[None], SamplingConfig(**options))
    assert scores.dtype == np.float32
    p = np.exp(scores.astype(np.float64))
    return p / p.sum()


def draws(logits: np.ndarray, config: SamplingConfig, count: int, row: int = 0) -> list[int]:
    noise = GumbelNoise(config.seed, [row], len(logits))
    return [int(choose(logits[None], config, noise)[0]) for _ in range(count)]


LOGITS = np.log([0.5, 0.25, 0.15, 0.07, 0.03])


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [0.5, 0.25, 0.15, 0.07, 0.03]),
        ({"temperature": 0.5}, np.square([0.5, 0.25, 0.15, 0.07, 0.03]) / 0.3408),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_k": 99}, [0.5, 0.25, 0.15, 0.07, 0.03]),
        ({"top_p": 0.76}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0, 0]),
        ({"top_p": 0.74}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0, 0]),
        ({"min_p": 0.2}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0, 0]),
        # top-p counts within what top-k left: 0.5 / 0.75 is two thirds already.
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0, 0]),
    ],
)
def test_filters(options: dict, expected: list[float]) -> None:
    got = probabilities(LOGITS, **{"temperature": 1.0, **options})
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_equal_logits_keep_the_lower_ids() -> None:
    np.testing.assert_allclose(probabilities(np.zeros(6), top_k=3), [1 / 3] * 3 + [0] * 3, 1e-6)
    np.testing.assert_allclose(probabilities(np.zeros(4), top_p=0.5), [1 / 2] * 2 + [0] * 2, 1e-6)


def test_rows_of_a_batch_are_filtered_as_alone() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 40)).round(1)
    config = SamplingConfig(temperature=0.7, top_k=9, top_p=0.8, min_p=0.02)
    alone = np.concatenate([filter_logits(row[None], config) for row in logits])
    np.testing.assert_array_equal(filter_logits(logits, config), alone)
    assert len(set(np.isfinite(alone).sum(axis=1))) > 1


def test_draws_have_the_given_probabilities() -> None:
    ids = draws(LOGITS, SamplingConfig(temperature=1.0, seed=1), 20_000)
    expected = np.exp(LOGITS)
    # Four standard deviations of a binomial share.
    shares = np.bincount(ids, minlength=5) / 20_000
    assert np.all(np.abs(shares - expected) < 4 * np.sqrt(expected / 20_000))


def test_seed_and_row_choose_the_random_stream() -> None:
    def draw(seed: int, row: int) -> tuple[int, ...]:
        return tuple(draws(np.zeros(1000), SamplingConfig(temperature=1.0, seed=seed), 8, row))

    assert draw(1, 0) == draw(1, 0)
    assert len({draw(seed, row) for seed in (0, 1) for row in (0, 1)}) == 4


def test_noise_is_that_of_numpys_generator() -> None:
    # Rows of so many ids are drawn in threads.
    noise = GumbelNoise(5, [0, 3], 100_000)
    for row, stream in enumerate((0, 3)):
        expected = np.random.default_rng([5, stream]).gumbel(size=100_000)
        np.testing.assert_allclose(noise.peek()[row], expected, rtol=1e-6, atol=3e-7)
    assert noise.peek().dtype == np.float32


def test_noise_of_later_draws_does_not_depend_on_when_it_is_drawn() -> None:
    whole = GumbelNoise(0, range(3), 7)
    ahead, rows = GumbelNoise(0, range(3), 7), [2, 0]
    expected = [whole.take() for _ in range(6)]
    np.testing.assert_array_equal(ahead.peek(2), expected[2])
    for turn in range(2):
        np.testing.assert_array_equal(ahead.take(), expected[turn])
        ahead.begin()
    ahead.keep(rows)
    for turn in range(2, 6):
        ahead.begin()
        np.testing.assert_array_equal(ahead.take(), expected[turn][rows])


def test_no_dropped_token_is_drawn() -> None:
    assert set(draws(LOGITS, SamplingConfig(temperature=50.0, top_k=2), 500)) == {0, 1}
    allowed = np.where(np.arange(5) == 3, LOGITS, -np.inf)
    assert set(draws(allowed, SamplingConfig(temperature=50.0), 20)) == {3}


def test_a_tiny_temperature_takes_the_likeliest_token() -> None:
    assert set(draws(LOGITS, SamplingConfig(temperature=1e-300), 20)) == {0}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_refused(bad: float, temperature: float) -> None:
    with pytest.raises(SessaError, match="not finite"):
        draws(np.array([0.0, bad]), SamplingConfig(temperature=temperature), 1)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 2},
        {"seed": -1},
    ],
    ids=str,
)
def test_sampling_config_refuses(options: dict) -> None:
    with pytest.raises(SessaError, match=f"{next(iter(options))} is"):
        SamplingConfig(**options)
