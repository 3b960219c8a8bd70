"""Speculative decoding: the same tokens for a seed, the exact distribution, a consistent cache."""

from __future__ import annotations

import numpy as np
import pytest
from support.decoders import HostDecoder
from support.export_models import small_config

import sessa_export.runtime
import sessa_mlx.decoding
import sessa_torch.decoding
from sessa_common.config import SessaConfig
from sessa_common.data.tokenizer import byte_tokenizer, train_bpe
from sessa_common.errors import SessaError
from sessa_common.inference.generation import generate
from sessa_common.inference.sampling import SamplingConfig
from sessa_common.inference.speculation import (
    DraftModel,
    PromptLookup,
    SpeculativeDecoder,
    require_same_tokens,
    speculate,
)
from sessa_export.exporter import export_checkpoint

GREEDY = SamplingConfig(temperature=0)
RUNTIMES = ["torch", "mlx", "onnx"]
PROMPT = list(b"The feedback solve")


@pytest.fixture(scope="module")
def trained_decoders(trained_models, tmp_path_factory) -> dict[str, tuple]:
    """The trained model and its draft model in every runtime."""
    exported = tmp_path_factory.mktemp("exported")
    for folder in trained_models:
        export_checkpoint(folder, exported / folder.name)
    return {
        "torch": tuple(map(sessa_torch.decoding.load_decoder, trained_models)),
        "mlx": tuple(map(sessa_mlx.decoding.load_decoder, trained_models)),
        "onnx": tuple(
            sessa_export.runtime.load_decoder(exported / folder.name) for folder in trained_models
        ),
    }


def collect(decoder, prompt, sampling=GREEDY, max_tokens=60) -> list[int]:
    return [step[0] for step in generate(decoder, [prompt], sampling, max_tokens=max_tokens)]


# In PyTorch all, elsewhere these.
FEWER = ("draft 5", "lookup 3")


def speculations(decoders: dict, name: str) -> dict[str, SpeculativeDecoder]:
    model, draft = decoders[name]
    found = {
        "draft 1": speculate(model, draft=draft, draft_tokens=1),
        "draft 5": speculate(model, draft=draft, draft_tokens=5),
        "lookup 3": speculate(model, prompt_lookup=3),
        "lookup 10": speculate(model, prompt_lookup=10),
    }
    return found if name == "torch" else {how: found[how] for how in FEWER}


@pytest.fixture(scope="module")
def greedy_tokens(trained_decoders) -> dict[str, list[int]]:
    """500 greedy tokens of every runtime, without speculation."""
    return {name: collect(trained_decoders[name][0], PROMPT, max_tokens=500) for name in RUNTIMES}


@pytest.mark.parametrize("name", RUNTIMES)
def test_500_greedy_tokens_are_those_without_speculation(
    trained_decoders, greedy_tokens, name: str
) -> None:
    want = greedy_tokens[name]
    assert len(want) == 500 and len({tuple(want[i : i + 8]) for i in range(492)}) > 400
    for how, decoder in speculations(trained_decoders, name).items():
        assert collect(decoder, PROMPT, max_tokens=500) == want, how
        assert 0 < decoder.acceptance.accepted < decoder.acceptance.guessed, how
        assert decoder.acceptance.rounds < 499, how


def test_500_greedy_tokens_are_the_same_in_every_runtime(greedy_tokens) -> None:
    rows = list(greedy_tokens.values())
    assert rows[0] == rows[1] == rows[2]


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=["plain", "filters"],
)
def test_a_seed_draws_the_tokens_that_it_draws_without_speculation(
    trained_decoders, name: str, options: dict
) -> None:
    sampling = SamplingConfig(**options)
    want = collect(trained_decoders[name][0], PROMPT, sampling, 150)
    for how, decoder in speculations(trained_decoders, name).items():
        assert collect(decoder, PROMPT, sampling, 150) == want, how
        assert decoder.acceptance.accepted > 0, how


class Chain(HostDecoder):
    """A Markov chain: the last token alone decides the probabilities of the next."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = np.log(table)
        self.config = SessaConfig(vocab_size=len(table), max_position_embeddings=64)
        self.reset()

    def reset(self) -> None:
        self.length = 0

    def trim(self, count: int) -> None:
        self.length -= count

    def logits(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        self.length += tokens.shape[1]
        return self.table[tokens]

    def step(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        self.last = self.logits(tokens)[:, -1]
        return self.last


class Parrot:
    """Guesses one token again and again."""

    def guess(self, text, count, draw):
        return [2] * count


# Of the chi-squared distribution with 26 degrees of freedom: exceeded with probability 0.001.
LARGEST_CHI_SQUARED, DEGREES = 54.05, 26


def chi_squared(table: np.ndarray, make, sampling: dict, runs: int = 6000) -> float:
    """Compare how often each text of three tokens is drawn with its probability."""
    counts = np.zeros((3, 3, 3))
    decoder = make(Chain(table))
    for seed in range(runs):
        rules = SamplingConfig(**sampling, seed=seed)
        counts[tuple(collect(decoder, [0], rules, 3))] += 1
    sharp = table ** (1 / sampling["temperature"])
    p = sharp / sharp.sum(-1, keepdims=True)
    expected = runs * p[0][:, None, None] * p[:, :, None] * p[None]
    return float(((counts - expected) ** 2 / expected).sum())


TABLE = np.array([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.35, 0.4, 0.25]])
GUESSERS = {
    "none": lambda chain: chain,
    "draft": lambda chain: speculate(chain, draft=Chain(TABLE[::-1]), draft_tokens=2),
    "same": lambda chain: speculate(chain, draft=Chain(TABLE), draft_tokens=2),
    "lookup": lambda chain: speculate(chain, prompt_lookup=2),
    "parrot": lambda chain: SpeculativeDecoder(chain, Parrot(), 2),
}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("guesser", GUESSERS)
def test_sampled_texts_have_their_probabilities(guesser: str, temperature: float) -> None:
    found = chi_squared(TABLE, GUESSERS[guesser], {"temperature": temperature})
    assert found < LARGEST_CHI_SQUARED


class Gullible(SpeculativeDecoder):
    """Keeps every guess, which is what speculation must not do."""

    def _check(self, token, count, chooser):
        guesses = self.guesser.guess(np.append(self.text, token), count, None)
        self.logits(np.array([[token, *guesses]]))
        return [*guesses, 0]


def test_the_statistic_finds_a_wrong_distribution() -> None:
    wrong = chi_squared(TABLE, lambda chain: Gullible(chain, Parrot(), 1), {"temperature": 1.0})
    assert wrong > 10 * LARGEST_CHI_SQUARED


def test_guesses_that_are_always_right_are_all_kept() -> None:
    decoder = GUESSERS["same"](Chain(TABLE))
    collect(decoder, [0], SamplingConfig(temperature=1.0), 31)
    assert decoder.acceptance.rate == 1
    assert (decoder.acceptance.rounds, decoder.acceptance.guessed) == (10, 20)


@pytest.mark.parametrize("taken", range(1, 9))
def test_closing_leaves_every_token_but_the_last_in_the_cache(trained_decoders, taken: int) -> None:
    model, draft = trained_decoders["torch"]
    want = collect(model, PROMPT, max_tokens=40)
    decoder = speculate(model, draft=draft, draft_tokens=4)
    decoder.reset()
    decoder.feed(np.array([PROMPT]))
    drawn = decoder.draw(GREEDY, 40)
    begun = [int(next(drawn)[0]) for _ in range(taken)]
    drawn.close()
    assert decoder.length == model.length == len(PROMPT) + taken - 1
    with pytest.raises(SessaError, match="feed a token"):
        next(decoder.draw(GREEDY, 1))
    decoder.feed(np.array([begun[-1:]]))
    assert begun + [int(ids[0]) for ids in decoder.draw(GREEDY, 40 - taken)] == want
    assert decoder.length == len(PROMPT) + 39


def guess(text: str, count: int) -> str:
    found = PromptLookup().guess(np.array(list(text.encode()), np.int64), count, None)
    return bytes(found).decode()


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("the cat sat, the c", 4, "at s"),
        ("one two, one too, one t", 3, "oo,"),  # the last of two places
        ("abc1 xbc2 abc", 2, "1 "),  # the longest match first
        ("abababa", 5, "babab"),  # a repeated text goes on
        ("abcdef", 5, ""),
        ("a", 5, ""),
        ("the cat sat, the c", 0, ""),
    ],
)
def test_lookup(text: str, count: int, expected: str) -> None:
    assert guess(text, count) == expected


def test_a_draft_model_stops_at_the_end_of_its_context() -> None:
    chain, draft = Chain(TABLE), Chain(TABLE)
    draft.config = SessaConfig(vocab_size=3, max_position_embeddings=16)
    decoder = speculate(chain, draft=draft, draft_tokens=3)
    assert len(collect(decoder, [0], max_tokens=60)) == 60
    assert draft.length <= 16 < decoder.length


def mamba_model(framework, **changes):
    config = small_config(
        layer_kinds=("sessa", "mamba2"), mamba_d_state=12, mamba_d_head=16, **changes
    )
    return framework.Decoder(framework.SessaForCausalLM(config))


@pytest.mark.parametrize("framework", [sessa_torch.decoding, sessa_mlx.decoding])
def test_a_stack_with_mamba2_is_refused(framework) -> None:
    recurrent, chain = mamba_model(framework), Chain(TABLE)
    with pytest.raises(SessaError, match="layer 1 of the model is mamba2, whose state cannot be"):
        speculate(recurrent, prompt_lookup=3)
    chain.config = recurrent.config
    with pytest.raises(SessaError, match="layer 1 of the draft model is mamba2"):
        DraftModel(recurrent)


def test_what_cannot_speculate_is_refused() -> None:
    chain = Chain(TABLE)
    cases = [
        ({}, "give `draft_model` or `prompt_lookup`"),
        ({"draft": chain, "prompt_lookup": 3}, "one of them"),
        ({"prompt_lookup": -1}, "prompt_lookup is -1"),
        ({"draft": chain, "draft_tokens": 0}, "draft_tokens is 0"),
        ({"draft": Chain(np.full((4, 4), 0.25))}, "vocabulary of 3 and the draft model one of 4"),
    ]
    for options, message in cases:
        with pytest.raises(SessaError, match=message):
            speculate(chain, **options)
    with pytest.raises(SessaError, match="one prompt at a time; 2 were given"):
        list(generate(speculate(chain, prompt_lookup=2), [[0], [1]], GREEDY, max_tokens=3))


def test_a_draft_model_of_another_tokenizer_is_refused() -> None:
    require_same_tokens(byte_tokenizer(), byte_tokenizer(), "a")
    other = train_bpe(["some text"], 257)
    with pytest.raises(SessaError, match="a: its tokenizer differs from the model's at token id 0"):
        require_same_tokens(byte_tokenizer(), other, "a")
