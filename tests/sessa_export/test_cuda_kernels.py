"""The native operator's CUDA kernels, run on the processor, against the float64 reference."""

from __future__ import annotations

import pytest
from onnx import TensorProto
from support.cuda_kernels import solve_emulated
from support.ort_op_cases import LIMITS, REAL, draw, error

FLOAT, HALF, BFLOAT = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16


@pytest.mark.parametrize("P", [0, 1, 5, 70])
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 65, 257])
def test_lengths(T, P):
    for mask in (None, "holes"):
        arrays = draw([T, P], T=T, P=P, mask=mask)
        assert error(solve_emulated(arrays), arrays) < LIMITS[FLOAT], mask


@pytest.mark.parametrize("T", [1, 16, 40])
@pytest.mark.parametrize("D, K", [(1, 1), (3, 67), (16, 32), (33, 1), (129, 65), (300, 80)])
def test_widths(D, K, T):
    arrays = draw([D, K, T], T=T, D=D, K=K, P=9, mask="left")
    assert error(solve_emulated(arrays), arrays) < LIMITS[FLOAT]


@pytest.mark.parametrize("T", [1, 3, 16, 20])
def test_a_long_past_is_read_in_parts_and_chunks(T):
    arrays = draw(T, T=T, P=1700, mask="holes", logits=20.0)
    for hidden in (slice(0), slice(0, 900), slice(200, 1650)):
        arrays["key_mask"][1, hidden] = False
        assert error(solve_emulated(arrays), arrays) < LIMITS[FLOAT], hidden


@pytest.mark.parametrize("T", [1, 5, 40])
@pytest.mark.parametrize("type", [HALF, BFLOAT])
@pytest.mark.parametrize("what", [REAL, ("q", "k"), ("past_s",), ("f", "gamma")], ids=str)
def test_types(what, type, T):
    types = dict.fromkeys(what, type)
    arrays = draw([T, type], T=T, P=30, mask="holes")
    limit = LIMITS[type if "f" in what else FLOAT]
    assert error(solve_emulated(arrays, types), arrays, types) < limit


@pytest.mark.parametrize("T, P", [(1, 3), (16, 3), (17, 3), (260, 0)])
def test_rows_without_gain_or_keys_keep_their_bits(T, P):
    arrays = draw([T, P], T=T, P=P, gain=0.0, mask="holes")
    assert (solve_emulated(arrays) == arrays["f"]).all()
    arrays = draw([T, P], T=T, P=P, mask="closed")
    assert (solve_emulated(arrays) == arrays["f"]).all()
