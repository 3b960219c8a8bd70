"""MLX's affine quantisation in NumPy, bit for bit what `mx.quantize` and `mx.dequantize` give.

A group of g neighbouring numbers of a row shares a scale and a bias: w = code * scale + bias, with
codes of `bits` bits packed lowest bit first into uint32 words. `X.weight` (out, in*bits/32) comes
with `X.scales` and `X.biases` (out, in/g) in the weight's floating type; a Linear's own bias stays
`X.bias`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sessa_common.errors import SessaError

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
# Numbers that share a scale unless another size is asked for, as in mlx-lm.
GROUP_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Packing of a quantised matrix: bits of a number, and numbers that share a scale."""

    bits: int
    group_size: int


def quantize(
    w: np.ndarray, bits: int, group_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantise w (out, in) -> weight uint32 (out, in*bits/32), scales and biases (out, in/g).

    The larger end of each group is met exactly and zero falls on a code, as in MLX.
    """
    dtype = w.dtype
    groups = w.astype(np.float32).reshape(w.shape[0], -1, group_size)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    top = np.float32(2**bits - 1)
    scale = np.maximum((high - low) / top, np.float32(1e-7))
    lower_is_larger = np.abs(low) > np.abs(high)
    scale = np.where(lower_is_larger, scale, -scale)
    edge = np.where(lower_is_larger, low, high)
    steps = np.rint(edge / scale)
    scale = np.where(steps == 0, scale, edge / np.where(steps == 0, np.float32(1), steps))
    bias = np.where(steps == 0, np.float32(0), edge)
    codes = np.clip(np.rint((groups - bias) / scale), 0, top).astype(np.uint8)
    stored = [part[..., 0].astype(dtype) for part in (scale, bias)]
    return pack(codes.reshape(w.shape), bits), stored[0], stored[1]


def dequantize(weight: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    """The numbers (out, in) that packed weights stand for, in the scales' type.

    In 16-bit types the product is rounded before the bias is added, as MLX does.
    """
    codes = unpack(weight, bits).astype(scales.dtype)
    groups = codes.reshape(*scales.shape, -1) * scales[..., None] + biases[..., None]
    return groups.astype(scales.dtype).reshape(codes.shape)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8 (out, in) -> words uint32 (out, in*bits/32), lowest bit first."""
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    octets = np.packbits(stream.reshape(len(codes), -1), axis=-1, bitorder="little")
    return octets.view("<u4").astype(np.uint32)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Words uint32 (out, in*bits/32) -> codes uint8 (out, in)."""
    octets = np.ascontiguousarray(words, dtype="<u4").view(np.uint8)
    stream = np.unpackbits(octets, axis=-1, bitorder="little").reshape(len(words), -1, bits)
    return np.packbits(stream, axis=-1, bitorder="little")[..., 0]


def is_quantized(tensors: Mapping[str, np.ndarray]) -> bool:
    """Return True when any tensor comes with scales."""
    return any(name.endswith(".scales") for name in tensors)


def quantize_weights(
    weights: Mapping[str, np.ndarray], bits: int, group_size: int
) -> dict[str, np.ndarray]:
    """Quantise the embedding and every Linear but the gain (D -> 1), as mlx-lm does.

    A matrix whose columns do not divide into groups stays as it is. Raises SessaError for bits or
    groups that MLX lacks, and when no matrix at all divides.
    """
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise SessaError(
            f"cannot quantise to {bits} bits in groups of {group_size}: MLX has "
            f"bits {_either(BITS)} and groups of {_either(GROUP_SIZES)}"
        )
    matrices = [name for name, value in weights.items() if _is_matrix(name, value)]
    kept = set(undivided(weights, group_size))
    if matrices and len(kept) == len(matrices):
        name = matrices[0]
        raise SessaError(
            f"{name} has {weights[name].shape[-1]} columns, which do not divide into groups of "
            f"{group_size}, nor does any other matrix; choose another group size "
            f"({_either(GROUP_SIZES)})"
        )
    out: dict[str, np.ndarray] = {}
    for name, value in weights.items():
        if name in kept or not _is_matrix(name, value):
            out[name] = value
            continue
        path = name.removesuffix(".weight")
        packed = quantize(value, bits, group_size)
        out |= dict(zip((name, f"{path}.scales", f"{path}.biases"), packed, strict=True))
    return out


def undivided(weights: Mapping[str, np.ndarray], group_size: int) -> list[str]:
    """Names of the matrices that `quantize_weights` leaves as they are."""
    return [
        name
        for name, value in weights.items()
        if _is_matrix(name, value) and value.shape[-1] % group_size
    ]


def _is_matrix(name: str, value: np.ndarray) -> bool:
    return value.ndim == 2 and not name.endswith("gamma_ctx.weight")


def dequantize_weights(
    tensors: Mapping[str, np.ndarray],
    settings: Mapping[str, Any] | None,
    width: int,
    where: str,
) -> dict[str, np.ndarray]:
    """Replace every X.weight, X.scales, X.biases by the weight they stand for.

    settings is config.json's "quantization", with per-path overrides; without it the groups are
    found from `width`, the number of columns. Raises SessaError when the parts do not fit together.
    """
    found = packings(tensors, settings, width, where)
    spent = {f"{path}.{part}" for path in found for part in ("scales", "biases")}
    out = {name: value for name, value in tensors.items() if name not in spent}
    for path, packing in found.items():
        weight, scales, biases = (tensors[f"{path}.{p}"] for p in ("weight", "scales", "biases"))
        out[f"{path}.weight"] = dequantize(weight, scales, biases, packing.bits)
    return out


def packings(
    tensors: Mapping[str, np.ndarray],
    settings: Mapping[str, Any] | None,
    width: int,
    where: str,
) -> dict[str, Packing]:
    """The packing of every quantised matrix, by its name without ".weight".

    Arguments and errors as in `dequantize_weights`.
    """
    paths = (name.removesuffix(".scales") for name in tensors if name.endswith(".scales"))
    return {path: _packing(tensors, path, settings or {}, width, where) for path in paths}


def _packing(
    tensors: Mapping[str, np.ndarray],
    path: str,
    settings: Mapping[str, Any],
    width: int,
    where: str,
) -> Packing:
    own = settings.get(path)
    own = {**settings, **own} if isinstance(own, dict) else settings
    if own.get("mode", "affine") != "affine" or f"{path}.biases" not in tensors:
        raise SessaError(
            f"{where}: {path} is quantised in mode {own.get('mode', 'without biases')}; only "
            "affine can be read (`mlx_lm.convert -d` undoes the others)"
        )
    weight, scales, biases = (tensors.get(f"{path}.{p}") for p in ("weight", "scales", "biases"))
    assert scales is not None and biases is not None
    packed = weight is not None and weight.dtype == np.uint32 and weight.ndim == 2
    if weight is None or not packed or scales.ndim != 2 or not scales.size:
        raise SessaError(f"{where}: {path}.weight is not a packed uint32 matrix beside its scales")
    columns = scales.shape[1] * own["group_size"] if "group_size" in own else width
    bits = weight.shape[1] * 32 / columns
    fits = scales.shape == biases.shape and len(scales) == len(weight) and bits in BITS
    if not fits or columns % scales.shape[1] or own.get("bits", bits) != bits:
        stated = f"{own['bits']} bits" if "bits" in own else "no stated bits"
        raise SessaError(
            f"{where}: {path} has packed shape {weight.shape}, scales {scales.shape} and biases "
            f"{biases.shape}: not affine groups of {columns // scales.shape[1]} ({stated})"
        )
    return Packing(bits=int(bits), group_size=columns // scales.shape[1])


def _either(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
