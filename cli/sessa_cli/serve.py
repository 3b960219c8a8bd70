"""`sessa serve`: an OpenAI-compatible server for a checkpoint or an exported model."""

from __future__ import annotations

from typing import Annotated

import typer

from sessa_cli import generation_options as options
from sessa_cli.runtimes import open_decoder, say_aside
from sessa_common.checkpoint.conversion import parse_size
from sessa_common.errors import SessaError, expect
from sessa_common.extras import install

INSTALL = install("serve")


def serve(
    context: typer.Context,
    checkpoint: options.Checkpoint,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(help="Key that requests must bring.", envvar="SESSA_API_KEY"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Largest number of texts that are written at once. Default: 8."),
    ] = None,
    max_waiting: Annotated[
        int | None,
        typer.Option(help="Largest number of requests that wait, 64 by default; others get 429."),
    ] = None,
    prefix_cache: Annotated[
        str | None,
        typer.Option(
            help="Memory for the caches of texts, for prompts that begin alike; 0 keeps none. "
            "Default: 512MB."
        ),
    ] = None,
    adapter: options.Adapter = None,
    backend: options.Backend = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    native: options.Native = False,
    no_graphs: options.NoGraphs = False,
) -> None:
    """Answer requests of the OpenAI API (completions, chat, models) until Ctrl-C.

    Example: sessa serve runs/first --port 8000
    """
    try:
        from sessa_common.serving.app import Service
        from sessa_common.serving.http_server import bind
        from sessa_common.serving.http_server import serve as serve_http
    except ImportError as error:
        raise SessaError(
            f"the server needs the package {error.name}, which is not installed; {INSTALL}"
        ) from None
    given = {name: context.params[name] for name in ("batch_size", "max_waiting")}
    given = {name: value for name, value in given.items() if value is not None}
    if prefix_cache is not None:
        given["prefix_bytes"] = (
            0 if prefix_cache == "0" else parse_size(prefix_cache, "prefix_cache")
        )
    expect(api_key != "", "`api_key`", api_key, "a key of at least one character")
    with bind(host, port) as listener:
        decoder = open_decoder(checkpoint, backend, device, dtype, native, no_graphs, adapter)
        service = Service.open(
            checkpoint, decoder, adapter=adapter, host=host, api_key=api_key, **given
        )
        address = f"[{host}]" if ":" in host else host
        url = f"http://{address}:{listener.getsockname()[1]}/v1"
        if api_key is None and service.hosts is None:
            say_aside("there is no key: whoever reaches this address can ask")
        say_aside(f"{url} answers for the model {service.name!r}; Ctrl-C stops")
        serve_http(service, listener)
    say_aside("stopped")
