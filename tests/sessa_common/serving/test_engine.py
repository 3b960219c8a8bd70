"""The engine: requests join and leave, and each is answered as if it were alone."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from support.export_models import small_config, write_checkpoint

from sessa_common.errors import SessaError
from sessa_common.inference.generation import generate
from sessa_common.inference.logit_rules import LogitRules, prepare_rules
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_common.inference.sampling import SamplingConfig
from sessa_common.serving.engine import (
    Engine,
    EngineClosedError,
    EngineFullError,
    Request,
)
from sessa_common.serving.prefixes import PrefixCache
from sessa_torch.decoding import load_decoder

TOP = SamplingConfig(temperature=0)
PROMPTS = [b"The feedback", b"ab", b"one row more, and a longer one", b"x", b"The feedback of a"]


class Record:
    """A sink that keeps what it gets; a text ends early at a token of `stop_at`."""

    def __init__(self, stop_at: int = -1) -> None:
        self.stop_at = stop_at
        self.texts: dict[int, list[int]] = {}
        self.ends: dict[int, str] = {}
        self.error: Exception | None = None

    def token(self, index: int, token: int, logits: np.ndarray) -> bool:
        assert logits.shape == (257,)
        self.texts.setdefault(index, []).append(token)
        return token == self.stop_at

    def end(self, index: int, reason: str) -> None:
        assert index not in self.ends
        self.ends[index] = reason

    def fail(self, error: Exception) -> None:
        assert self.error is None
        self.error = error


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("engine") / "m", small_config("untied"))[0]


@pytest.fixture(scope="module")
def decoder(folder):
    return load_decoder(folder, device="cpu")


def asked(prompt: bytes, count: int = 12, sampling: SamplingConfig = TOP, **fields) -> Request:
    fields = {"sink": Record(), **fields}
    return Request(prompt=list(prompt), sampling=sampling, max_tokens=count, **fields)


def alone(decoder, prompt: bytes, count: int, sampling: SamplingConfig, stream: int = 0):
    found = generate(decoder, [list(prompt)], sampling, max_tokens=count, streams=[stream])
    return [ids[0] for ids in found]


def finish(engine: Engine) -> None:
    while engine.turn():
        pass


@pytest.mark.parametrize("prefix_bytes", [0, 2**20])
def test_requests_join_and_leave_and_are_answered_as_alone(decoder, prefix_bytes) -> None:
    engine = Engine(decoder, batch_size=3, prefix_bytes=prefix_bytes)
    requests = []
    for turn in range(20):  # more than the batch has room for, of many lengths
        seeded = SamplingConfig(temperature=0.9, top_p=0.9, seed=turn)
        prompt = PROMPTS[turn % len(PROMPTS)]
        requests.append(asked(prompt, 3 + turn % 8, seeded if turn % 2 else TOP))
        engine.submit([requests[-1]])
        engine.turn()
        assert engine.counts["running"] <= 3
    finish(engine)
    for request in requests:
        expected = alone(decoder, bytes(request.prompt), request.max_tokens, request.sampling)
        assert request.sink.texts == {0: expected} and request.sink.ends == {0: "length"}
    assert any(request.cached for request in requests) == (prefix_bytes > 0)


def test_several_texts_of_one_prompt(decoder) -> None:
    sampling = SamplingConfig(temperature=1, seed=5)
    request = asked(b"several", 8, sampling, n=3)
    engine = Engine(decoder)
    engine.submit([asked(b"beside"), request])
    finish(engine)
    expected = {i: alone(decoder, b"several", 8, sampling, stream=i) for i in range(3)}
    assert request.sink.texts == expected
    assert len(set(map(tuple, expected.values()))) == 3


def test_a_text_ends_at_an_end_token_or_where_the_sink_says(decoder) -> None:
    text = alone(decoder, b"The feedback", 12, TOP)
    end = next(i for i in range(1, 12) if text[i] not in text[:i])
    by_id = asked(b"The feedback", stop=frozenset({text[end]}))
    by_sink = asked(b"The feedback", sink=Record(stop_at=text[end]))
    at_once = asked(b"The feedback", stop=frozenset({text[0]}))
    engine = Engine(decoder)
    engine.submit([by_id, by_sink, at_once])
    finish(engine)
    assert by_id.sink.texts == {0: text[:end]} and by_id.sink.ends == {0: "stop"}
    assert by_sink.sink.texts == {0: text[: end + 1]} and by_sink.sink.ends == {0: "stop"}
    assert at_once.sink.texts == {} and at_once.sink.ends == {0: "stop"}


def test_a_long_prompt_is_read_in_pieces_while_others_are_written(decoder, monkeypatch) -> None:
    monkeypatch.setattr("sessa_common.inference.generation.PREFILL_CHUNK", 16)
    prompt = bytes(range(100))
    expected = alone(decoder, prompt, 4, TOP)
    engine = Engine(copy_with(decoder, prefill_tokens=16))
    first, long = asked(b"first", 20), asked(prompt, 4)
    engine.submit([first])
    engine.turn()
    engine.submit([long])
    engine.turn()
    written = len(first.sink.texts[0])
    for _ in range(5):
        engine.turn()
    assert not long.sink.texts and len(first.sink.texts[0]) == written + 5
    finish(engine)
    assert long.sink.texts == {0: expected}


def copy_with(decoder, **attributes):
    found = decoder.fork()
    vars(found).update(attributes)
    return found


def test_cancelled_requests_leave(decoder) -> None:
    engine = Engine(decoder, batch_size=2)
    requests = [asked(b"one", 50), asked(b"two", 50), asked(b"three", 6), asked(b"four", 6)]
    engine.submit(requests)
    engine.turn()
    engine.turn()
    assert engine.counts == {"running": 2, "waiting": 2}
    engine.cancel(requests[0])
    engine.cancel(requests[3])
    assert engine.counts == {"running": 2, "waiting": 1}
    engine.turn()
    written = len(requests[0].sink.texts[0])
    finish(engine)
    assert len(requests[0].sink.texts[0]) == written < 50 and not requests[0].sink.ends
    assert requests[2].sink.texts == {0: alone(decoder, b"three", 6, TOP)}
    assert len(requests[1].sink.texts[0]) == 50 and requests[3].sink.texts == {}


def test_waiting_requests_are_limited(decoder) -> None:
    engine = Engine(decoder, max_waiting=2)
    with pytest.raises(EngineFullError):
        engine.submit([asked(b"a"), asked(b"b"), asked(b"c")])
    assert engine.counts["waiting"] == 0
    engine.submit([asked(b"a"), asked(b"b")])
    with pytest.raises(EngineFullError):
        engine.submit([asked(b"c")])
    with pytest.raises(SessaError, match="n is 9"):
        engine.submit([asked(b"c", n=9)])


def test_close_ends_run_and_what_it_has_not_answered(decoder) -> None:
    engine = Engine(decoder, batch_size=1)
    started = threading.Event()

    class Starts(Record):
        def token(self, index: int, token: int, logits: np.ndarray) -> bool:
            started.set()
            return False

    requests = [asked(b"one", 200, sink=Starts()), asked(b"two")]
    engine.submit(requests)
    thread = threading.Thread(target=engine.run)
    thread.start()
    assert started.wait(20)
    engine.close()
    thread.join(20)
    assert all(isinstance(r.sink.error, EngineClosedError) for r in requests)
    with pytest.raises(EngineClosedError):
        engine.submit([asked(b"late")])


def test_an_error_ends_the_request_that_has_it(decoder, folder) -> None:
    tokenizer = ModelTokenizer.open(folder, decoder.config)
    rules = LogitRules(logit_bias=dict.fromkeys(range(257), float("-inf")))
    wrong = asked(b"wrong", rules=prepare_rules(rules, tokenizer), n=2)
    right = asked(b"right")
    engine = Engine(decoder)
    engine.submit([right, wrong])
    finish(engine)
    assert "forbids every token" in str(wrong.sink.error)
    assert right.sink.texts == {0: alone(decoder, b"right", 12, TOP)}


@pytest.mark.parametrize("when", ["prompt", "step"])
def test_the_engine_goes_on_after_a_failure(decoder, monkeypatch, when: str) -> None:
    engine = Engine(decoder)
    failed, step = asked(b"failed"), type(decoder).step

    def broken(self, tokens, mask=None):
        if (tokens.shape[1] > 1) == (when == "prompt"):
            raise RuntimeError("out of memory")
        return step(self, tokens, mask)

    monkeypatch.setattr(type(decoder), "step", broken)
    engine.submit([failed])
    finish(engine)
    assert "out of memory" in str(failed.sink.error)
    monkeypatch.undo()
    after = asked(b"after")
    engine.submit([after])
    finish(engine)
    assert after.sink.texts == {0: alone(decoder, b"after", 12, TOP)}


def test_a_prompt_takes_the_longest_cache(decoder) -> None:
    cache = PrefixCache(decoder.config, 2**20)
    for text in (b"The list", b"The feedback", b"other"):
        decoder.reset()
        decoder.feed(np.array([list(text)]))
        cache.add(list(text), decoder, 0)
    found = cache.take(list(b"The feed is"))
    assert found.length == len(b"The feed") and cache.take(list(b"none")) is None
    # At least one id is left to read.
    assert cache.take(list(b"other")).length == 4
    decoder.reset()
    expected = decoder.step(np.array([list(b"The feed is")]))
    np.testing.assert_allclose(found.step(np.array([list(b" is")])), expected, atol=1e-4)


def test_caches_are_limited_and_replaced_by_longer_ones(decoder) -> None:
    one = PrefixCache(decoder.config, 0)._size(10)
    cache = PrefixCache(decoder.config, 2 * one)
    for text in (b"aaaaa", b"aaaaaaaaaa", b"bbbbbbbbbb", b"cccccccccc", b"d" * 30):
        decoder.reset()
        decoder.feed(np.array([list(text)]))
        cache.add(list(text), decoder, 0)
        assert sum(entry.size for entry in cache.entries) <= 2 * one
    assert [bytes(entry.ids) for entry in cache.entries] == [b"bbbbbbbbbb", b"cccccccccc"]


def test_a_state_is_reused_only_where_it_ends(tmp_path) -> None:
    config = small_config("mamba2_hybrid")
    decoder = load_decoder(write_checkpoint(tmp_path, config)[0], device="cpu")
    cache = PrefixCache(config, 2**20)
    decoder.feed(np.array([list(b"The list")]))
    cache.add(list(b"The list"), decoder, 0)
    assert cache.take(list(b"The lists")).length == 8
    assert cache.take(list(b"The line")) is None and cache.take(list(b"The list")) is None
