"""A server of a folder in this process, over a real socket."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import openai

import sessa_export.runtime
import sessa_mlx.decoding
import sessa_torch.decoding
from sessa_common.serving.app import Service
from sessa_common.serving.http_server import bind, serve

RUNTIMES = {"torch": sessa_torch.decoding, "mlx": sessa_mlx.decoding, "onnx": sessa_export.runtime}


class Server:
    """A running server: its address, its service, and clients of it."""

    def __init__(self, service: Service, port: int) -> None:
        self.service, self.url = service, f"http://127.0.0.1:{port}"

    def client(self, key: str = "none", retries: int = 0) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=retries, timeout=120
        )


@contextmanager
def running_server(folder: Path, runtime: str, **options) -> Iterator[Server]:
    """Serve a folder by a thread until the block ends; `options` are those of `Service.open`."""
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    opened: list[Service] = []
    ready = threading.Event()

    def run() -> None:
        try:
            opened.append(Service.open(folder, RUNTIMES[runtime].load_decoder(folder), **options))
            ready.set()
            serve(opened[0], listener)
        finally:
            ready.set()
            # MLX aborts the process at its end if a thread that used it leaves its streams.
            mx.clear_streams()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    try:
        yield Server(opened[0], port)
    finally:
        opened[0].engine.close()
        thread.join()
