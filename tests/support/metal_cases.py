"""Feedback solves for the Metal kernels: inputs, float64 answer, plain arithmetic, both twins."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any
from unittest import mock

import ml_dtypes
import mlx.core as mx
import numpy as np
import torch
from metal_emulator.build import Launch
from metal_emulator.mlx_side import emulated_metal_kernels, to_mlx
from metal_emulator.torch_side import emulated_shaders

import sessa_mlx.feedback.metal as mlx_metal
import sessa_torch.feedback.metal as torch_metal
from sessa_common.reference.ops import feedback_solve, feedback_solve_backward

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TWINS = {"mlx": mlx_metal, "torch": torch_metal}
NAMES = ("s", "df", "dq", "dk", "dgamma", "dpast_s")

# By name, in NAMES' order; dpast_s is there with a past only.
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """Sizes and kind of one solve; `draw` numbers its random values.

    `gamma`: "mixed" has 0, both signs and +-0.999 in turn.
    """

    T: int
    B: int = 1
    D: int = 20
    K: int = 12
    P: int = 0
    masked: bool = False
    gamma: str | float = "mixed"
    draw: int = 0

    def __str__(self) -> str:
        past = f"-P{self.P}" if self.P else ""
        gain = "" if self.gamma == "mixed" else f"-gamma{self.gamma}"
        return f"B{self.B}-T{self.T}-D{self.D}-K{self.K}{past}{gain}{'-masked' * self.masked}"


@cache
def inputs(case: Case, dtype: str) -> Arrays:
    """f, q, k, gamma, ds, and past_s and key_mask where the case has them, rounded to `dtype`."""
    random = np.random.default_rng([case.T, case.draw])
    B, T, D, K, P = case.B, case.T, case.D, case.K, case.P
    gamma = np.full((B, T), case.gamma if case.gamma != "mixed" else 0.0)
    if case.gamma == "mixed":
        gamma[:] = np.resize([0.9, -0.7, 0.0, 0.999, -0.999, 0.3], B * T).reshape(B, T)
    shapes = {"f": (B, T, D), "q": (B, T, K), "k": (B, P + T, K), "ds": (B, T, D)}
    arrays = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    arrays["gamma"] = gamma
    if P:
        arrays["past_s"] = random.standard_normal((B, P, D))
    rounded = {name: array.astype(DTYPES[dtype]) for name, array in arrays.items()}
    if case.masked:
        rounded["key_mask"] = random.random((B, P + T)) > 0.3
        rounded["key_mask"][0, : P + T // 2] = False
    return rounded


@cache
def expected(case: Case, dtype: str) -> Arrays:
    """The answer in float64 for the rounded inputs."""
    given = {
        n: a if a.dtype == bool else a.astype(np.float64) for n, a in inputs(case, dtype).items()
    }
    ds = given.pop("ds")
    results = [feedback_solve(**given), *feedback_solve_backward(ds, **given)]
    return {n: a for n, a in zip(NAMES, results, strict=True) if a is not None}


@cache
def plain(case: Case, dtype: str) -> Arrays:
    """Softmax, row-by-row recurrence and PyTorch's autograd with every operation in `dtype`."""
    given = {n: to_torch(a) for n, a in inputs(case, dtype).items()}
    wanted = [given[n] for n in ("f", "q", "k", "gamma", "past_s") if n in given]
    for tensor in wanted:
        tensor.requires_grad_()
    B, T, P = case.B, case.T, case.P
    visible = torch.ones(T, P + T, dtype=torch.bool).tril(P - 1).expand(B, -1, -1)
    if case.masked:
        visible = visible & given["key_mask"][:, None]
    scores = given["q"] @ given["k"].mT * case.K**-0.5
    alpha = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1) * visible
    N = alpha * given["gamma"][..., None]
    states = given.get("past_s", given["f"][:, :0])
    for t in range(T):
        row = given["f"][:, t : t + 1] + N[:, t : t + 1, : P + t] @ states
        states = torch.cat([states, row], 1)
    s = states[:, P:]
    grads = torch.autograd.grad(s, wanted, given["ds"], allow_unused=True, materialize_grads=True)
    return {n: from_torch(a) for n, a in zip(NAMES, (s, *grads), strict=False)}


def emulated(
    twin: str,
    case: Case,
    dtype: str,
    *,
    seed: int = 0,
    block: int = 64,
    wide: tuple[str, ...] = (),
    mode: str = "",
    **options: str,
) -> tuple[Arrays, list[Launch]]:
    """Run a twin's Metal path on the emulator; return its results in float64 and its launches.

    The inputs named in `wide` are passed in float32, with the same values. `mode` is one of the
    emulator's. `options` go to both passes.
    """
    given = dict(inputs(case, dtype))
    given |= {name: given[name].astype(np.float32) for name in wide if name in given}
    ds = given.pop("ds")
    return solve_emulated(twin, given, ds, seed=seed, block=block, mode=mode, **options)


def solve_emulated(
    twin: str,
    given: Arrays,
    ds: np.ndarray,
    *,
    seed: int = 0,
    block: int = 64,
    mode: str = "",
    **options: str,
) -> tuple[Arrays, list[Launch]]:
    """Output and gradients of a twin's Metal path on the emulator, and its launches."""
    module, convert = TWINS[twin], to_mlx if twin == "mlx" else to_torch
    arrays = {name: convert(array) for name, array in given.items()}
    names = ("past_s", "key_mask", "document_starts")
    optional = {name: arrays[name] for name in names if name in arrays}
    required = [arrays[name] for name in ("f", "q", "k", "gamma")]
    kernels = emulated_metal_kernels if twin == "mlx" else emulated_shaders
    with kernels(seed, mode) as launches, mock.patch.object(module, "BLOCK", block):
        forget_kernels(module)
        s, lse = module.solve_forward(*required, **optional, **options)
        grads = module.solve_backward(convert(ds), *required[1:], s, lse, **optional, **options)
        forget_kernels(module)
    back = from_mlx if twin == "mlx" else from_torch
    results = {n: back(a) for n, a in zip(NAMES, (s, *grads), strict=True) if a is not None}
    return results, launches


def forget_kernels(module: ModuleType) -> None:
    """Make a twin build its kernels anew, inside or outside the emulator."""
    cached: Any = mlx_metal._kernel if module is mlx_metal else torch_metal._library
    cached.cache_clear()


def kernel_kind(name: str) -> str:
    """Return which of the five kernels has a name that MLX made up."""
    match = re.match(r"custom_kernel_sessa_(weights|block|score_grads|step|merge)_", name)
    return match[1] if match else name


def relative_error(actual: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Norm of the difference over the norm of `wanted`, all arrays together; NaN is infinite."""
    difference = sum(np.square(a - w).sum() for a, w in zip(actual, wanted, strict=True))
    error = np.sqrt(difference / max(sum(np.square(w).sum() for w in wanted), 1e-30))
    return float("inf") if np.isnan(error) else float(error)


def to_torch(array: np.ndarray) -> torch.Tensor:
    """The array in PyTorch, in its own type."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def from_torch(tensor: torch.Tensor) -> np.ndarray:
    """The tensor in float64."""
    return tensor.detach().double().numpy()


def from_mlx(array: mx.array) -> np.ndarray:
    """The array in float64."""
    return np.array(array.astype(mx.float32), np.float64)
