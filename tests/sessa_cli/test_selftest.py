"""`sessa selftest` prints one table, advice for what fails, and exit code 1."""

from __future__ import annotations

import json
from collections.abc import Iterator
from unittest import mock

import pytest
import typer
from typer.testing import CliRunner, Result

from sessa_cli import selftest
from sessa_common.errors import SessaError
from sessa_common.selftest import suite, timings
from sessa_common.selftest.models import check_products
from sessa_common.selftest.rows import ERROR, OK, TF32, WRONG, Row
from sessa_common.selftest.solve import Size
from sessa_common.selftest.twin import Twin


def run(*arguments: str, **checks) -> Result:
    """The command with these checks in place of all that it makes."""
    app = typer.Typer()
    app.command()(selftest.selftest)
    with mock.patch.dict(suite.CHECKS, checks or {"products": check_products}, clear=True):
        return CliRunner().invoke(app, arguments)


def failing(name: str, verdict: str):
    def check(twin: Twin) -> Iterator[Row]:
        facts = {"framework": twin.name, "device": twin.device_name, "precision": "float32"}
        yield Row(**facts, check=name, measured=0.5, allowed=0.1, detail="a | b", verdict=verdict)

    return check


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_one_table_and_the_machine(backend: str) -> None:
    result = run("--backend", backend, "--no-timings")
    assert result.exit_code == 0, result.output
    assert f"{backend} on" in result.stdout and "Python 3" in result.stdout
    rows = [line for line in result.stdout.splitlines() if line.startswith(f"| {backend} |")]
    assert len(rows) == 1 and rows[0].endswith("| ok |")
    head = next(line for line in result.stdout.splitlines() if line.startswith("| framework |"))
    assert head.count("|") == rows[0].count("|")


def test_json() -> None:
    result = run("--json", "--no-timings")
    answer = json.loads(result.stdout)
    assert {check["framework"] for check in answer["checks"]} == {"torch", "mlx"}
    assert {"Python", "mlx, MLX_ENABLE_TF32", "torch, float32 products"} <= answer["machine"].keys()


def test_timings() -> None:
    timed = (Size(1, 64, 64, 64), Size(1, 1, 64, 64, P=8))
    with mock.patch.object(timings, "TIMED", {"cpu": timed, "gpu": timed}):
        result = run("--backend", "torch")
    rows = [line.split(" | ") for line in result.stdout.splitlines() if "| B1 T64 D64 |" in line]
    assert rows and all(float(cell.strip(" |")) > 0 for row in rows for cell in row[-4:])


@pytest.mark.parametrize(("verdict", "code"), [(WRONG, 1), (ERROR, 1), (OK, 0)])
def test_a_failing_row_fails_the_command_and_gives_advice(verdict: str, code: int) -> None:
    name = "training step, compiled"
    result = run("--backend", "torch", "--no-timings", steps=failing(name, verdict))
    assert result.exit_code == code
    assert f"| {verdict} |" in result.stdout and "a / b" in result.stdout
    assert ("--no-compile" in result.stdout) == (code == 1)


@pytest.mark.parametrize(("products", "code"), [(TF32, 0), (OK, 1)])
def test_tf32_is_accepted_only_where_the_framework_has_it(products: str, code: int) -> None:
    checks = {"a": failing("float32 products", products), "b": failing("solve, blocked", TF32)}
    assert run("--backend", "torch", "--no-timings", **checks).exit_code == code


def test_every_check_has_advice() -> None:
    for name in suite.CHECKS:
        row = Row(framework="mlx", device="gpu", check=name, precision="", verdict=ERROR)
        assert selftest._advice(row).startswith(f"mlx, {name}: ")


def test_an_exception_is_a_row_and_the_next_check_still_runs() -> None:
    def broken(twin: Twin) -> Iterator[Row]:
        raise RuntimeError("no such\nkernel")
        yield

    result = run("--backend", "torch", "--no-timings", memory=broken, products=check_products)
    assert result.exit_code == 1
    assert "RuntimeError: no such kernel | ERROR |" in result.stdout
    assert "| float32 products |" in result.stdout


def test_unknown_backend_and_device() -> None:
    for arguments in (("--backend", "jax"), ("--backend", "mlx", "--device", "tpu")):
        result = run(*arguments)
        assert isinstance(result.exception, SessaError) and arguments[-1] in str(result.exception)
