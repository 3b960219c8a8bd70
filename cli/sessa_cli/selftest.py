"""`sessa selftest`: check every path of the feedback solve on this machine, and time it."""

from __future__ import annotations

import dataclasses
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any

import numpy as np
import typer

from sessa_cli.common import (
    Stopwatch,
    make_console,
    print_json,
    say,
)
from sessa_cli.twins import TWINS, Twin
from sessa_common.frameworks import choose_backend, is_installed
from sessa_common.markdown import markdown_table
from sessa_common.reference.ops import feedback_solve, feedback_solve_backward

# Relative errors, norm over norm, that a correct path stays far below.
LIMITS = {"float32": 5e-6, "float16": 2e-3, "bfloat16": 1.5e-2}
# The error of float32 products whose operands have the 11 bits of TF32.
TF32_LIMIT = 2e-3
NAMES = ("s", "df", "dq", "dk", "dgamma", "dpast_s")
WARM, REPEATS = 2, 7


@dataclass(frozen=True)
class Check:
    """One path against float64: the largest relative error of the output and all gradients."""

    framework: str
    device: str
    path: str
    dtype: str
    shape: str
    worst: str
    error: float
    verdict: str


@dataclass(frozen=True)
class Timing:
    """Median times in milliseconds of the feedback solve and the framework's causal attention."""

    framework: str
    device: str
    dtype: str
    shape: str
    solve: float
    attention: float
    solve_and_gradients: float | None
    attention_and_gradients: float | None


@dataclass(frozen=True)
class _Size:
    """B sequences of T tokens after P past ones, widths D and K."""

    B: int
    T: int
    D: int
    K: int
    P: int = 0
    masked: bool = False

    def __str__(self) -> str:
        past = f" P{self.P}" if self.P else ""
        return f"B{self.B} T{self.T}{past} D{self.D} K{self.K}{' masked' if self.masked else ''}"


CHECKED = (
    _Size(2, 130, 40, 24),
    _Size(1, 300, 72, 40, P=21, masked=True),
    _Size(2, 1, 40, 24, P=75, masked=True),
    # Odd widths, whose rows no kernel can read with aligned loads.
    _Size(2, 90, 37, 13, P=21),
)
TIMED = {
    "cpu": (_Size(1, 1024, 256, 256), _Size(1, 1, 256, 256, P=1024)),
    "gpu": (
        _Size(1, 1024, 512, 512),
        _Size(1, 4096, 512, 512),
        _Size(4, 4096, 1024, 1024),
        _Size(1, 1, 1024, 1024, P=4096),
    ),
}


def selftest(
    backend: Annotated[
        str, typer.Option("--backend", help="torch, mlx, or auto for all that are installed.")
    ] = "auto",
    timings: Annotated[bool, typer.Option(help="Also time the solve and attention.")] = True,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check every path of the feedback solve on this machine against float64, then time it.

    The tables are Markdown, ready to paste into an issue. Exit code 1 if a path is wrong.
    Example: sessa selftest
    """
    twins = _twins(backend)
    console = make_console(json_output)
    say(console, _machine())
    checks: list[Check] = []
    measured: list[Timing] = []
    for twin in twins:
        checks += _checks(twin, partial(say, console))
        measured += list(_timings(twin)) if timings else []
    if json_output:
        answer = {
            "machine": _machine(),
            "checks": [dataclasses.asdict(check) for check in checks],
            "timings": [dataclasses.asdict(timing) for timing in measured],
        }
        print_json(answer)
    else:
        say(console, "\n" + _table(checks))
        if measured:
            say(console, "\nMedian milliseconds; attention is the framework's, heads of 64:\n")
            say(console, _table(measured))
    if any(check.verdict == "WRONG" for check in checks):
        raise typer.Exit(1)


def _twins(backend: str) -> list[Twin]:
    if backend != "auto":
        return [TWINS[choose_backend(backend)]()]
    choose_backend(backend)  # Raises SessaError when no framework is installed.
    return [make() for name, make in TWINS.items() if is_installed(name)]


def _machine() -> str:
    packages = [f"{name} {version(name)}" for name in ("torch", "mlx") if is_installed(name)]
    system = f"macOS {platform.mac_ver()[0]}" if platform.mac_ver()[0] else platform.system()
    return ", ".join([system, platform.machine(), f"Python {platform.python_version()}", *packages])


def _draw(size: _Size) -> dict[str, np.ndarray]:
    """Draw f, q, k, gamma and ds in float32, and past_s and key_mask where the size has them."""
    random = np.random.default_rng(0)
    B, T, D, K, P = size.B, size.T, size.D, size.K, size.P
    shapes = {"f": (B, T, D), "q": (B, T, K), "k": (B, P + T, K), "ds": (B, T, D)}
    if P:
        shapes["past_s"] = (B, P, D)
    given = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    given["gamma"] = random.choice([0.9, -0.7, 0.0, 0.999, -0.999, 0.3], (B, T))
    drawn: dict[str, np.ndarray] = {n: array.astype(np.float32) for n, array in given.items()}
    if size.masked:
        drawn["key_mask"] = random.random((B, P + T)) > 0.3
    return drawn


def _bound(twin: Twin, drawn: dict[str, Any], backend: str) -> tuple[Callable[..., Any], list[Any]]:
    """Return the solve as a function of its differentiable arrays, and those arrays."""
    names = [name for name in ("f", "q", "k", "gamma", "past_s") if name in drawn]
    mask = drawn.get("key_mask")

    def run(*arrays: Any) -> Any:
        past_s = arrays[4] if len(arrays) > 4 else None
        return twin.solve(*arrays[:4], past_s=past_s, key_mask=mask, backend=backend)

    return run, [drawn[name] for name in names]


def _checks(twin: Twin, tell: Callable[[str], None]) -> Iterator[Check]:
    tiny = {n: twin.array(a, "float32") for n, a in _draw(_Size(1, 2, 4, 4)).items()}
    run, arrays = _bound(twin, tiny, "kernel")
    paths = ["naive", "blocked", "kernel"]
    try:
        run(*arrays)
    except ValueError as reason:
        tell(f"{twin.name} on {twin.device_name}: {reason}")
        paths.remove("kernel")
    for path in paths:
        for dtype in LIMITS:
            for size in CHECKED:
                yield _check(twin, path, dtype, size)


def _check(twin: Twin, path: str, dtype: str, size: _Size) -> Check:
    arrays = {name: twin.array(array, dtype) for name, array in _draw(size).items()}
    # The reference gets the numbers after rounding to the type.
    exact = {
        name: array if array.dtype == bool else _float64(twin, arrays[name])
        for name, array in _draw(size).items()
    }
    ds, exact_ds = arrays.pop("ds"), exact.pop("ds")
    run, inputs = _bound(twin, arrays, path)
    got = [_float64(twin, value) for value in twin.vjp(run, inputs, ds)]
    want = [feedback_solve(**exact), *feedback_solve_backward(exact_ds, **exact)]
    errors = {
        name: float(np.linalg.norm(a - w) / np.maximum(np.linalg.norm(w), 1e-30))
        for name, a, w in zip(NAMES, got, want, strict=False)
        if w is not None
    }
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    return Check(
        framework=twin.name,
        device=twin.device_name,
        path=path,
        dtype=dtype,
        shape=str(size),
        worst=worst,
        error=errors[worst],
        verdict=_verdict(errors[worst], dtype),
    )


def _float64(twin: Twin, value: Any) -> np.ndarray:
    return twin.numpy(value).astype(np.float64)


def _verdict(error: float, dtype: str) -> str:
    if error <= LIMITS[dtype]:
        return "ok"
    return "11-bit products" if dtype == "float32" and error <= TF32_LIMIT else "WRONG"


def _timings(twin: Twin) -> Iterator[Timing]:
    on_cpu = twin.device == "cpu"
    for size in TIMED["cpu" if on_cpu else "gpu"]:
        for dtype in ("float32",) if on_cpu else ("float32", "bfloat16"):
            yield _timing(twin, size, dtype)


def _timing(twin: Twin, size: _Size, dtype: str) -> Timing:
    drawn = {name: twin.array(array, dtype) for name, array in _draw(size).items()}
    ds = drawn.pop("ds")
    run, arrays = _bound(twin, drawn, "auto")
    B, T, P, heads = size.B, size.T, size.P, size.D // 64
    random = np.random.default_rng(1)
    q, k, v = (
        twin.array(random.standard_normal((B, heads, rows, 64), np.float32), dtype)
        for rows in (T, P + T, P + T)
    )
    pairs = [(run, arrays, ds), (twin.attention, [q, k, v], q)]
    forward, gradients = [], []
    for function, operands, upstream in pairs:
        forward.append(_median_ms(twin, partial(function, *operands)))
        back = partial(twin.vjp, function, operands, upstream)
        gradients.append(None if T == 1 else _median_ms(twin, back))
    shape = f"B{B} T{T}{f' P{P}' if P else ''} D{size.D}"
    return Timing(twin.name, twin.device_name, dtype, shape, *forward, *gradients)


def _median_ms(twin: Twin, run: Callable[[], Any]) -> float:
    times = []
    for _ in range(WARM + REPEATS):
        stopwatch = Stopwatch()
        twin.wait(run())
        times.append(1e3 * stopwatch.seconds)
    return round(statistics.median(times[WARM:]), 3)


def _table(rows: Sequence[Any]) -> str:
    """Format dataclasses of one type as a Markdown table."""
    columns = [field.name for field in dataclasses.fields(rows[0])]
    cells = [[_cell(getattr(row, column)) for column in columns] for row in rows]
    return markdown_table([column.replace("_", " ") for column in columns], cells)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
