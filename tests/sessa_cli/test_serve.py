"""The server, asked by the official client over a real socket, in every runtime."""

from __future__ import annotations

import json
import random
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from support.export_models import small_config, write_checkpoint
from support.in_process import fails
from support.servers import RUNTIMES, Server, running_server
from support.trained_models import TEXT

from sessa_common.inference.generation import generate
from sessa_common.inference.sampling import SamplingConfig
from sessa_common.serving.engine import Engine
from sessa_export.exporter import export_checkpoint

PROMPTS = ["The feedback", "ab", "one row more, and a longer one", "x", "The feedback of a"]
LETTERS = {str(i): -100 for i in range(257) if not 97 <= i < 123}
# Greedy answers, by prompt.
Answers = dict[str, bytes]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("serve")
    checkpoint, _ = write_checkpoint(root / "first", small_config("untied"))
    export_checkpoint(checkpoint, root / "exported")
    return {"torch": checkpoint, "mlx": checkpoint, "onnx": root / "exported"}


@pytest.fixture(scope="module")
def server(folders) -> Iterator[Server]:
    with running_server(folders["torch"], "torch", max_waiting=2, batch_size=2) as found:
        yield found


@pytest.fixture
def client(server) -> openai.OpenAI:
    return server.client()


def answers_alone(folder: Path, runtime: str, prompts: list[str], count: int) -> Answers:
    decoder = RUNTIMES[runtime].load_decoder(folder)
    sampling, stop = SamplingConfig(temperature=0), {256}

    def answer(prompt: str) -> bytes:
        ids = [list(prompt.encode())]
        return bytes(i[0] for i in generate(decoder, ids, sampling, max_tokens=count, stop=stop))

    return {prompt: answer(prompt) for prompt in prompts}


def ask(server: Server, alone: Answers, count: int, seconds: float = 0) -> tuple[int, int]:
    """Ask by eight clients at once and compare every greedy answer; count answers and tokens."""
    until, name = time.monotonic() + seconds, server.service.name

    def one_client(number: int) -> tuple[int, int]:
        rng, client = random.Random(number), server.client()
        answers = tokens = 0
        while answers == 0 or time.monotonic() < until:
            prompt, limit = rng.choice(list(alone)), rng.randint(1, count)
            fields = {"model": name, "prompt": prompt, "temperature": 0, "max_tokens": limit}
            if rng.random() < 0.5:
                chunks = client.completions.create(stream=True, **fields)
                text = "".join(chunk.choices[0].text for chunk in chunks)
            else:
                text = client.completions.create(**fields).choices[0].text
            assert text == alone[prompt][:limit].decode(errors="replace"), (prompt, limit)
            answers, tokens = answers + 1, tokens + limit
            if rng.random() < 0.2:  # One more that is left before its end.
                drawn = {**fields, "temperature": 1}
                with client.completions.create(stream=True, **drawn) as left:
                    next(iter(left))
        return answers, tokens

    with ThreadPoolExecutor(8) as clients:
        counts = list(clients.map(one_client, range(8)))
    return sum(a for a, _ in counts), sum(t for _, t in counts)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_eight_clients_at_once(folders, runtime: str) -> None:
    alone = answers_alone(folders[runtime], runtime, PROMPTS, 24)
    with running_server(folders[runtime], runtime) as server:
        assert ask(server, alone, 24)[0] == 8
        assert server.client().models.list().data[0].id == folders[runtime].name


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_eight_clients_for_a_minute(trained_models, tmp_path, runtime: str) -> None:
    folder, _ = trained_models
    if runtime == "onnx":
        export_checkpoint(folder, tmp_path / "exported")
        folder = tmp_path / "exported"
    rng = random.Random(0)
    starts = [rng.randrange(len(TEXT) - 300) for _ in range(40)]
    prompts = [TEXT[start : start + rng.randint(1, 300)] for start in starts]
    alone = answers_alone(folder, runtime, prompts, 120)
    began = time.monotonic()
    with running_server(folder, runtime) as server:
        answers, tokens = ask(server, alone, 120, seconds=60)
        seconds = time.monotonic() - began
    print(f"\n{runtime}: {answers} answers, {tokens / seconds:.0f} tokens/s in {seconds:.0f} s")
    assert answers > 20


def test_a_seed_gives_one_text_whatever_runs_beside_it(client) -> None:
    fields = {"model": "first", "prompt": "The feedback", "seed": 5, "max_tokens": 20, "n": 2}
    first = [choice.text for choice in client.completions.create(**fields).choices]
    with ThreadPoolExecutor(2) as others:
        beside = others.submit(
            client.completions.create, model="first", prompt="xyz", max_tokens=60
        )
        again = client.completions.create(**fields)
        assert beside.result().usage.completion_tokens <= 60
    assert [choice.text for choice in again.choices] == first and first[0] != first[1]


def test_a_chat_goes_on_from_the_cache_of_its_last_turn(client) -> None:
    said = [{"role": "user", "content": "Hello, how is it going?"}]
    fields = {"model": "first", "temperature": 0, "max_tokens": 8, "logit_bias": LETTERS}
    answer = client.chat.completions.create(messages=said, **fields)
    message = answer.choices[0].message
    assert message.role == "assistant" and answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    said += [{"role": "assistant", "content": message.content}, {"role": "user", "content": "Go"}]
    turn = client.chat.completions.create(messages=said, **fields)
    assert turn.usage.prompt_tokens_details.cached_tokens > len("Hello, how is it going?")


def test_the_pieces_of_a_stream(client) -> None:
    fields = {"model": "first", "messages": [{"role": "user", "content": "Hi"}], "seed": 1}
    fields |= {"max_tokens": 6, "logit_bias": LETTERS, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**fields)
    *chunks, last = client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **fields
    )
    assert (
        chunks[0].choices[0].delta.role == "assistant" and chunks[1].choices[0].delta.role is None
    )
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said == whole.choices[0].message.content and len(said) == 6
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens == 6
    tokens = [t for chunk in chunks if (p := chunk.choices[0].logprobs) for t in p.content]
    expected = whole.choices[0].logprobs.content
    # The second prompt comes from the cache, which is rounded otherwise.
    assert [t.logprob for t in tokens] == pytest.approx([t.logprob for t in expected], abs=1e-4)
    assert [t.token for t in tokens] == list(said) and len(tokens[0].top_logprobs) == 2


def test_stop_texts_and_schemas(client) -> None:
    fields = {"model": "first", "prompt": "The", "temperature": 0, "max_tokens": 30}
    text = client.completions.create(**fields, logit_bias=LETTERS).choices[0].text
    cut = client.completions.create(**fields, logit_bias=LETTERS, stop=[text[4:6]]).choices[0]
    assert cut.text == text[: text.index(text[4:6])] and cut.finish_reason == "stop"
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Ada", "Zoe"]}},
        "required": ["name"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="first",
        messages=[{"role": "user", "content": "Who?"}],
        response_format={"type": "json_schema", "json_schema": {"name": "who", "schema": schema}},
    )
    assert json.loads(answer.choices[0].message.content)["name"] in ("Ada", "Zoe")
    assert answer.choices[0].finish_reason == "stop"


def test_several_prompts_and_ids(client) -> None:
    fields = {"model": "first", "temperature": 0, "max_tokens": 5, "logprobs": 1}
    both = client.completions.create(prompt=["The", "ab"], **fields)
    ids = client.completions.create(prompt=[97, 98], **fields).choices[0]
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[1].text == ids.text and len(ids.logprobs.tokens) == 5
    assert both.usage.prompt_tokens == 5 and both.usage.completion_tokens == 10


def test_errors_are_those_of_the_api(client) -> None:
    with pytest.raises(openai.BadRequestError, match="reads at most 300") as long:
        client.completions.create(model="first", prompt="x" * 301)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="this server has 'first'"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.NotFoundError, match="this server has 'first'"):
        client.models.retrieve("other")
    with pytest.raises(openai.BadRequestError, match="n is 3"):
        client.completions.create(model="first", prompt="x", n=3)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="first", input="x")
    with pytest.raises(openai.RateLimitError, match="too many requests wait"):
        client.completions.create(model="first", prompt=["x", "y", "z"])
    assert client.models.retrieve("first").owned_by == "sessa"


@pytest.mark.parametrize(
    ("content", "kind", "status", "says"),
    [
        (b"{", "application/json", 400, "no JSON"),
        (b"[]", "application/json; charset=utf-8", 400, "expected a JSON object"),
        (b'{"model": "first", "model": "first"}', "application/json", 400, "appears twice"),
        (b"\xff", "application/json", 400, "no JSON"),
        (b"[" * 100_000, "application/json", 400, "nested too deeply"),
        (b"{}", "text/plain", 415, "Content-Type must be"),
        (b" " * (2**22 + 1), "application/json", 413, "more than 4,194,304 bytes"),
    ],
)
def test_bodies_that_are_refused(server, content, kind, status, says) -> None:
    url = f"{server.url}/v1/completions"
    answer = httpx.post(url, content=content, headers={"Content-Type": kind})
    assert answer.status_code == status and says in answer.json()["error"]["message"]


def test_a_page_of_another_site_is_refused(server) -> None:
    """A site can have its own name lead to 127.0.0.1; the header Host then betrays it."""
    answer = httpx.get(f"{server.url}/v1/models", headers={"Host": "evil.example"})
    assert answer.status_code == 403 and "evil.example" in answer.json()["error"]["message"]
    assert httpx.get(f"{server.url}/v1/models", headers={"Host": "[::1"}).status_code == 403
    name = f"localhost:{server.url.rpartition(':')[2]}"
    assert httpx.get(f"{server.url}/v1/models", headers={"Host": name}).status_code == 200


def test_a_key(folders) -> None:
    with running_server(folders["torch"], "torch", api_key="secret") as server:
        for key in ("wrong", "", "secret2"):
            with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
                server.client(key or "none").models.list()
        assert server.client("secret").models.list().data[0].id == "first"
        assert httpx.get(f"{server.url}/health").json()["status"] == "ok"


def wait_for(server: Server, running: int, waiting: int = 0) -> None:
    until = time.monotonic() + 20
    while httpx.get(f"{server.url}/health").json() != {
        "status": "ok",
        "running": running,
        "waiting": waiting,
    }:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_the_row_of_a_client_that_goes_away_leaves(server, stream: bool, monkeypatch) -> None:
    monkeypatch.setattr(Engine, "turn", slow_turn)
    fields = {"model": "first", "prompt": "x", "max_tokens": 250, "stream": stream, "n": 2}
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as reader:
        body = json.dumps(fields).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        reader.sendall(head.encode() + b"\r\nContent-Type: application/json\r\n\r\n" + body)
        wait_for(server, running=2)
    wait_for(server, running=0)


TURN = Engine.turn


def slow_turn(engine: Engine) -> bool:
    """A turn that leaves time to look at the server."""
    time.sleep(0.02)
    return TURN(engine)


def test_a_failure_is_said_without_its_reason(server, client, monkeypatch, caplog) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("a secret of the machine")

    fields = {"model": "first", "prompt": "a prompt that no cache has", "max_tokens": 3}
    with monkeypatch.context() as patch:
        patch.setattr(type(server.service.engine._empty), "step", broken)
        with pytest.raises(openai.InternalServerError, match="its log says why") as failed:
            client.completions.create(**fields)
    assert "secret" not in str(failed.value) and "a secret of the machine" in caplog.text
    assert client.completions.create(**fields).usage.completion_tokens <= 3


def test_a_server_that_stops_ends_its_streams(folders, monkeypatch) -> None:
    monkeypatch.setattr(Engine, "turn", slow_turn)
    fields = {"model": "first", "prompt": "x", "max_tokens": 250, "stream": True}
    with running_server(folders["torch"], "torch") as server:
        stream = server.client().completions.create(**fields)
        next(iter(stream))
        server.service.engine.close()
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)


def test_what_cannot_be_served_is_said_before_the_model_is_loaded(
    folders, capsys, monkeypatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = fails(capsys, "serve", folders["torch"], "--port", port)
        assert f"cannot listen at 127.0.0.1, --port {port}" in said
    assert "--api-key is ''" in fails(capsys, "serve", folders["torch"], "--api-key", "")
    assert "--prefix-cache is 'x'" in fails(
        capsys, "serve", folders["torch"], "--prefix-cache", "x"
    )
    monkeypatch.setitem(sys.modules, "sessa_common.serving.app", None)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "sessa_common.serving.http_server")
    said = fails(capsys, "serve", folders["torch"])
    assert "pip install 'sessa-toolchain[serve]'" in said
