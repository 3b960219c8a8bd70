"""SymbolSoup: its generator's statistics, and its decoder against sums over every hidden path."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from sessa_common.data.symbolsoup import (
    ALPHABET,
    FIRST_LABEL,
    FIRST_LETTER,
    MOTIFS,
    Process,
    SymbolSoup,
    new_styles,
)
from sessa_common.errors import SessaError

SMALL = SymbolSoup(min_tokens=61, max_tokens=93)
DENSE = SymbolSoup(min_tokens=30, max_tokens=47, spaced=False, style_seed=3)


def words(task, row):
    """An example's tokens as words, without padding."""
    return [task.vocabulary[token] for token in row if token]


def is_letter(tokens):
    return (tokens >= FIRST_LETTER) & (tokens < FIRST_LABEL)


def test_motifs_are_the_runs_of_the_alphabet():
    texts = {ALPHABET[first : first + length] for first, length in MOTIFS}
    assert len(texts) == len(MOTIFS) == 39
    assert {len(text) for text in texts} == {3, 4, 5}
    assert {"abc", "nop", "mnop", "lmnop"} <= texts


def test_style_weights():
    styles = new_styles(0)
    relative = styles.unigram / styles.unigram.min(axis=1, keepdims=True)
    expected = [1] * 8 + [2] * 4 + [3] * 4
    np.testing.assert_allclose(np.sort(relative, axis=1), np.tile(expected, (9, 1)))
    # A preferred bigram is four times as likely as the letter's own weight says: 5 of 8 kinds.
    lift = styles.bigram / styles.unigram[:, None]
    preferred = lift / lift.min(axis=2, keepdims=True) > 2
    rows = preferred.sum(axis=2)
    assert [rows[relative == weight].tolist() for weight in (3, 2, 1)] == [
        [3] * 36,
        [2] * 36,
        [0] * 72,
    ]
    np.testing.assert_allclose(lift.max(axis=2)[rows > 0] / lift.min(axis=2)[rows > 0], 4)


def test_motif_weights_count_primary_and_secondary_letters():
    styles = new_styles(5)
    letters = styles.unigram[4] / styles.unigram[4].min()
    scores = [
        1 + sum({1: 0, 2: 0.5, 3: 0.9}[round(weight)] for weight in letters[first : first + length])
        for first, length in MOTIFS
    ]
    np.testing.assert_allclose(styles.motif[4], np.array(scores) / sum(scores))


@pytest.mark.parametrize("task", [SMALL, DENSE], ids=["spaced", "dense"])
def test_layout(task):
    examples = task.make("test", 60, [0, 2])
    assert examples.tokens.shape == examples.weights.shape == (60, task.context)
    assert examples.tokens.dtype == np.int32 and examples.weights.dtype == np.float32
    for i, row in enumerate(examples.tokens):
        text = words(task, row)
        assert len(text) == examples.metadata["tokens"][i]
        assert task.min_tokens <= len(text) <= task.max_tokens
        if task.spaced:
            assert set(text[1::2]) == {"<space>"}
            text = text[::2]
            assert len(text) * 2 - 1 == 2 * is_letter(row).sum() + 13
        marks = [word for word in text if len(word) > 1]
        assert marks == ["<bos>", "<sep1>", "<sep2>", "<sep1>", "<sep2>", "<sep>", text[-1]]
        left, right = examples.metadata["left"][i], examples.metadata["right"][i]
        assert text[-1] == f"left{left}/right{right}"
        stride = 2 if task.spaced else 1
        opened = [stride * (at + 1) for at, word in enumerate(text) if word == "<sep1>"]
        closed = [stride * at for at, word in enumerate(text) if word == "<sep2>"]
        assert opened == examples.metadata["starts"][i].tolist()
        lengths = [(end - start) // stride for start, end in zip(opened, closed, strict=True)]
        assert lengths == examples.metadata["lengths"][i].tolist() and min(lengths) >= 1


@pytest.mark.parametrize("task", [SMALL, DENSE], ids=["spaced", "dense"])
def test_only_the_label_has_weight(task):
    examples = task.make("train", 40, [1])
    np.testing.assert_array_equal(examples.weights, examples.tokens >= FIRST_LABEL)
    np.testing.assert_array_equal(examples.weights.sum(axis=1), 1)
    counts = np.bincount(examples.metadata["label"], minlength=20)
    np.testing.assert_array_equal(counts, 2)


def test_lengths_and_noise_cover_their_ranges():
    task = SymbolSoup()
    examples = task.make("train", 2000, [0])
    letters = is_letter(examples.tokens).sum(axis=1)
    assert task.context == 599
    assert (letters.min(), letters.max()) == (194, 293)
    share = 1 - examples.metadata["lengths"].sum(axis=1) / letters
    assert 0.297 < share.min() < 0.31 and 0.59 < share.max() < 0.603
    assert abs(share.mean() - 0.45) < 0.01
    first = examples.metadata["left_first"].mean()
    assert abs(first - 0.5) < 0.05


def test_flips_go_to_other_letters_at_their_rate():
    styles = new_styles(0)
    rows = np.arange(900) % 9
    drawn = [Process(styles, 0.3, p).draw(np.random.default_rng(4), rows, 100) for p in (0, 0.2)]
    assert abs((drawn[0] != drawn[1]).mean() - 0.2) < 0.006
    assert all(letters.min() == 0 and letters.max() == 15 for letters in drawn)


def test_generator_draws_the_letters_that_the_process_says():
    process = SMALL.process
    drawn = process.draw(np.random.default_rng(1), np.repeat(np.arange(9), 1000), 60)[:, 20:]
    for style, letters in enumerate(drawn.reshape(9, -1)):
        found = np.bincount(letters, minlength=16) / letters.size
        np.testing.assert_allclose(found, process.letter_shares()[style], atol=0.012)


def test_same_seed_same_examples():
    a, b, c = (SMALL.make("test", 30, seed) for seed in ([0, 2], [0, 2], [0, 3]))
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert (a.tokens != c.tokens).any(axis=1).all()
    other = replace(SMALL, style_seed=1).make("test", 30, [0, 2])
    assert (a.tokens != other.tokens).any()


def true_texts(styles, style, share, length):
    """Probability of every unflipped text of a style, by walking each choice of the generator."""
    found: dict[tuple[int, ...], float] = {}
    runs = [tuple(range(first, first + size)) for first, size in MOTIFS]

    def walk(text, probability):
        if len(text) >= length:
            text = text[:length]
            found[text] = found.get(text, 0) + probability
            return
        row = styles.bigram[style, text[-1]] if text else styles.unigram[style]
        for letter in range(16):
            walk((*text, letter), probability * (1 - share) * row[letter])
        for run, weight in zip(runs, styles.motif[style], strict=True):
            walk(text + run, probability * share * weight)

    walk((), 1.0)
    return found


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_decoder_sums_over_every_hidden_path(length):
    styles, share, flip, style = new_styles(2), 0.35, 0.07, 6
    texts = true_texts(styles, style, share, length)
    assert sum(texts.values()) == pytest.approx(1, abs=1e-12)
    observed = np.array(list(itertools.product((3, 4, 6), repeat=length)))
    hidden = np.array(list(texts))
    wrong = (observed[:, None] != hidden).sum(axis=2)
    channel = (flip / 15) ** wrong * (1 - flip) ** (length - wrong)
    expected = channel @ np.array(list(texts.values()))
    padded = np.pad(observed, ((0, 0), (0, 2)))  # letters after a block's end must not count
    found = Process(styles, share, flip).log_likelihood(padded, np.full(len(padded), length))
    np.testing.assert_allclose(found[:, style], np.log(expected), rtol=1e-12)


def test_decoder_takes_long_and_short_blocks_together():
    process, rng = SMALL.process, np.random.default_rng(0)
    letters, lengths = rng.integers(0, 16, (300, 12)), rng.integers(1, 13, 300)
    together = process.log_likelihood(letters, lengths)
    for i in (0, 17, 299):
        alone = process.log_likelihood(letters[i : i + 1, : lengths[i]], lengths[i : i + 1])
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-12)


def test_posterior_takes_both_orders():
    task = SymbolSoup(min_tokens=10, max_tokens=10, noise_min=0, noise_max=0, spaced=False)
    examples = task.make("test", 20, [5])
    process = task.process
    for i, (a, b) in enumerate(examples.metadata["starts"]):
        spans = zip((a, b), examples.metadata["lengths"][i], strict=True)
        blocks = [examples.tokens[i : i + 1, s : s + n] - FIRST_LETTER for s, n in spans]
        first, second = (
            np.exp(process.log_likelihood(x, np.array([x.shape[1]])))[0] for x in blocks
        )
        joint = np.outer(first[:4], second[4:]) + np.outer(second[:4], first[4:])
        expected = joint.ravel() / joint.sum()
        np.testing.assert_allclose(task.bayes_posterior(examples)[i], expected, rtol=1e-10)


def test_bayes_above_unigram_above_chance():
    task = SymbolSoup()
    examples = task.make("test", 500, [0, 2])
    found = task.measure(examples, np.zeros_like(examples.tokens))
    assert 0.76 < found["ceiling"] < 0.88  # known: 0.824 with another draw of the styles
    assert 0.52 < found["unigram"] < 0.68 and found["chance"] == 0.05
    # A posterior that is right says how often its likeliest label is.
    posterior = task.bayes_posterior(examples)
    np.testing.assert_allclose(posterior.sum(axis=1), 1)
    assert abs(posterior.max(axis=1).mean() - found["ceiling"]) < 4 * found["ceiling_error"]


def test_measure_counts_labels_and_halves():
    examples = SMALL.make("test", 40, [7])
    metadata, rows = examples.metadata, np.arange(40)
    predicted = np.zeros_like(examples.tokens)
    said = FIRST_LABEL + 5 * metadata["left"] + metadata["right"]
    said[:10] = FIRST_LABEL + 5 * metadata["left"][:10] + (metadata["right"][:10] + 1) % 5
    said[10:14] = FIRST_LABEL + 5 * ((metadata["left"][10:14] + 1) % 4) + metadata["right"][10:14]
    said[14:16] = (0, FIRST_LETTER)  # no label at all
    predicted[rows, metadata["tokens"] - 1] = said
    found = SMALL.measure(examples, predicted)
    assert found["examples"] == 40
    assert found["accuracy"] == pytest.approx(24 / 40)
    assert found["left_accuracy"] == pytest.approx(34 / 40)
    assert found["right_accuracy"] == pytest.approx(28 / 40)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("min_tokens", 13),
        ("max_tokens", 399),
        ("noise_min", -0.1),
        ("noise_max", 0.2),
        ("noise_max", 1.0),
        ("flip_probability", 1.0),
        ("motif_probability", -0.01),
        ("motif_probability", float("nan")),
        ("test_examples", 0),
        ("train_examples", 0),
        ("style_seed", -1),
        ("data_seed", -1),
    ],
)
def test_bad_options_are_named(option, value):
    with pytest.raises(SessaError, match=f"symbolsoup: {option} is {value!r}"):
        SymbolSoup(**{option: value})
