"""Launches of the graphs that MLX exports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import mlx.core as mx
from support.mlx_pool import VIEWS, primitives

from sessa_mlx.feedback import gpu, metal, products

Graph = list[dict[str, Any]]


def solve_graphs(
    module: ModuleType, T: int, D: int, dtype: mx.Dtype, B: int = 1
) -> tuple[list[mx.array], Graph, Graph]:
    """Inputs (B, T, D), and the graphs of the forward pass and of both passes of a solve.

    A fused function is one primitive.
    """
    arrays = [mx.zeros((B, T, D), dtype) for _ in range(3)] + [mx.zeros((B, T))]

    def forward(*given: mx.array) -> list[mx.array]:
        return [module.solve_forward(*given)[0]]

    def both(*given: mx.array) -> list[mx.array]:
        s, sums = module.solve_forward(*given)
        return list(module.solve_backward(given[0], *given[1:], s, sums)[:4])

    with _fused_as_one():
        return arrays, primitives(forward, *arrays), primitives(both, *arrays)


def launches(graph: Graph) -> int:
    """Launches of a graph: one a primitive that computes, and one a part that is concatenated."""
    computing = [record for record in graph if record["name"] not in VIEWS]
    return sum(len(r["inputs"]) if r["name"] == "Concatenate" else 1 for r in computing)


@contextmanager
def _fused_as_one() -> Iterator[None]:
    with ExitStack() as patches:
        for module in (products, gpu, metal):
            patches.enter_context(mock.patch.object(module, "fused", _fused_kernel))
        yield


def _fused_kernel(function: Callable[..., Any], *constants: Any) -> Callable[..., Any]:
    """Stand-in for `products.fused`, because an export spells out a compiled function."""

    def call(*arrays: mx.array) -> Any:
        results = function(*constants, *arrays)
        outputs = results if isinstance(results, (tuple, list)) else [results]
        kernel: Any = mx.fast.metal_kernel(
            name=f"fused{function.__name__}",
            input_names=[f"input_{i}" for i in range(len(arrays))],
            output_names=[f"output_{i}" for i in range(len(outputs))],
            source="uint place = thread_position_in_grid.x;",
        )
        made = kernel(
            inputs=list(arrays),
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[x.shape for x in outputs],
            output_dtypes=[x.dtype for x in outputs],
        )
        return made if len(made) > 1 else made[0]

    return call
