"""The ASGI application: the OpenAI API over an `Engine`, on starlette."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tokenizers import Tokenizer

from sessa_common.checkpoint.adapters import text_folder
from sessa_common.errors import SessaError
from sessa_common.inference.chat_template import ChatTemplate
from sessa_common.inference.generation import Decoder
from sessa_common.inference.model_tokenizer import ModelTokenizer
from sessa_common.json_files import parse_json
from sessa_common.serving import engine as engines
from sessa_common.serving.answers import AnswerWriter, Piece
from sessa_common.serving.engine import (
    BATCH_SIZE,
    MAX_WAITING,
    Engine,
    EngineClosedError,
    EngineFullError,
)
from sessa_common.serving.replies import Reply, Usage, error_json
from sessa_common.serving.requests import ApiError, Asked, RequestReader

HOST, LOOPBACK = "127.0.0.1", frozenset({"127.0.0.1", "localhost", "::1"})
MAX_REQUEST_BYTES, PREFIX_BYTES = 4 * 2**20, 512 * 2**20
JSON_TYPE = "application/json"

Read = Callable[[dict[str, Any]], Asked]


class Job:
    """The requests of one HTTP request in the engine, and the pieces that come back."""

    def __init__(self, service: Service, asked: Asked) -> None:
        self.engine, self.asked = service.engine, asked
        self.pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.written = 0
        self.requests = [self._request(service, i) for i in range(len(asked.prompts))]

    def _request(self, service: Service, i: int) -> engines.Request:
        asked, prompt = self.asked, self.asked.prompts[i]
        sink = AnswerWriter(
            service.tokenizer,
            prompt,
            asked.n,
            self._emit,
            first=i * asked.n,
            stop_texts=asked.stop_texts,
            likeliest=asked.likeliest,
        )
        return engines.Request(
            prompt=prompt,
            sampling=asked.sampling,
            max_tokens=asked.budgets[i],
            stop=service.stop_ids,
            n=asked.n,
            rules=asked.rules,
            sink=sink,
        )

    def _emit(self, piece: Piece | Exception) -> None:
        # The loop is closed when the server is stopped meanwhile.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

    async def run(self) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of all choices until all have ended; leaving early stops them."""
        running = len(self.requests) * self.asked.n
        try:
            while running:
                piece = await self.pieces.get()
                if isinstance(piece, Exception):
                    # The engine has logged it. Beyond an ApiError the connection would be closed.
                    raise _as_api_error(piece) from None
                if piece.finish is not None:
                    running -= 1
                    self.written += piece.tokens
                yield piece
        finally:
            if running:
                for request in self.requests:
                    self.engine.cancel(request)

    @property
    def usage(self) -> Usage:
        """The numbers of tokens, once all choices have ended."""
        prompt = sum(len(request.prompt) for request in self.requests)
        cached = sum(request.cached for request in self.requests)
        return Usage(prompt, cached, self.written)


class Service:
    """The endpoints for one model of the folder `name`, which `also_named` name too.

    `hosts` are the names that the header Host may have, None for any: a page in a browser may have
    the name of its own site lead to this machine. `api_key` is asked of every request if given.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: ModelTokenizer,
        template: ChatTemplate,
        name: str,
        *,
        also_named: Sequence[str] = (),
        api_key: str | None = None,
        hosts: frozenset[str] | None = None,
        max_request_bytes: int = MAX_REQUEST_BYTES,
    ) -> None:
        self.engine, self.name = engine, name
        self.reader = RequestReader(tokenizer, template, [name, *also_named])
        # The thread that reads requests changes its tokenizer, so the engine's has another one.
        self.tokenizer = Tokenizer.from_str(tokenizer.tokenizer.to_str())
        self.stop_ids = tokenizer.stop_ids
        self.api_key, self.hosts, self.max_request_bytes = api_key, hosts, max_request_bytes
        self.created = int(time.time())
        self.readers = ThreadPoolExecutor(1, "sessa-read")

    @classmethod
    def open(
        cls,
        folder: Path,
        decoder: Decoder,
        *,
        adapter: Path | None = None,
        host: str = HOST,
        api_key: str | None = None,
        batch_size: int = BATCH_SIZE,
        max_waiting: int = MAX_WAITING,
        prefix_bytes: int = PREFIX_BYTES,
        max_request_bytes: int = MAX_REQUEST_BYTES,
    ) -> Service:
        """Serve the model of a folder by a decoder of it; SessaError for what cannot be used.

        The model bears the name of the folder; an `adapter` may have a tokenizer of its own. `host`
        is the address that will be listened at.
        """
        engine = Engine(
            decoder, batch_size=batch_size, max_waiting=max_waiting, prefix_bytes=prefix_bytes
        )
        texts = text_folder(folder, adapter)
        return cls(
            engine,
            ModelTokenizer.open(texts, decoder.config),
            ChatTemplate.open(texts),
            folder.resolve().name,
            also_named=[str(folder)],
            api_key=api_key,
            hosts=LOOPBACK if host in LOOPBACK else None,
            max_request_bytes=max_request_bytes,
        )

    async def health(self, request: Request) -> Response:
        """GET /health: what the engine is doing; needs no key."""
        return JSONResponse({"status": "ok", **self.engine.counts})

    async def models(self, request: Request) -> Response:
        """GET /v1/models: the one model."""
        self._admit(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        self._admit(request)
        name = request.path_params["name"]
        if name not in self.reader.names:
            raise ApiError(
                f"the model {name!r} is not here; this server has {self.name!r}",
                status=404,
                code="model_not_found",
            )
        return JSONResponse(self._model())

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, self.reader.completion)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, self.reader.chat)

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "sessa"}

    def _admit(self, request: Request) -> None:
        """Raise ApiError for a request without the key, or from a page of another site."""
        host = _host_name(request.headers.get("host", ""))
        if self.hosts is not None and host not in self.hosts:
            raise ApiError(
                f"the header Host names {host!r}, but this server answers to "
                f"{', '.join(sorted(self.hosts))} only",
                status=403,
            )
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.api_key is not None and not hmac.compare_digest(
            given.encode(), self.api_key.encode()
        ):
            raise ApiError("the API key is missing or wrong", status=401, code="invalid_api_key")

    async def _answer(self, request: Request, read: Read) -> Response:
        self._admit(request)
        body = await self._body(request)
        # Tokenising a long text and reading a schema take time, in which others are answered.
        asked = await asyncio.get_running_loop().run_in_executor(self.readers, read, body)
        job = Job(self, asked)
        self.engine.submit(job.requests)
        reply = Reply(self.name, asked.chat, asked.likeliest is not None)
        if asked.stream:
            return StreamingResponse(_events(job, reply), media_type="text/event-stream")
        pieces = await _unless_gone(request, _collect(job))
        return JSONResponse(reply.whole(pieces, job.usage))

    async def _body(self, request: Request) -> dict[str, Any]:
        """The JSON object of a request, read no further than the limit."""
        # A page of another site can send a form or a text without asking, but not JSON.
        if request.headers.get("content-type", "").partition(";")[0].strip() != JSON_TYPE:
            raise ApiError(f"the Content-Type must be {JSON_TYPE}", status=415)
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > self.max_request_bytes:
                raise ApiError(
                    f"the request has more than {self.max_request_bytes:,} bytes", status=413
                )
        try:
            body = parse_json(content.decode())
        except ValueError as error:
            raise ApiError(f"the request is no JSON ({error})") from None
        if not isinstance(body, dict):
            raise ApiError(f"the request is a {type(body).__name__}, expected a JSON object")
        return body


def _host_name(header: str) -> str | None:
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None


async def _collect(job: Job) -> list[Piece]:
    return [piece async for piece in job.run()]


async def _unless_gone(request: Request, work: Coroutine[Any, Any, list[Piece]]) -> list[Piece]:
    """Return the result of `work`, which is cancelled when the client goes away."""

    async def wait_for_end() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.create_task(work), asyncio.create_task(wait_for_end())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _events(job: Job, reply: Reply) -> AsyncIterator[str]:
    """The server-sent events of an answer; an error ends it in the place of a piece."""
    async with contextlib.aclosing(job.run()) as pieces:
        try:
            async for piece in pieces:
                yield _event(reply.chunk(piece))
            if job.asked.include_usage:
                yield _event(reply.last_chunk(job.usage))
        except Exception as error:
            yield _event(_as_json(_as_api_error(error)))
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _as_api_error(error: Exception) -> ApiError:
    """The error as the API names it."""
    match error:
        case ApiError():
            return error
        case EngineFullError():
            message = "too many requests wait already; try again later"
            return ApiError(message, status=429, kind="rate_limit_error", code="queue_full")
        case EngineClosedError():
            return ApiError("the server is stopping", status=503, kind="server_error")
        case SessaError():
            return ApiError(str(error))
        case HTTPException():
            return ApiError(error.detail, status=error.status_code)
    return ApiError("the server failed; its log says why", status=500, kind="server_error")


def _as_json(error: ApiError) -> dict[str, Any]:
    return error_json(str(error), error.kind, error.param, error.code)


async def _on_error(request: Request, error: Exception) -> Response:
    found = _as_api_error(error)
    headers = {"Retry-After": "1"} if found.status in (429, 503) else None
    return JSONResponse(_as_json(found), found.status, headers)


async def _on_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


def make_app(service: Service) -> Starlette:
    """Make the ASGI application of a service."""
    routes = [
        Route("/health", service.health),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.model),
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
    ]
    handled: tuple[type[Exception], ...] = (
        ApiError,
        SessaError,
        EngineFullError,
        EngineClosedError,
        HTTPException,
        Exception,
    )
    handlers: dict[Any, Any] = dict.fromkeys(handled, _on_error)
    return Starlette(routes=routes, exception_handlers={**handlers, ClientDisconnect: _on_gone})
