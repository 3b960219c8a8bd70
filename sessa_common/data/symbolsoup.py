"""SymbolSoup: name the styles of two blocks of letters inside noise of the same letters.

    <bos> noise <sep1> block <sep2> noise <sep1> block <sep2> noise <sep> label

A style is a Markov chain of letters and motifs; some letters are then replaced at random. Every
example has one block of a left style and one of a right style, in random order. The process is a
hidden Markov model, so the best possible accuracy (the Bayes ceiling) is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from sessa_common.data.tasks import Examples, require

SPECIAL = ("<pad>", "<bos>", "<sep1>", "<sep2>", "<sep>", "<space>")
PAD, BOS, SEP1, SEP2, SEP, SPACE = range(len(SPECIAL))
ALPHABET = "abcdefghijklmnop"
LETTERS = len(ALPHABET)
LEFT, RIGHT = 4, 5  # numbers of left and of right styles
FIRST_LETTER, FIRST_LABEL = len(SPECIAL), len(SPECIAL) + LETTERS
MARKS = 7  # tokens of an example that are neither letters nor white space
PRIMARY, SECONDARY, OTHER = 3.0, 2.0, 1.0  # weights of a style's letters
BIGRAM = 4.0  # factor on the weight of a preferred bigram
MOTIF_LENGTHS = (3, 4, 5)
# Motifs are runs of the alphabet, as (first letter, length).
MOTIFS = [(first, length) for length in MOTIF_LENGTHS for first in range(LETTERS - length + 1)]
CHUNK = 256  # blocks that the decoder processes together


@dataclass(frozen=True)
class Styles:
    """Distributions of the next letter or motif in S styles, the left styles first.

    After the first letter of a motif its other letters follow; the end of a block cuts it short.
    """

    unigram: np.ndarray  # (S, 16), rows sum to 1
    bigram: np.ndarray  # (S, 16, 16): previous letter, next letter; rows sum to 1
    motif: np.ndarray  # (S, 39), rows sum to 1


def new_styles(seed: int) -> Styles:
    """Draw the styles of a seed; each has its own primary, secondary and other letters."""
    rng = np.random.default_rng(seed)
    unigrams, bigrams, motifs = [], [], []
    for _ in range(LEFT + RIGHT):
        order = rng.permutation(LETTERS)
        primary, secondary = order[:4], order[4:8]
        weight = np.full(LETTERS, OTHER)
        weight[primary], weight[secondary] = PRIMARY, SECONDARY
        factor = np.ones((LETTERS, LETTERS))
        preferred = (
            (primary, np.roll(primary, -1)),
            (primary, primary),
            (secondary, secondary),
            (primary, secondary),
            (secondary, primary),
        )
        for a, b in preferred:
            factor[a, b] = BIGRAM
        runs = [range(first, first + length) for first, length in MOTIFS]
        hits = [(np.isin(primary, run).sum(), np.isin(secondary, run).sum()) for run in runs]
        unigrams.append(weight)
        bigrams.append(factor * weight)
        motifs.append([1 + 0.9 * first + 0.5 * second for first, second in hits])
    return Styles(*(_normalized(np.array(part)) for part in (unigrams, bigrams, motifs)))


def _normalized(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum(axis=-1, keepdims=True)


@dataclass(frozen=True)
class Process:
    """The hidden Markov model of a block.

    Its states are (number of letters still to come of a motif, letter).
    """

    styles: Styles
    motif_probability: float
    flip_probability: float

    @cached_property
    def emission(self) -> np.ndarray:
        """Probability (16, 16) of an observed letter given the true one: (observed, true)."""
        flipped = np.full((LETTERS, LETTERS), self.flip_probability / (LETTERS - 1))
        np.fill_diagonal(flipped, 1 - self.flip_probability)
        return flipped

    @cached_property
    def motif_start(self) -> np.ndarray:
        """Probability (S, 5, 16) that a motif starts, by letters still to come and first letter."""
        start = np.zeros((len(self.styles.motif), max(MOTIF_LENGTHS), LETTERS))
        for i, (first, length) in enumerate(MOTIFS):
            start[:, length - 1, first] = self.motif_probability * self.styles.motif[:, i]
        return start

    @property
    def first(self) -> np.ndarray:
        """Probability (S, 1, 5, 16) of the states at the first letter of a block."""
        state = self.motif_start.copy()
        state[:, 0] += (1 - self.motif_probability) * self.styles.unigram
        return state[:, None]

    def after(self, state: np.ndarray) -> np.ndarray:
        """Return the probabilities (S, B, 5, 16) of the states after one more letter."""
        free = state[:, :, 0]
        following = free.sum(-1)[..., None, None] * self.motif_start[:, None]
        following[:, :, :-1, 1:] += state[:, :, 1:, :-1]
        following[:, :, 0] += (1 - self.motif_probability) * (free @ self.styles.bigram)
        return following

    def draw(self, rng: np.random.Generator, style: np.ndarray, length: int) -> np.ndarray:
        """Draw the letters (B, length) of blocks in the given styles (B,)."""
        cumulative, actions = self._cumulative, LETTERS + len(MOTIFS)
        letters = np.empty((length, len(style)), np.int64)
        firsts, lengths = np.array(MOTIFS).T
        heads = np.concatenate([np.arange(LETTERS), firsts])
        motif_rest = np.concatenate([np.zeros(LETTERS, np.int64), lengths - 1])
        letter, rest = np.full(len(style), LETTERS), np.zeros(len(style), np.int64)
        for i in range(length):
            row = style * (LETTERS + 1) + letter
            position = np.searchsorted(cumulative, row + rng.random(len(style)), side="right")
            action = np.clip(position - row * actions, 0, actions - 1)
            letter = np.where(rest > 0, letter + 1, heads[action])
            rest = np.where(rest > 0, rest - 1, motif_rest[action])
            letters[i] = letter
        flips = rng.random(letters.shape) < self.flip_probability
        shift = np.where(flips, rng.integers(1, LETTERS, letters.shape), 0)
        return ((letters + shift) % LETTERS).T

    @cached_property
    def _cumulative(self) -> np.ndarray:
        """Row number + cumulative probability of each action (next letter or motif), flattened.

        Rows are (style, previous letter), with 16 for the start of a block. Adding the row number
        keeps the array sorted, so one binary search draws for all rows.
        """
        styles = self.styles
        letter = np.concatenate([styles.bigram, styles.unigram[:, None]], axis=1)
        motif = np.broadcast_to(styles.motif[:, None], (*letter.shape[:2], len(MOTIFS)))
        share = self.motif_probability
        both = np.concatenate([(1 - share) * letter, share * motif], axis=-1)
        rows = both.reshape(-1, both.shape[-1]).cumsum(axis=-1)
        return (np.minimum(rows, 1) + np.arange(len(rows))[:, None]).ravel()

    def log_likelihood(self, letters: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Compute exact log-likelihoods (B, S), in nats, of blocks (B, L) with lengths (B,)."""
        order = np.argsort(-lengths, kind="stable")
        found = np.empty((len(letters), len(self.styles.motif)))
        for i in range(0, len(order), CHUNK):
            rows = order[i : i + CHUNK]
            found[rows] = self._forward(letters[rows], lengths[rows])
        return found

    def _forward(self, letters: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Run the scaled forward algorithm on blocks sorted from the longest to the shortest."""
        found = np.zeros((len(self.styles.motif), len(letters)))
        state = np.repeat(self.first, len(letters), axis=1)
        for i in range(lengths[0]):
            active = int((lengths > i).sum())
            if i:
                state = self.after(state[:, :active])
            state *= self.emission[letters[:active, i]][:, None]
            total = state.sum((-1, -2))
            state /= total[..., None, None]
            found[:, :active] += np.log(total)
        return found.T

    def letter_shares(self, steps: int = 256) -> np.ndarray:
        """Compute the shares (S, 16) of the observed letters in a long block."""
        state = self.first
        for _ in range(steps):
            state = self.after(state)
        return state[:, 0].sum(1) @ self.emission


@dataclass(frozen=True, kw_only=True)
class SymbolSoup:
    """The options of the task; `make` draws examples and `measure` judges predictions.

    Examples have min_tokens to max_tokens tokens; `spaced` puts a white-space token between all
    others. Raises SessaError, naming the option, for options that cannot be used.
    """

    name: ClassVar[str] = "symbolsoup"
    easy_options: ClassVar[tuple[str, ...]] = ("noise_min=0", "noise_max=0", "flip_probability=0")

    min_tokens: int = 400
    max_tokens: int = 600
    train_examples: int = 20000
    validation_examples: int = 2000
    test_examples: int = 2000
    noise_min: float = 0.3
    noise_max: float = 0.6
    flip_probability: float = 0.03
    motif_probability: float = 0.3
    spaced: bool = True
    style_seed: int = 0
    data_seed: int = 0

    def __post_init__(self) -> None:
        for option in ("style_seed", "data_seed"):
            require(self, option, getattr(self, option) >= 0, "at least 0")
        for option in ("train_examples", "validation_examples", "test_examples"):
            require(self, option, getattr(self, option) >= 1, "at least 1")
        for option in ("flip_probability", "motif_probability"):
            require(self, option, 0 <= getattr(self, option) < 1, "from 0 to below 1")
        require(self, "noise_min", 0 <= self.noise_min < 1, "from 0 to below 1")
        wanted = f"from noise_min ({self.noise_min}) to below 1"
        require(self, "noise_max", self.noise_min <= self.noise_max < 1, wanted)
        fewest, most = self._letters
        room = fewest > 0 and fewest - round(self.noise_max * fewest) >= 2
        require(self, "min_tokens", room, "larger: each of the two blocks needs a letter")
        wanted = f"at least min_tokens ({self.min_tokens})"
        require(
            self, "max_tokens", most >= fewest, f"{wanted}, with an example's length in between"
        )

    @property
    def _stride(self) -> int:
        return 2 if self.spaced else 1

    @property
    def _letters(self) -> tuple[int, int]:
        """Fewest and most letters of an example."""
        stride = self._stride
        return -(-(self.min_tokens - 1) // stride) + 1 - MARKS, self._most_slots - MARKS

    @property
    def _most_slots(self) -> int:
        return (self.max_tokens - 1) // self._stride + 1

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Special tokens, then the letters, then the labels."""
        labels = (f"left{i}/right{j}" for i in range(LEFT) for j in range(RIGHT))
        return (*SPECIAL, *ALPHABET, *labels)

    @property
    def context(self) -> int:
        """Length of the longest example, in tokens."""
        return (self._most_slots - 1) * self._stride + 1

    @cached_property
    def process(self) -> Process:
        """The model that draws the letters of a block."""
        return Process(new_styles(self.style_seed), self.motif_probability, self.flip_probability)

    def make(self, split: str, count: int, seed: Sequence[int]) -> Examples:
        """Draw `count` examples with balanced labels; all splits have the same distribution.

        The metadata are `label`, `left` and `right` (the styles), `left_first` (whether the left
        style comes first), the blocks' `starts` (N, 2) in tokens and `lengths` (N, 2) in letters,
        in the order of the example, and `tokens` (N,), the length of the example.
        """
        rng = np.random.default_rng([*seed])
        label = rng.permutation(np.arange(count) % (LEFT * RIGHT))
        left, right = np.divmod(label, RIGHT)
        left_first = rng.integers(0, 2, count)
        fewest, most = self._letters
        letters = rng.integers(fewest, most + 1, count)
        noise = np.rint(letters * rng.uniform(self.noise_min, self.noise_max, count)).astype(int)
        left_length = rng.integers(1, letters - noise)
        lengths = np.stack([left_length, letters - noise - left_length], axis=1)
        styles = np.stack([left, LEFT + right], axis=1)
        flip = left_first == 0
        lengths[flip], styles[flip] = lengths[flip, ::-1], styles[flip, ::-1]
        cuts = np.sort(rng.integers(0, noise[:, None] + 1, (count, 2)), axis=1)
        slots, starts = self._lay_out(rng, lengths, styles, cuts, letters)
        slots[np.arange(count), letters + MARKS - 1] = FIRST_LABEL + label
        tokens = self._spread(slots, letters + MARKS)
        last = (letters + MARKS - 1) * self._stride
        weights = np.zeros(tokens.shape, np.float32)
        weights[np.arange(count), last] = 1
        metadata = {
            "label": label,
            "left": left,
            "right": right,
            "left_first": left_first,
            "starts": starts * self._stride,
            "lengths": lengths,
            "tokens": last + 1,
        }
        return Examples(tokens, weights, metadata)

    def _lay_out(
        self,
        rng: np.random.Generator,
        lengths: np.ndarray,
        styles: np.ndarray,
        cuts: np.ndarray,
        letters: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens (N, slots) without white space and label, and the blocks' starts (N, 2)."""
        rows = np.arange(len(letters))
        slots = rng.integers(FIRST_LETTER, FIRST_LABEL, (len(rows), self._most_slots))
        before = np.stack([np.zeros_like(letters), lengths[:, 0] + 2], axis=1)
        starts = 2 + before + cuts
        width = int(lengths.max())
        blocks = self.process.draw(rng, styles.ravel(), width).reshape(len(rows), 2, width)
        for i in range(2):
            row, at = np.nonzero(np.arange(width) < lengths[:, i, None])
            slots[row, starts[row, i] + at] = FIRST_LETTER + blocks[row, i, at]
            slots[rows, starts[:, i] - 1] = SEP1
            slots[rows, starts[:, i] + lengths[:, i]] = SEP2
        slots[:, 0] = BOS
        slots[rows, letters + MARKS - 2] = SEP
        return slots, starts

    def _spread(self, slots: np.ndarray, used: np.ndarray) -> np.ndarray:
        """Spread the used slots over tokens (N, context), with white space and padding."""
        tokens = np.full((len(slots), self.context), SPACE, np.int32)
        tokens[:, :: self._stride] = slots
        tokens[np.arange(self.context) > (used[:, None] - 1) * self._stride] = PAD
        return tokens

    def _blocks(self, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
        """Return the blocks' letters (2N, L), arbitrary after the end, and their lengths (2N,)."""
        lengths = examples.metadata["lengths"].reshape(-1)
        starts = examples.metadata["starts"].reshape(-1, 1)
        at = starts + self._stride * np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)
        rows = np.repeat(np.arange(len(examples.tokens)), 2)[:, None]
        return examples.tokens[rows, at] - FIRST_LETTER, lengths

    def bayes_posterior(self, examples: Examples) -> np.ndarray:
        """Compute the exact label probabilities (N, 20), given the blocks but not their order."""
        return _posterior(self.process.log_likelihood(*self._blocks(examples)))

    def unigram_posterior(self, examples: Examples) -> np.ndarray:
        """Compute the label probabilities (N, 20) of a reader that only counts letters."""
        letters, lengths = self._blocks(examples)
        inside = np.arange(letters.shape[1]) < lengths[:, None]
        counts = [((letters == letter) & inside).sum(1) for letter in range(LETTERS)]
        return _posterior(np.stack(counts, axis=1) @ np.log(self.process.letter_shares()).T)

    def measure(self, examples: Examples, predicted: np.ndarray) -> dict[str, Any]:
        """Return the accuracy of predicted (N, T), by label and by style, and reference accuracies.

        `ceiling` is the accuracy of the exact Bayes decoder on these examples, `ceiling_error` its
        standard error, `unigram` the accuracy of a reader that counts letters, `chance` that of a
        uniform guess.
        """
        metadata, rows = examples.metadata, np.arange(len(examples.tokens))
        label = predicted[rows, metadata["tokens"] - 1] - FIRST_LABEL
        # A token that is no label counts as wrong for both styles.
        left, right = np.divmod(np.where((label >= 0) & (label < LEFT * RIGHT), label, -1), RIGHT)
        valid = left >= 0
        ceiling = np.mean(self.bayes_posterior(examples).argmax(1) == metadata["label"])
        unigram = np.mean(self.unigram_posterior(examples).argmax(1) == metadata["label"])
        return {
            "accuracy": float(np.mean(label == metadata["label"])),
            "examples": len(rows),
            "ceiling": float(ceiling),
            "ceiling_error": float(np.sqrt(ceiling * (1 - ceiling) / len(rows))),
            "unigram": float(unigram),
            "chance": 1 / (LEFT * RIGHT),
            "left_accuracy": float(np.mean(valid & (left == metadata["left"]))),
            "right_accuracy": float(np.mean(valid & (right == metadata["right"]))),
        }


def _posterior(scores: np.ndarray) -> np.ndarray:
    """Combine the log-likelihoods (2N, 9) of both blocks to label probabilities (N, 20)."""
    first, second = scores.reshape(-1, 2, LEFT + RIGHT).swapaxes(0, 1)
    in_order = first[:, :LEFT, None] + second[:, None, LEFT:]
    swapped = second[:, :LEFT, None] + first[:, None, LEFT:]
    joint = np.logaddexp(in_order, swapped).reshape(len(first), LEFT * RIGHT)
    return _normalized(np.exp(joint - joint.max(axis=1, keepdims=True)))
