"""Calls into the tokenizers library: its failures become SessaError, and Ctrl-C is heard."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from sessa_common.errors import SessaError

Result = TypeVar("Result")


def interruptible(work: Callable[[], Result]) -> Result:
    """Run a call into the library on another thread, so that Ctrl-C is heard while it works."""
    done: list[Result] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:  # raised again below, on the caller's thread
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if failed:
        raise failed[0]
    return done[0]


@contextlib.contextmanager
def library_errors(where: str) -> Iterator[None]:
    """Turn a failure inside the tokenizers library into a SessaError that begins with `where`.

    A panic of its Rust code arrives as a BaseException, after a report on standard error that
    nobody can use; the report is not shown.
    """
    try:
        with _hidden_standard_error():
            yield
    except (SessaError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        told = str(error).strip().partition("\n")[0] or type(error).__name__
        raise SessaError(f"{where} ({told})") from None


@contextlib.contextmanager
def _hidden_standard_error() -> Iterator[None]:
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    if sys.stderr is not None:
        sys.stderr.flush()
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
