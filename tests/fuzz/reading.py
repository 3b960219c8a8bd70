"""Damaged files through every command that reads them, in one process.

`python tests/fuzz/reading.py --count 50000` draws cases from a seed; `--case 17` repeats one of
them. A case fails when a command ends in anything but success or one line of refusal, works for 20
seconds, or needs more than 1 GB of further memory. The process ends with 1 after any failure; a
signal or a hang ends it at once, and the last line that it printed names the case.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from corpus import Item, build
from mutations import mutate_file

from sessa_cli.main import main

MOST_SECONDS = 20
MOST_MEMORY = 10**9
# Address space and bytes in a file, limited to protect the machine from a case that asks too much.
ADDRESS_SPACE = 16 * 10**9
LARGEST_OUTPUT = 10**8
# Success, bad input, a loss that is not finite: every other exit code is a failure.
ALLOWED = (0, 2, 3)


def run_command(arguments: list[str]) -> tuple[int, str, str]:
    """Run `sessa` in this process: exit code, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return code, out.getvalue(), err.getvalue()


def must_run(*arguments: object) -> int:
    """Run a command that has to succeed, while the corpus is made."""
    code, out, err = run_command([str(argument) for argument in arguments])
    if code != 0:
        raise RuntimeError(f"{arguments} ended with {code}: {err or out}")
    return code


class Fuzzer:
    """Draws and runs cases below a scratch folder, each from the seed and its number alone."""

    def __init__(self, scratch: Path, seed: int) -> None:
        self.scratch, self.seed = scratch, seed
        self.corpus = scratch / "corpus"
        self.corpus.mkdir()
        self.items = build(self.corpus, must_run)
        self.memory = peak_memory()

    def run(self, number: int) -> str | None:
        """Run a case; a description of the failure, or None."""
        place = self.scratch / "case"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        name, arguments = self.prepare(number, place)
        print(f"case {number}: {name}: sessa {' '.join(arguments)}", flush=True)
        faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
        started = time.monotonic()
        try:
            code, out, err = run_command(arguments)
        except BaseException:  # whatever leaves the command line is what is looked for
            return f"{name}: {traceback.format_exc(limit=-4)}"
        finally:
            faulthandler.cancel_dump_traceback_later()
        if time.monotonic() - started > MOST_SECONDS:
            return f"{name}: more than {MOST_SECONDS} s"
        return self._judge(name, code, out, err)

    def prepare(self, number: int, place: Path) -> tuple[str, list[str]]:
        """Draw a case and write its damaged input; the item's name and the command."""
        random_ = random.Random(f"{self.seed} {number}")
        weights = [item.weight for item in self.items.values()]
        [(name, item)] = random_.choices(list(self.items.items()), weights)
        copy = place / item.path.name
        copy_input(item, copy)
        targets = item.targets(copy)
        for target in random_.choices(targets, k=random_.choice([1, 1, 2])):
            if target.is_file() and not target.is_symlink():
                mutate_file(target, random_)
        values = {
            "in": copy,
            "out": place / "out",
            "model": self.corpus / "model",
            "text": self.corpus / "text.txt",
        }
        return name, [part.format(**values) for part in random_.choice(item.commands)]

    def _judge(self, name: str, code: int, out: str, err: str) -> str | None:
        grown, self.memory = peak_memory() - self.memory, max(peak_memory(), self.memory)
        if grown > MOST_MEMORY:
            return f"{name}: {grown / 1e9:.1f} GB of further memory"
        if code not in ALLOWED or "Traceback" in out + err:
            return f"{name}: exit code {code}: {err or out}"
        refused = [line for line in err.splitlines() if line.startswith("error: ")]
        if code and (len(refused) != 1 or not err.endswith(refused[0] + "\n")):
            return f"{name}: exit code {code} without one line at the end: {err!r}"
        if "\x1b" in "".join(refused):
            return f"{name}: an escape sequence in {refused[0]!r}"
        return None


def copy_input(item: Item, copy: Path) -> None:
    """Copy the input of an item."""
    if item.path.is_dir():
        shutil.copytree(item.path, copy)
    else:
        shutil.copy(item.path, copy)


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for corpus and cases, and no network, no colours, no cache elsewhere."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "200"}
    with tempfile.TemporaryDirectory(prefix="sessa-fuzz-") as name:
        os.environ["HOME"] = name
        yield Path(name)


def run_all() -> int:
    """Run the cases that the command line asks for; the number of failures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int)
    asked = parser.parse_args()
    numbers = range(asked.count) if asked.case is None else [asked.case]
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_OUTPUT, resource.RLIM_INFINITY))
    failures: set[str] = set()
    started = time.monotonic()
    with scratch_folder() as scratch:
        fuzzer = Fuzzer(scratch, asked.seed)
        for number in numbers:
            if failure := fuzzer.run(number):
                print(f"FAILED case {number}: {failure}", file=sys.stderr, flush=True)
                failures.add(failure.partition(": ")[2])
    seconds = time.monotonic() - started
    print(f"{len(numbers)} cases in {seconds:.0f} s, {len(failures)} kinds of failure", flush=True)
    return len(failures)


if __name__ == "__main__":
    sys.exit(min(run_all(), 1))
