"""Runs commands that end at a chosen write, each in a fork of a process that has imported all."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("kill_at_write.c")
KILLED = -9


@dataclass(frozen=True)
class Ended:
    """The exit code of a command, the calls that it made to change files, and its output."""

    code: int
    calls: int
    output: str


class Commands:
    """Runs `sessa` commands, each of which may be killed at the n-th change of a folder."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def __call__(self, folder: Path, *arguments: object, kill_at: int = 0) -> Ended:
        """Run a command; with `kill_at` it ends at its n-th change of a file below `folder`."""
        request = {"folder": f"{folder}/", "kill_at": kill_at, "arguments": [*map(str, arguments)]}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))


@contextlib.contextmanager
def start_commands(scratch: Path) -> Iterator[Commands]:
    """Build the library, start the process that runs the commands, and end it."""
    library = scratch / "kill_at_write.so"
    compiler = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", str(SOURCE), "-o", library]
    subprocess.run([*compiler, "-ldl"], check=True)
    environment = os.environ | {
        "LD_PRELOAD": f"{library} {os.environ.get('LD_PRELOAD', '')}".strip(),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "support.kills", str(library)]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Commands(process)
        process.stdin.close()  # type: ignore[union-attr]


def serve(library: ctypes.CDLL) -> None:
    """Answer requests, one a line, each by a fork."""
    from sessa_cli.main import main  # noqa: F401

    for name in (
        "sessa_torch.training",
        "sessa_mlx.training",
        "sessa_export.exporter",
        "sessa_torch.decoding",
        "sessa_mlx.decoding",
        "torch._dynamo",
        "onnxruntime",
        "onnx",
        "matplotlib.figure",
    ):
        with contextlib.suppress(ImportError):
            __import__(name)
    for line in sys.stdin:
        request = json.loads(line)
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receive)
            _run(library, request, send)
        os.close(send)
        with os.fdopen(receive) as pipe:
            output = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        text, _, calls = output.rpartition("\0")
        answer = {"code": code, "calls": int(calls or 0) if text else 0, "output": text or output}
        print(json.dumps(answer), flush=True)


def _run(library: ctypes.CDLL, request: dict, send: int) -> None:
    from sessa_cli.main import main

    code = 1
    try:
        os.dup2(send, 1)
        os.dup2(send, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        library.kill_at(ctypes.c_long(request["kill_at"]), request["folder"].encode())
        main(request["arguments"])
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        library.calls_so_far.restype = ctypes.c_long
        os.write(send, f"\0{library.calls_so_far()}".encode())
        os._exit(code)


if __name__ == "__main__":
    serve(ctypes.CDLL(sys.argv[1]))
