"""`sessa selftest` on this machine: right paths pass, a wrong path fails the command."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import typer
from typer.testing import CliRunner, Result

from sessa_cli import selftest
from sessa_common.errors import SessaError
from sessa_common.frameworks import framework

SMALL = (selftest._Size(2, 20, 12, 8, P=3, masked=True), selftest._Size(1, 1, 12, 8, P=5))


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(selftest.selftest)
    with mock.patch.object(selftest, "CHECKED", SMALL):
        return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_every_path_is_right(backend: str) -> None:
    result = run("--backend", backend, "--json", "--no-timings")
    assert result.exit_code == 0, result.output
    checks = json.loads(result.stdout)["checks"]
    assert {check["path"] for check in checks} >= {"naive", "blocked"}
    assert {check["verdict"] for check in checks} == {"ok"}
    assert len(checks) % (len(SMALL) * len(selftest.LIMITS)) == 0


def test_table_and_timings() -> None:
    timed = {"cpu": (selftest._Size(1, 64, 64, 64), selftest._Size(1, 1, 64, 64, P=8))}
    with mock.patch.object(selftest, "TIMED", timed | {"gpu": timed["cpu"]}):
        result = run("--backend", "torch")
    assert result.exit_code == 0, result.output
    assert "kernel" in result.stdout and "| verdict |" in result.stdout
    rows = [line.split(" | ") for line in result.stdout.splitlines() if "| B1 T64 D64 |" in line]
    assert rows and all(float(cell.strip(" |")) > 0 for row in rows for cell in row[-4:])


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_wrong_path_fails_the_command(backend: str) -> None:
    right = framework(backend, "feedback").feedback_solve

    def wrong(*arrays, **options):
        return right(*arrays, **options) * (1.1 if options["backend"] == "blocked" else 1)

    feedback = framework(backend, "feedback")
    with mock.patch.object(feedback, "feedback_solve", wrong):
        result = run("--backend", backend, "--json", "--no-timings")
    assert result.exit_code == 1
    verdicts = {(c["path"], c["verdict"]) for c in json.loads(result.stdout)["checks"]}
    assert {("blocked", "WRONG"), ("naive", "ok")} <= verdicts


def test_products_of_11_bits_are_named() -> None:
    assert selftest._verdict(3e-4, "float32") == "11-bit products"
    assert selftest._verdict(3e-3, "float32") == "WRONG"
    assert selftest._verdict(float("nan"), "bfloat16") == "WRONG"


def test_unknown_backend() -> None:
    result = run("--backend", "jax")
    assert isinstance(result.exception, SessaError) and "jax" in str(result.exception)
