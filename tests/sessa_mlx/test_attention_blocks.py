"""Attention by blocks of rows against MLX's own, its memory, and what it launches on Metal."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from sessa_mlx import _exp, attention_blocks
from sessa_mlx.attention import causal_attention

# B, H, G, T, P, width of queries and keys, width of values, padded
CASES = [
    (2, 4, 2, 300, 0, 16, 16, False),
    (2, 4, 1, 200, 37, 24, 16, True),
    (1, 6, 3, 450, 5, 8, 12, True),
    (1, 2, 2, 9, 0, 8, 8, False),
]


def operands(case: tuple[Any, ...], dtype: mx.Dtype) -> tuple[list[mx.array], mx.array | None]:
    """q, k, v, gradient of the output; and the mask, with garbage in the hidden keys."""
    B, H, G, T, P, K, d, padded = case
    rng = np.random.default_rng(T)
    shapes = (B, H, T, K), (B, G, P + T, K), (B, G, P + T, d), (B, H, T, d)
    q, k, v, dout = (rng.standard_normal(shape) for shape in shapes)
    mask = None
    if padded:
        visible = rng.random((B, P + T)) > 0.3
        visible[0, : P + T // 2] = False
        k[~visible[:, None, :].repeat(G, 1)] = np.nan
        v[~visible[:, None, :].repeat(G, 1)] = np.inf
        mask = mx.array(visible)
    with mx.stream(mx.cpu):
        return [mx.array(x, dtype=mx.float64).astype(dtype) for x in (q, k, v, dout)], mask


def whole(q: mx.array, k: mx.array, v: mx.array, key_mask: mx.array | None) -> mx.array:
    """The definition, with all T x S scores."""
    T, S = q.shape[2], k.shape[2]
    row, column = mx.arange(S - T, S)[:, None], mx.arange(S)
    visible = column <= row
    if key_mask is not None:
        visible = visible & (key_mask[:, None, None] | (column == row))
        k, v = (mx.where(key_mask[:, None, :, None], x, 0) for x in (k, v))
    k, v = (mx.repeat(x, q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = mx.where(visible, q @ k.swapaxes(2, 3) * q.shape[-1] ** -0.5, -mx.inf)
    return mx.softmax(scores, -1) @ v


def with_gradients(attention: Any, arrays: list[mx.array], mask: mx.array | None) -> list[Any]:
    *primals, dout = arrays
    out, gradients = mx.vjp(lambda q, k, v: attention(q, k, v, mask), primals, [dout])
    return [np.array(x.astype(mx.float64)) for x in (*out, *gradients)]


@pytest.mark.parametrize(
    ("dtype", "limit"), [(mx.float64, 1e-12), (mx.float32, 3e-6), (mx.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(case: tuple[Any, ...], dtype: mx.Dtype, limit: float) -> None:
    with mx.stream(mx.cpu):
        arrays, mask = operands(case, dtype)
        got = with_gradients(causal_attention, arrays, mask)
        exact = with_gradients(whole, [x.astype(mx.float64) for x in arrays], mask)
    for name, x, want in zip(("out", "dq", "dk", "dv"), got, exact, strict=True):
        assert np.isfinite(x).all(), name
        assert np.abs(x - want).max() < limit * np.abs(want).max(), name


def peak_bytes(T: int) -> int:
    q, k, v = (mx.zeros((1, 2, T, 16)) for _ in range(3))
    mx.eval(q, k, v)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.grad(lambda *a: causal_attention(*a).sum(), argnums=(0, 1, 2))(q, k, v))
    return mx.get_peak_memory() - before


def test_memory_doubles_with_the_length() -> None:
    short, long = (peak_bytes(T) for T in (2048, 4096))
    assert long < 2.1 * short


def exported(function: Any, *arrays: mx.array) -> tuple[Counter[str], int]:
    """Occurrences of each operation in the graph, and the numbers in the largest array."""
    names, sizes = Counter[str](), [0]

    def keep(record: dict[str, Any]) -> None:
        if record["type"] == "primitive" and record["name"] != "Broadcast":
            names[record["name"]] += 1
            sizes.extend(int(np.prod(shape)) for _, shape, _ in record["outputs"])

    mx.export_function(keep, function, *arrays)
    return names, max(sizes)


def test_metal_launches_and_sizes() -> None:
    """On Metal: one fused kernel forward, and backward five products for a block of 256 rows."""
    T, H = 2048, 12
    arrays = [mx.zeros((1, H, T, 64), mx.bfloat16)] * 5
    on_metal = {"_on_gpu": lambda: True, "_has_fused_forward": lambda q, v: True}
    rows = {mx.default_device().type: 256}
    with (
        mock.patch.multiple(attention_blocks, **on_metal, ROWS=rows),
        mock.patch.object(_exp, "_slow", return_value=False),
        mock.patch.object(
            attention_blocks, "_fused", side_effect=lambda q, *rest: mx.abs(q)
        ) as fused,
    ):
        exported(attention_blocks.attention_forward, *arrays[:3])
        names, largest = exported(attention_blocks.attention_backward, *arrays)
    assert fused.call_count == 1
    assert names["Matmul"] == 5 * T // 256 and names["Softmax"] == T // 256
    assert largest == H * 256 * T
    # Views, shapes and types aside, before mx.compile merges neighbours.
    free = {"AsType", "Slice", "Transpose", "Reshape", "ExpandDims", "Squeeze", "Unflatten"}
    assert sum(names[name] for name in names.keys() - free) <= 22 * T // 256


def test_a_mask_of_documents_is_tried_before_it_is_used() -> None:
    """Fused attention is used under a mask where it has the gradients of the blocks."""
    works = attention_blocks._masks_work.__wrapped__
    assert works(mx.float32)
    with mock.patch.object(attention_blocks, "_under_mask", lambda q, *rest: q):
        assert not works(mx.float32)
    with mock.patch.object(attention_blocks, "_under_mask", side_effect=RuntimeError):
        assert not works(mx.float32)
