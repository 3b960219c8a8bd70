"""`sessa selftest`: is every kernel right on this machine, and how fast is it."""

from __future__ import annotations

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any

import numpy as np
import typer

from sessa_cli.common import BACKENDS, framework, is_installed, make_console, print_json, say
from sessa_common.errors import SessaError
from sessa_common.reference.ops import feedback_solve, feedback_solve_backward

# Relative error, norm over norm, that no correct path comes near.
LIMITS = {"float32": 5e-6, "float16": 2e-3, "bfloat16": 1.5e-2}
# What float32 products with TF32's 11-bit operands give.
TF32_LIMIT = 2e-3
NAMES = ("s", "df", "dq", "dk", "dgamma", "dpast_s")
WARM, REPEATS = 2, 7


@dataclass(frozen=True)
class Check:
    """One path against float64: the worst relative error over the output and all gradients."""

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
    """Medians in milliseconds: the feedback solve and the framework's causal attention."""

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
    # Rows that no kernel can read as they lie.
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
        str, typer.Option("--backend", help="torch, mlx, or auto: all that is installed.")
    ] = "auto",
    timings: Annotated[bool, typer.Option(help="Also time it against attention.")] = True,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check every path of the feedback solve on this machine against float64, then time it.

    The tables are Markdown, ready to paste into an issue. Exit code 1 if a path is wrong.
    Example: sessa selftest
    """
    sides = _sides(backend)
    console = make_console(json_output)
    say(console, _machine())
    checks: list[Check] = []
    measured: list[Timing] = []
    for side in sides:
        checks += _checks(side, partial(say, console))
        measured += list(_timings(side)) if timings else []
    if json_output:
        print_json({
            "machine": _machine(),
            "checks": [dataclasses.asdict(check) for check in checks],
            "timings": [dataclasses.asdict(timing) for timing in measured],
        })  # fmt: skip
    else:
        say(console, "\n" + _table(checks))
        if measured:
            say(
                console, "\nMilliseconds, medians; attention is the framework's own, heads of 64:\n"
            )
            say(console, _table(measured))
    if any(check.verdict == "WRONG" for check in checks):
        raise typer.Exit(1)


def _sides(backend: str) -> list[Any]:
    if backend not in BACKENDS:
        raise SessaError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    kinds = {"torch": _Torch, "mlx": _Mlx}
    wanted = [name for name in kinds if backend in (name, "auto") and is_installed(name)]
    if not wanted:
        missing = "neither torch nor mlx is" if backend == "auto" else f"{backend} is not"
        raise SessaError(f"{missing} installed; pip install one of them")
    return [kinds[name]() for name in wanted]


def _machine() -> str:
    packages = [f"{name} {version(name)}" for name in ("torch", "mlx") if is_installed(name)]
    system = f"macOS {platform.mac_ver()[0]}" if platform.mac_ver()[0] else platform.system()
    return ", ".join([system, platform.machine(), f"Python {platform.python_version()}", *packages])


class _Torch:
    name = "torch"

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.solve = framework("torch", "feedback").feedback_solve
        found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        self.kind = next((kind for kind, is_there in found.items() if is_there), "cpu")
        self.device = torch.cuda.get_device_name() if self.kind == "cuda" else self.kind

    def array(self, value: np.ndarray, dtype: str) -> Any:
        tensor = self.torch.from_numpy(value)
        kept = value.dtype == bool
        return tensor.to(self.kind, None if kept else getattr(self.torch, dtype))

    def numpy(self, value: Any) -> np.ndarray:
        return value.detach().cpu().double().numpy()

    def pull_back(self, run: Callable[..., Any], arrays: list[Any], ds: Any) -> tuple[Any, ...]:
        """run(*arrays) and its gradients for the upstream gradient ds."""
        leaves = [array.detach().requires_grad_() for array in arrays]
        output = run(*leaves)
        gradients = self.torch.autograd.grad(
            output, leaves, ds, allow_unused=True, materialize_grads=True
        )
        return output, *gradients

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        causal = q.shape[2] == k.shape[2]
        attend = self.torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v, is_causal=causal)

    def wait(self, _: Any) -> None:
        if self.kind != "cpu":
            getattr(self.torch, self.kind).synchronize()


class _Mlx:
    name = "mlx"

    def __init__(self) -> None:
        import mlx.core as mx

        self.mx = mx
        self.solve = framework("mlx", "feedback").feedback_solve
        self.kind = "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu"
        self.device = str(mx.device_info().get("device_name", self.kind))

    def array(self, value: np.ndarray, dtype: str) -> Any:
        array = self.mx.array(value)
        return array if value.dtype == bool else array.astype(getattr(self.mx, dtype))

    def numpy(self, value: Any) -> np.ndarray:
        return np.array(value.astype(self.mx.float32), np.float64)

    def pull_back(self, run: Callable[..., Any], arrays: list[Any], ds: Any) -> tuple[Any, ...]:
        """run(*arrays) and its gradients for the upstream gradient ds."""
        outputs, gradients = self.mx.vjp(lambda *a: run(*a), arrays, [ds])
        return outputs[0], *gradients

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        mask = "causal" if q.shape[2] == k.shape[2] else None
        attend = self.mx.fast.scaled_dot_product_attention
        return attend(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)

    def wait(self, results: Any) -> None:
        self.mx.eval(results)
        self.mx.synchronize()


def _draw(size: _Size) -> dict[str, np.ndarray]:
    """f, q, k, gamma, ds, and past_s and key_mask where the size has them, in float32."""
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


def _bound(side: Any, drawn: dict[str, Any], backend: str) -> tuple[Callable[..., Any], list[Any]]:
    """The solve over its differentiable arrays, and those arrays; the mask is held fixed."""
    names = [name for name in ("f", "q", "k", "gamma", "past_s") if name in drawn]
    mask = drawn.get("key_mask")

    def run(*arrays: Any) -> Any:
        past_s = arrays[4] if len(arrays) > 4 else None
        return side.solve(*arrays[:4], past_s=past_s, key_mask=mask, backend=backend)

    return run, [drawn[name] for name in names]


def _checks(side: Any, tell: Callable[[str], None]) -> Iterator[Check]:
    tiny = {n: side.array(a, "float32") for n, a in _draw(_Size(1, 2, 4, 4)).items()}
    run, arrays = _bound(side, tiny, "kernel")
    paths = ["naive", "blocked", "kernel"]
    try:
        run(*arrays)
    except ValueError as reason:
        tell(f"{side.name} on {side.device}: {reason}")
        paths.remove("kernel")
    for path in paths:
        for dtype in LIMITS:
            for size in CHECKED:
                yield _check(side, path, dtype, size)


def _check(side: Any, path: str, dtype: str, size: _Size) -> Check:
    arrays = {name: side.array(array, dtype) for name, array in _draw(size).items()}
    # The judge sees the numbers after rounding to the type.
    exact = {n: a if a.dtype == bool else side.numpy(arrays[n]) for n, a in _draw(size).items()}
    ds, exact_ds = arrays.pop("ds"), exact.pop("ds")
    run, inputs = _bound(side, arrays, path)
    got = [side.numpy(value) for value in side.pull_back(run, inputs, ds)]
    want = [feedback_solve(**exact), *feedback_solve_backward(exact_ds, **exact)]
    errors = {
        name: float(np.linalg.norm(a - w) / np.maximum(np.linalg.norm(w), 1e-30))
        for name, a, w in zip(NAMES, got, want, strict=False)
        if w is not None
    }
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    verdict = _verdict(errors[worst], dtype)
    error = errors[worst]
    return Check(side.name, side.device, path, dtype, str(size), worst, error, verdict)


def _verdict(error: float, dtype: str) -> str:
    if error <= LIMITS[dtype]:
        return "ok"
    return "11-bit products" if dtype == "float32" and error <= TF32_LIMIT else "WRONG"


def _timings(side: Any) -> Iterator[Timing]:
    on_cpu = side.kind == "cpu"
    for size in TIMED["cpu" if on_cpu else "gpu"]:
        for dtype in ("float32",) if on_cpu else ("float32", "bfloat16"):
            yield _timing(side, size, dtype)


def _timing(side: Any, size: _Size, dtype: str) -> Timing:
    drawn = {name: side.array(array, dtype) for name, array in _draw(size).items()}
    ds = drawn.pop("ds")
    run, arrays = _bound(side, drawn, "auto")
    B, T, P, heads = size.B, size.T, size.P, size.D // 64
    random = np.random.default_rng(1)
    q, k, v = (
        side.array(random.standard_normal((B, heads, rows, 64), np.float32), dtype)
        for rows in (T, P + T, P + T)
    )
    pairs = [(run, arrays, ds), (side.attention, [q, k, v], q)]
    forward, gradients = [], []
    for function, operands, upstream in pairs:
        forward.append(_median_ms(side, partial(function, *operands)))
        back = partial(side.pull_back, function, operands, upstream)
        gradients.append(None if T == 1 else _median_ms(side, back))
    shape = f"B{B} T{T}{f' P{P}' if P else ''} D{size.D}"
    return Timing(side.name, side.device, dtype, shape, *forward, *gradients)


def _median_ms(side: Any, run: Callable[[], Any]) -> float:
    times = []
    for _ in range(WARM + REPEATS):
        start = time.perf_counter()
        side.wait(run())
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times[WARM:]), 3)


def _table(rows: list[Any]) -> str:
    """Dataclasses as a Markdown table."""
    columns = [field.name for field in dataclasses.fields(rows[0])]
    lines = [[column.replace("_", " ") for column in columns], ["---"] * len(columns)]
    for row in rows:
        values = [getattr(row, column) for column in columns]
        lines.append([_cell(value) for value in values])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
