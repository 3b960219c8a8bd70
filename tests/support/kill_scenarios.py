"""The commands that the tests interrupt, and what must hold after an interruption."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from support.kills import KILLED, Commands, Ended

from sessa_common.checkpoint.adapters import read_adapter
from sessa_common.checkpoint.folder import load_weights
from sessa_common.checkpoint.manifest import verify
from sessa_common.storage import LEFTOVER, LOCK, MANIFEST

TINY = (
    "--layers",
    "1",
    "--width",
    "16",
    "--heads",
    "2",
    "--context",
    "16",
    "--tokenizer",
    "bytes",
    "--batch-size",
    "2",
    "--warmup-steps",
    "1",
    "--evaluate-every",
    "2",
    "--evaluate-batches",
    "1",
    "--checkpoint-every",
    "2",
    "--device",
    "cpu",
)
SOUP = tuple(
    word
    for option in (
        "min_tokens=20",
        "max_tokens=24",
        "train_examples=10",
        "spaced=false",
        "validation_examples=7",
        "test_examples=5",
    )
    for word in ("--task-option", option)
)
BUSY = "a training run that one left behind"


@dataclass(frozen=True)
class Scenario:
    """A command to interrupt, those that prepare for it, those that may follow, and its result.

    {b} stands for the backend and {w} for the folder of everything.
    """

    command: str
    prepare: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    result: str = "run"


START = "train --data {w}/d.txt TINY --steps 4 --out {w}/run --backend {b}"
FINETUNE = (
    "finetune {w}/run --data {w}/d.txt --steps 4 --batch-size 2 --evaluate-every 2 "
    "--evaluate-batches 1 --checkpoint-every 2 --device cpu --out {w}/tuned --backend {b}"
)
EXPORT = "export {w}/run {w}/onnx"
COMPARE = (
    "compare --data {w}/d.txt --models sessa --seeds 1 --steps 2 --batch-size 1 --context 16 "
    "--tokenizer bytes --learning-rates 1e-3 --backend {b} --device cpu --out {w}/cmp"
)
SCENARIOS = {
    "train": Scenario(START, again=("train --resume {w}/run --backend {b}", START)),
    "resume": Scenario("train --resume {w}/run --steps 8 --backend {b}", (START,)),
    "replace": Scenario(f"{START} --seed 1 --force", (START,)),
    "finetune": Scenario(
        FINETUNE,
        (START,),
        again=("finetune --resume {w}/tuned --backend {b}", FINETUNE),
        result="tuned",
    ),
    "convert": Scenario("convert {w}/run {w}/out --shard-size 4KB", (START,), result="out"),
    "in-place": Scenario(
        "convert {w}/run {w}/run --force --shard-size 4KB --dtype float16", (START,)
    ),
    "export": Scenario(EXPORT, (START,), result="onnx"),
    "export-again": Scenario(f"{EXPORT} --force", (START, EXPORT), result="onnx"),
    "data": Scenario("data symbolsoup SOUP --out {w}/soup", result="soup"),
    "compare": Scenario(COMPARE, result="cmp"),
}
CASES = [(name, "torch") for name in SCENARIOS] + [(name, "mlx") for name in ("train", "resume")]


class Trial:
    """A scenario in a folder: prepared, run once to its end, then interrupted again and again."""

    def __init__(self, name: str, backend: str, commands: Commands, work: Path, start: Path):
        self.scenario, self.backend, self.commands = SCENARIOS[name], backend, commands
        self.work, self.start, self.result = work, start, work / SCENARIOS[name].result
        self.work.mkdir()
        (work / "d.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
        for line in self.scenario.prepare:
            self.must(line)
        shutil.copytree(work, start)
        self.before = content(self.result)
        self.changes = self.must(self.scenario.command).calls
        self.after = content(self.result)

    def run(self, line: str, kill_at: int = 0) -> Ended:
        """Run a command, which may be killed at its n-th change of the folder."""
        words: list[str] = []
        for word in line.split():
            words += {"TINY": TINY, "SOUP": SOUP}.get(word, (word,))
        given = [word.format(w=self.work, b=self.backend) for word in words]
        return self.commands(self.work, *given, kill_at=kill_at)

    def must(self, line: str) -> Ended:
        """Run a command that succeeds."""
        ended = self.run(line)
        assert ended.code == 0, ended.output
        return ended

    def renew(self) -> None:
        """Make the folder, on the disk, as it was before the command."""
        shutil.rmtree(self.work)
        shutil.copytree(self.start, self.work)
        subprocess.run(["sync", "-f", self.work], check=True)

    def kill(self, at: int) -> None:
        """Run the command from the start and kill it at its n-th change of the folder."""
        self.renew()
        ended = self.run(self.scenario.command, kill_at=at)
        assert ended.code == KILLED, ended

    def check(self) -> None:
        """Look at what an interruption left, and let the next commands finish the work."""
        found = content(self.result)
        # Training saves in between.
        if self.scenario.command.split()[0] not in ("train", "finetune"):
            assert found in (None, self.before, self.after)
        assert found is not None or self.before is None
        ended = [self._next(line) for line in self.scenario.again or (self.scenario.command,)]
        assert content(self.result) == self.after, ended
        assert any(one.code == 0 for one in ended) or found == self.after, ended
        assert not leftovers(self.work)

    def _next(self, line: str) -> Ended:
        while BUSY in (ended := self.run(line)).output:
            time.sleep(0.2)  # A run that outlived its comparison.
        return ended


def content(folder: Path) -> dict[str, object] | None:
    """The result in a folder, verified; None where there is none yet.

    A model by its tensors, a comparison by its losses, everything else by its files.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return None
    verify(folder)
    if (folder / "plan.json").exists() or folder.name == "cmp":
        table = folder / "results.json"
        rows = json.loads(table.read_text())["models"] if table.exists() else []
        losses = {row["name"]: row["mean"]["validation_loss"] for row in rows if "mean" in row}
        return losses or None
    if (folder / "adapter_config.json").exists():
        return {name: value.tobytes() for name, value in read_adapter(folder).arrays.items()}
    if (folder / "config.json").exists() and not (folder / "model.onnx").exists():
        return {name: value.tobytes() for name, value in load_weights(folder)[1].items()}
    files = (path for path in folder.iterdir() if path.name not in (MANIFEST, LOCK))
    return {path.name: path.read_bytes() for path in files}


def leftovers(folder: Path) -> list[Path]:
    """Return what killed writers left anywhere in a folder."""
    found = (path for path in folder.rglob(".*"))
    return [path for path in found if LEFTOVER.fullmatch(path.name) or "tmp" in path.name]
