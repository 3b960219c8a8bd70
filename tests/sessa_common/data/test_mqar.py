"""Diffuse MQAR: grammar, lags and distractors of the examples, and the measures of answers."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from sessa_common.data.mqar import DiffuseMqar
from sessa_common.errors import SessaError

SMALL = {"min_lag": 40, "max_lag": 90, "test_lags": (36, 70, 110), "pairs": 6, "queries": 4}
SMALL |= {"prefix": 3, "group": 3, "pool": 5, "key_tokens": 7, "value_tokens": 40}
SMALL |= {"filler_tokens": 11}
TASKS = {"standard": DiffuseMqar(), "small": DiffuseMqar(**SMALL)}
both = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
splits = pytest.mark.parametrize("split", ["train", "test"])


def words(task, row):
    """The tokens of an example as text, without its padding."""
    vocabulary = task.vocabulary
    text = [vocabulary[token] for token in row]
    end = len(text) if "<pad>" not in text else text.index("<pad>")
    assert set(text[end:]) <= {"<pad>"}
    return text[:end]


def entries(part, size):
    """[(position, key, value)] of every "key <assign> value" in a list of words."""
    places = [i for i, word in enumerate(part) if word == "<assign>"]
    return [(i + 1, tuple(part[i - size : i]), part[i + 1]) for i in places]


def read(task, row):
    """(memory, noise, queries) of an example, each [(position, key, value)], and the noise."""
    text = words(task, row)
    first, second = (i for i, word in enumerate(text) if word == "<sep>")
    parts = []
    for begin, end in ((1, first), (first + 1, second), (second + 1, len(text))):
        found = entries(text[begin:end], task.prefix + 1)
        parts.append([(begin + at, key, value) for at, key, value in found])
    assert text[0] == "<bos>" and len(parts[0]) == task.pairs and len(parts[2]) == task.queries
    assert text.count("<query>") == task.queries
    return *parts, text[first + 1 : second]


def test_vocabulary_is_disjoint():
    vocabulary = DiffuseMqar().vocabulary
    assert len(vocabulary) == len(set(vocabulary)) == 613
    kinds = Counter(token.rstrip("0123456789") for token in vocabulary)
    assert kinds["k"] == 64 and kinds["v"] == 480 and kinds["f"] == 64
    assert vocabulary[0] == "<pad>"


@both
@splits
def test_queries_ask_for_what_the_memory_holds(task, split):
    examples = task.make(split, 20, [4, 2])
    for n, row in enumerate(examples.tokens):
        memory, _, queries, _ = read(task, row)
        source = {key: (at, value) for at, key, value in memory}
        assert len({key for _, key, _ in queries}) == task.queries
        assert len({value for _, _, value in memory}) == task.pairs
        lags = []
        for at, key, value in queries:
            place, kept = source[key]
            assert value == kept
            lags.append(at - place)
        assert lags == examples.metadata["lags"][n].tolist()
        assert lags[examples.metadata["anchor"][n]] == examples.metadata["anchor_lag"][n]
        positions = [at for at, _, _ in queries]
        assert np.flatnonzero(examples.weights[n]).tolist() == positions
        assert row[positions].tolist() == examples.metadata["answers"][n].tolist()


@both
def test_memory_keys_share_prefixes_and_a_pool_of_suffixes(task):
    for row in task.make("train", 20, [5]).tokens:
        suffixes = defaultdict(set)
        for _, (*prefix, suffix), _ in read(task, row)[0]:
            suffixes[tuple(prefix)].add(suffix)
        assert len(suffixes) == task.pairs // task.group
        assert {len(group) for group in suffixes.values()} == {task.group}
        assert len(set.union(*suffixes.values())) <= task.pool


@both
def test_distractors_look_like_memory_but_never_are(task):
    alike = total = 0
    examples = task.make("test", 40, [6])
    for n, row in enumerate(examples.tokens):
        memory, distractors, _, noise = read(task, row)
        keys = {key for _, key, _ in memory}
        assert len(distractors) == int(task.density * len(noise) / (task.prefix + 3))
        assert not keys & {key for _, key, _ in distractors}
        rest = len(noise) - (task.prefix + 3) * len(distractors)
        assert sum(word.startswith("f") for word in noise) == rest
        values = [f"v{v - task.first_value}" for v in examples.metadata["distractor_values"][n]]
        assert values[: len(distractors)] == [value for _, _, value in distractors]
        prefixes = {key[:-1] for key in keys}
        alike += sum(key[:-1] in prefixes for _, key, _ in distractors)
        total += len(distractors)
    assert 0.6 < alike / total < 0.8


def test_density_zero_has_no_distractors():
    task = DiffuseMqar(density=0)
    examples = task.make("test", 3, [7])
    assert examples.metadata["distractor_keys"].shape == (12, 0)
    for row in examples.tokens:
        assert all(word.startswith("f") for word in read(task, row)[3])
    levels = task.measure(examples, examples.tokens)["heuristics_by_lag"]["128"]
    assert levels["prefix_only"] > 0.4  # one of two, or of three after the other was asked for


def test_density_one_fills_the_noise():
    task = DiffuseMqar(density=1)
    for row in task.make("validation", 20, [7]).tokens:
        assert sum(word.startswith("f") for word in read(task, row)[3]) < task.prefix + 3


@both
def test_shapes_lags_and_lengths(task):
    train, test = task.make("train", 400, [8]), task.make("test", 50, [8])
    assert train.tokens.shape == train.weights.shape == (400, task._length(task.max_lag))
    assert test.tokens.shape == (50 * len(task.test_lags), task.context)
    assert test.metadata["anchor_lag"].tolist() == np.repeat(task.test_lags, 50).tolist()
    lags = train.metadata["anchor_lag"]
    assert task.min_lag <= lags.min() and lags.max() <= task.max_lag
    middle = np.sqrt(task.min_lag * task.max_lag)  # the median of a log-uniform draw
    assert 0.42 < (lags < middle).mean() < 0.58
    assert set(train.metadata["anchor"]) == set(range(task.queries))
    assert train.tokens.dtype == np.int32 and train.weights.dtype == np.float32
    assert all(value.flags.c_contiguous for value in train.metadata.values())


@pytest.mark.parametrize("lag", [50, 51, 64])
def test_longest_example_reaches_the_stated_length(lag):
    task = DiffuseMqar(min_lag=50, max_lag=lag, test_lags=(lag,))
    used = (task.make("test", 2000, [9]).tokens != 0).sum(axis=1)
    assert used.max() == task.context


def test_context_covers_training_lags_beyond_the_test_lags():
    task = DiffuseMqar(max_lag=300, test_lags=(100,))
    assert task.context == task.make("train", 2, [1]).tokens.shape[1]
    assert task.context == task.make("test", 2, [1]).tokens.shape[1]


def test_the_seed_decides():
    task = DiffuseMqar()
    first, again, other = (task.make("train", 5, seed).tokens for seed in ([1, 2], [1, 2], [1, 3]))
    assert (first == again).all() and (first != other).any()


def test_heuristic_levels():
    task = DiffuseMqar()
    examples = task.make("test", 300, [10])
    levels = task.measure(examples, examples.tokens)["heuristics_by_lag"]
    known = {  # at lags 128, 256, 512, 1024
        "prefix_only": (0.40, 0.30, 0.19, 0.105),
        "last_key_token": (0.20, 0.17, 0.13, 0.10),
        "any_context_value": (0.04, 0.03, 0.018, 0.010),
        "uniform": (0.0021,) * 4,
    }
    for name, values in known.items():
        measured = [levels[str(lag)][name] for lag in task.test_lags]
        np.testing.assert_allclose(measured, values, rtol=0.06, atol=0.002)


@pytest.mark.parametrize("heuristic", ["prefix_only", "last_key_token", "any_context_value"])
def test_a_guesser_scores_its_heuristic_level(heuristic):
    """A guesser that reads the text alone gets the accuracy that `measure` expects of it."""
    task, rng = DiffuseMqar(test_lags=(200,)), np.random.default_rng(11)
    fits = {
        "prefix_only": lambda key, asked: key[:-1] == asked[:-1],
        "last_key_token": lambda key, asked: key[-1] == asked[-1],
        "any_context_value": lambda key, asked: True,
    }[heuristic]
    examples = task.make("test", 500, [11])
    guesses, vocabulary = np.zeros_like(examples.tokens), task.vocabulary
    for row, guess in zip(examples.tokens, guesses, strict=True):
        memory, noise, queries, _ = read(task, row)
        for n, (at, asked, _) in enumerate(queries):
            fit = [v for _, key, v in memory + noise + queries[:n] if fits(key, asked)]
            guess[at] = vocabulary.index(fit[rng.integers(len(fit))])
    result = task.measure(examples, guesses)
    expected = result["heuristics_by_lag"]["200"][heuristic]
    assert abs(result["accuracy"] - expected) < 0.025  # more than three standard errors


def answered(task, examples, kind):
    """Predictions of one kind at every query, read from the examples' text."""
    predicted, vocabulary = np.zeros_like(examples.tokens), task.vocabulary
    for row, answer in zip(examples.tokens, predicted, strict=True):
        memory, noise, queries, _ = read(task, row)
        every = {value for _, _, value in memory + noise}
        unused = next(v for v in vocabulary if v[0] == "v" and v not in every)
        hidden = {value for _, _, value in noise}
        for at, key, value in queries:
            others = [(k, v) for _, k, v in memory if k != key and v not in hidden]
            choices = {
                "right": [value],
                "same_prefix": [v for _, k, v in memory if k != key and k[:-1] == key[:-1]],
                "distractor": sorted(hidden - {v for _, _, v in memory}),
                "other_context": [v for k, v in others if k[:-1] != key[:-1]],
                "other_value": [unused],
                "not_a_value": [key[0]],
            }[kind]
            answer[at] = vocabulary.index(choices[0])
    return predicted


KINDS = ["same_prefix", "distractor", "other_context", "other_value", "not_a_value"]


@pytest.mark.parametrize("kind", ["right", *KINDS])
def test_measure_names_the_kind_of_error(kind):
    task = DiffuseMqar(test_lags=(130, 260))
    examples = task.make("test", 15, [12])
    result = task.measure(examples, answered(task, examples, kind))
    assert result["accuracy"] == (kind == "right") and result["examples"] == 30
    for lag in ("130", "260"):
        assert result["by_lag"][lag] == result["anchor_by_lag"][lag] == (kind == "right")
        assert result["errors_by_lag"][lag] == {name: name == kind for name in KINDS}
    assert result["chance"] == 1 / 480


def test_measure_keeps_lags_and_the_anchor_apart():
    """All right at the longer lag, only the anchor at the shorter."""
    task = DiffuseMqar(test_lags=(130, 260))
    examples = task.make("test", 6, [13])
    predicted = examples.tokens.copy()
    for n in range(6):
        wrong = np.delete(examples.metadata["positions"][n], examples.metadata["anchor"][n])
        predicted[n, wrong] = 1
    result = task.measure(examples, predicted)
    assert result["by_lag"] == {"130": 1 / 8, "260": 1.0}
    assert result["anchor_by_lag"] == {"130": 1.0, "260": 1.0}
    assert result["errors_by_lag"]["130"]["not_a_value"] == 7 / 8
    assert result["accuracy"] == 9 / 16


BAD = {
    "min_lag": 49,
    "max_lag": 63,
    "test_lags": (128, 49),
    "pairs": 15,
    "queries": 17,
    "group": 8,
    "pool": 65,
    "density": 1.5,
    "key_tokens": 2,
    "value_tokens": 0,
    "filler_tokens": 0,
    "prefix": 0,
    "test_examples": 0,
    "train_examples": -1,
}


@pytest.mark.parametrize("option", BAD)
def test_bad_options_are_named(option):
    with pytest.raises(SessaError, match=option):
        DiffuseMqar(**{option: BAD[option]})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"value_tokens": 15}, "pairs is 16"),
        ({"key_tokens": 4, "prefix": 1, "pairs": 10}, "prefix is 1"),
        ({"prefix": 10}, "prefix is 10"),
        ({"test_lags": ()}, "test_lags"),
        ({"test_lags": (128, 128)}, "test_lags"),
        ({"group": 4, "pool": 4, "key_tokens": 4}, "key_tokens is 4"),
    ],
)
def test_options_that_do_not_fit_each_other(options, named):
    with pytest.raises(SessaError, match=named):
        DiffuseMqar(**options)


def test_unknown_split():
    with pytest.raises(SessaError, match="'dev'"):
        DiffuseMqar().make("dev", 1, [0])
