"""Quantisation in NumPy against MLX, bit for bit, on ordinary and awkward groups."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from sessa_common.checkpoint.quantization import (
    BITS,
    GROUP_SIZES,
    dequantize,
    dequantize_weights,
    pack,
    quantize,
    quantize_weights,
    undivided,
    unpack,
)
from sessa_common.errors import SessaError

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def matrix(group_size: int, dtype: str) -> np.ndarray:
    """Rows that are ordinary, of one sign, constant, zero, tiny, or have one far outlier."""
    w = np.random.default_rng(group_size).normal(size=(9, 3 * group_size)).astype(np.float32)
    w[1], w[2] = np.abs(w[1]) + 0.5, -np.abs(w[2]) - 0.5
    w[3], w[4], w[5] = 0.75, 0.0, -0.75
    w[6] *= 1e-6
    w[7, ::group_size] = 40.0
    return w.astype(DTYPES[dtype])


def to_mlx(array: np.ndarray):
    mx = pytest.importorskip("mlx.core")
    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def from_mlx(array) -> np.ndarray:
    mx = pytest.importorskip("mlx.core")
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_quantize_equals_mlx(bits, group_size, dtype):
    mx = pytest.importorskip("mlx.core")
    w = matrix(group_size, dtype)
    want = mx.quantize(to_mlx(w), group_size=group_size, bits=bits)
    for got, expected in zip(quantize(w, bits, group_size), want, strict=True):
        assert got.dtype == from_mlx(expected).dtype
        np.testing.assert_array_equal(got.astype(np.float64), from_mlx(expected).astype(np.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_equals_mlx(bits, group_size, dtype):
    mx = pytest.importorskip("mlx.core")
    parts = mx.quantize(to_mlx(matrix(group_size, dtype)), group_size=group_size, bits=bits)
    want = from_mlx(mx.dequantize(*parts, group_size=group_size, bits=bits))
    got = dequantize(*map(from_mlx, parts), bits)
    assert got.dtype == want.dtype
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("bits", BITS)
def test_pack_and_unpack_are_inverse(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 96), dtype=np.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 3 * bits)
    np.testing.assert_array_equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_error_is_at_most_half_a_step(bits):
    w = matrix(64, "float32")[:3]
    packed, scales, biases = quantize(w, bits, 64)
    error = np.abs(dequantize(packed, scales, biases, bits) - w).reshape(3, -1, 64).max(-1)
    # Moving zero onto a code costs up to half a step more at the smaller end.
    assert (error <= np.abs(scales) * 1.01).all()
    assert (error > 0).any()


def test_blocks_of_rows_give_the_same_bits(monkeypatch):
    w = matrix(64, "float32")
    parts = quantize(w, 4, 64)
    whole = dequantize(*parts, 4)
    monkeypatch.setattr("sessa_common.checkpoint.quantization.BLOCK", 2 * w.shape[1])
    for got, want in zip(quantize(w, 4, 64), parts, strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(dequantize(*parts, 4), whole)


def model_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (8, 64), "a.bias": (8,), "mixer.gamma_ctx.weight": (1, 64)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_quantize_weights_leaves_the_gain_and_vectors():
    weights = model_tensors()
    packed = quantize_weights(weights, 4, 32)
    assert packed["a.weight"].dtype == np.uint32
    assert packed["a.scales"].shape == (8, 2)
    assert packed["a.bias"] is weights["a.bias"]
    assert packed["mixer.gamma_ctx.weight"] is weights["mixer.gamma_ctx.weight"]


STATED = {
    "stated": {"group_size": 32, "bits": 4},
    "override": {"group_size": 64, "bits": 8, "a": {"group_size": 32, "bits": 4}},
    "from-shapes": None,
}


@pytest.mark.parametrize("settings", STATED.values(), ids=STATED)
def test_dequantize_weights_finds_the_groups(settings):
    packed = quantize_weights(model_tensors(), 4, 32)
    got = dequantize_weights(packed, settings, 64, "here")
    assert got.keys() == model_tensors().keys()
    parts = [packed[f"a.{part}"] for part in ("weight", "scales", "biases")]
    np.testing.assert_array_equal(got["a.weight"], dequantize(*parts, 4))


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({}, {"group_size": 32, "bits": 8}, "8 bits"),
        ({}, {"group_size": 32, "mode": "mxfp4"}, "mxfp4"),
        ({"a.biases": None}, None, "without biases"),
        ({"a.weight": np.zeros((8, 64), np.float32)}, None, "packed uint32"),
        ({"a.scales": np.zeros((7, 2), np.float32)}, None, "scales (7, 2)"),
        ({"a.weight": np.zeros((8, 7), np.uint32)}, None, "(8, 7)"),
    ],
    ids=["bits", "mode", "no-biases", "not-packed", "rows", "columns"],
)
def test_parts_that_do_not_fit_are_named(change, settings, message):
    tensors = {**quantize_weights(model_tensors(), 4, 32), **change}
    tensors = {name: value for name, value in tensors.items() if value is not None}
    with pytest.raises(SessaError) as error:
        dequantize_weights(tensors, settings, 64, "somewhere")
    assert message in str(error.value) and "somewhere" in str(error.value)


@pytest.mark.parametrize(("bits", "group_size"), [(7, 32), (4, 48), (4, 128)])
def test_what_mlx_cannot_hold_is_refused(bits, group_size):
    with pytest.raises(SessaError, match="groups of"):
        quantize_weights(model_tensors(), bits, group_size)


def test_a_matrix_that_does_not_divide_into_groups_stays_as_it_is():
    tensors = {**model_tensors(), "odd.weight": np.ones((4, 33), np.float32)}
    packed = quantize_weights(tensors, 4, 32)
    assert packed["odd.weight"] is tensors["odd.weight"] and "odd.scales" not in packed
    assert undivided(tensors, 32) == ["odd.weight"]
