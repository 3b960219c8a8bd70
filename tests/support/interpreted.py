"""Triton's interpreter: a process of its own that runs kernels on the CPU, and what it gets wrong.

Triton decides when it is imported whether it interprets, so a test file runs itself as a script and
reads the results.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]


def interpret(script: str) -> Any:
    """Run a script with Triton's interpreter and return what it prints, read as JSON."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    run = subprocess.run(
        [sys.executable, "-W", "ignore", script], capture_output=True, text=True, env=env
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def poison_workspaces() -> None:
    """Fill empty tensors with NaN: what is read before it is written shows."""

    def poison(make: Any) -> Any:
        def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return filled

    torch.empty = poison(torch.empty)
    torch.Tensor.new_empty = poison(torch.Tensor.new_empty)


def multiply_bfloat16() -> None:
    """Products of bfloat16 operands by their values; the interpreter multiplies their bits."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def widen(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widen(a), widen(b), *rest)

    InterpreterBuilder.create_dot = create_dot


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Error over the size of what is wanted, or the error itself where zero is."""
    size = want.norm().item()
    return ((got.double() - want).norm() / (size if size > 1e-12 else 1)).item()
