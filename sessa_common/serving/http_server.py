"""The HTTP server: uvicorn in a thread of its own, the engine in the thread that calls."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from sessa_common.errors import SessaError
from sessa_common.serving.app import Service, make_app
from sessa_common.serving.engine import Engine

# Seconds that running answers have to end after the first Ctrl-C or SIGTERM, and those that a
# connection has to take what is left.
GRACE, CLOSING = 10.0, 5


def bind(host: str, port: int) -> socket.socket:
    """Reserve an address before a model is loaded; port 0 takes a free one. Raises SessaError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SessaError(f"cannot listen at {host}, `port` {port} ({reason})") from None


def serve(service: Service, listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, or until the engine of the service is closed.

    After the first signal no connection is taken and running answers may end for GRACE seconds;
    the second one ends them at once.
    """
    engine, app = service.engine, make_app(service)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=int(GRACE) + CLOSING
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=_run, args=(server, engine, listener), name="sessa-http")
    thread.start()
    with _signals(server, engine):
        engine.run()
    server.should_exit = True
    thread.join()


def _run(server: uvicorn.Server, engine: Engine, listener: socket.socket) -> None:
    try:
        server.run(sockets=[listener])
    finally:
        engine.close()


@contextmanager
def _signals(server: uvicorn.Server, engine: Engine) -> Iterator[None]:
    """Let SIGINT and SIGTERM stop the server, where signals can be had."""
    timer = threading.Timer(GRACE, engine.close)
    timer.daemon = True

    def stop(number: int, frame: object) -> None:
        if server.should_exit:
            engine.close()
        else:
            server.should_exit = True
            timer.start()

    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
