"""Commands that are killed, or whose power is cut, while they write: nothing is lost or left.

KILLS and CUTS are the numbers of interruptions in all, spread evenly over the changes that the
commands make; the fast tests take a sample (`make kill-tests` and `make power-cut` take more).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from support.kill_scenarios import CASES, Trial, content
from support.kills import Commands, start_commands
from support.power_cut import open_disk, why_no_disk

KILLS, CUTS = (int(os.environ.get(name, "11")) for name in ("KILLS", "CUTS"))
FAST = ("resume-mlx", "in-place-torch", "data-torch")
PARAMETERS = [
    pytest.param(*case, id=name, marks=() if name in FAST else pytest.mark.slow)
    for case in CASES
    for name in ["-".join(case)]
]


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> Iterator[Commands]:
    if sys.platform != "linux":
        pytest.skip("the kills are injected through LD_PRELOAD, which Linux alone heeds")
    pytest.importorskip("mlx.core")
    pytest.importorskip("torch")
    with start_commands(tmp_path_factory.mktemp("library")) as started:
        yield started


def moments(trial: Trial, count: int) -> Iterator[int]:
    """Numbers of changes, evenly spread over all that the command makes."""
    count = max(1, round(count / len(CASES)))
    for number in range(count):
        yield 1 + (2 * number + 1) * trial.changes // (2 * count)


@pytest.mark.parametrize(("name", "backend"), PARAMETERS)
def test_a_kill_loses_nothing_and_leaves_nothing(name, backend, commands, tmp_path):
    trial = Trial(name, backend, commands, tmp_path / "work", tmp_path / "start")
    for at in moments(trial, KILLS):
        trial.kill(at)
        trial.check()


@pytest.mark.skipif(why_no_disk() is not None, reason=str(why_no_disk()))
@pytest.mark.parametrize(("name", "backend"), PARAMETERS)
def test_a_power_cut_loses_nothing(name, backend, commands, tmp_path):
    with open_disk(tmp_path) as disk:
        trial = Trial(name, backend, commands, disk.folder / "work", tmp_path / "start")
        # What the command said that it wrote is on the disk, the moment that it ends.
        disk.cut_power()
        assert content(trial.result) == trial.after
        for at in moments(trial, CUTS):
            trial.kill(at)
            disk.cut_power()
            trial.check()
