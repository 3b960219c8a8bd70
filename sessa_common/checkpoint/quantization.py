"""MLX's affine quantisation in NumPy, bit for bit what `mx.quantize` and `mx.dequantize` give.

A group of g neighbouring numbers of a row shares a scale and a bias: w = code * scale + bias, with
codes of `bits` bits packed lowest bit first into uint32 words. `X.weight` (out, in*bits/32) comes
with `X.scales` and `X.biases` (out, in/g) in the weight's floating type; a Linear's own bias stays
`X.bias`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from sessa_common.checkpoint.lazy_tensors import LazyTensors, Spec, spec_of
from sessa_common.errors import SessaError

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
# Numbers that are quantised in one go, so that a matrix needs little memory besides itself.
BLOCK = 2**24
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
    if len(w) > (rows := _rows_at_once(w.shape[1])):
        blocks = [quantize(w[i : i + rows], bits, group_size) for i in range(0, len(w), rows)]
        packed, scales, biases = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
        return packed, scales, biases
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
    if len(weight) > (rows := _rows_at_once(weight.shape[1] * 32 // bits)):
        cuts = [slice(i, i + rows) for i in range(0, len(weight), rows)]
        return np.concatenate([dequantize(weight[i], scales[i], biases[i], bits) for i in cuts])
    codes = unpack(weight, bits).astype(scales.dtype)
    groups = codes.reshape(*scales.shape, -1) * scales[..., None] + biases[..., None]
    return groups.astype(scales.dtype).reshape(codes.shape)


def _rows_at_once(columns: int) -> int:
    return max(1, BLOCK // max(1, columns))


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8 (out, in) -> words uint32 (out, in*bits/32), lowest bit first."""
    if 8 % bits == 0:
        octets = codes[:, :: 8 // bits].copy()
        for i in range(1, 8 // bits):
            octets |= codes[:, i :: 8 // bits] << i * bits
    else:
        stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
        octets = np.packbits(stream.reshape(len(codes), -1), axis=-1, bitorder="little")
    return octets.view("<u4").astype(np.uint32)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Words uint32 (out, in*bits/32) -> codes uint8 (out, in)."""
    octets = np.ascontiguousarray(words, dtype="<u4").view(np.uint8)
    if 8 % bits == 0:
        codes = np.empty((len(words), octets.shape[1] * 8 // bits), np.uint8)
        for i in range(8 // bits):
            codes[:, i :: 8 // bits] = octets >> i * bits & 2**bits - 1
        return codes
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
    return dict(quantize_lazily(weights, bits, group_size))


def quantize_lazily(weights: Mapping[str, np.ndarray], bits: int, group_size: int) -> LazyTensors:
    """`quantize_weights`, with every matrix quantised when its parts are read."""
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise SessaError(
            f"cannot quantise to {bits} bits in groups of {group_size}: MLX has "
            f"bits {_either(BITS)} and groups of {_either(GROUP_SIZES)}"
        )
    matrices = [name for name in weights if _is_matrix(name, spec_of(weights, name))]
    kept = set(undivided(weights, group_size))
    if matrices and len(kept) == len(matrices):
        name = matrices[0]
        raise SessaError(
            f"{name} has {spec_of(weights, name).shape[-1]} columns, which do not divide into "
            f"groups of {group_size}, nor does any other matrix; choose another group size "
            f"({_either(GROUP_SIZES)})"
        )
    # The three parts of a matrix are read one after the other.
    parts = functools.lru_cache(1)(lambda name: quantize(weights[name], bits, group_size))
    out = LazyTensors()
    for name in weights:
        if name in kept or name not in matrices:
            out.link(name, weights, name)
            continue
        spec, path = spec_of(weights, name), name.removesuffix(".weight")
        rows, columns = spec.shape
        packed = Spec((rows, columns * bits // 32), np.dtype(np.uint32))
        scales = Spec((rows, columns // group_size), spec.dtype)
        names = (name, f"{path}.scales", f"{path}.biases")
        for i, (part, its) in enumerate(zip(names, (packed, scales, scales), strict=True)):
            out.defer(part, its, lambda name=name, i=i: parts(name)[i])  # type: ignore[misc]
    return out


def undivided(weights: Mapping[str, np.ndarray], group_size: int) -> list[str]:
    """Names of the matrices that `quantize_weights` leaves as they are."""
    specs = {name: spec_of(weights, name) for name in weights}
    return [n for n, spec in specs.items() if _is_matrix(n, spec) and spec.shape[-1] % group_size]


def _is_matrix(name: str, spec: Spec) -> bool:
    return len(spec.shape) == 2 and not name.endswith("gamma_ctx.weight")


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
    return dict(dequantize_lazily(tensors, settings, width, where))


def dequantize_lazily(
    tensors: Mapping[str, np.ndarray],
    settings: Mapping[str, Any] | None,
    width: int,
    where: str,
) -> LazyTensors:
    """`dequantize_weights`, with every matrix unpacked when it is read."""
    found = packings(tensors, settings, width, where)
    spent = {f"{path}.{part}" for path in found for part in ("scales", "biases")}
    out = LazyTensors({name: value for name, value in tensors.items() if name not in spent})
    for path, packing in found.items():
        scales = tensors[f"{path}.scales"]
        spec = Spec((len(scales), scales.shape[1] * packing.group_size), scales.dtype)
        out.defer(f"{path}.weight", spec, partial(_unpacked, tensors, path, packing.bits))
    return out


def _unpacked(tensors: Mapping[str, np.ndarray], path: str, bits: int) -> np.ndarray:
    weight, scales, biases = (tensors[f"{path}.{part}"] for part in ("weight", "scales", "biases"))
    return dequantize(weight, scales, biases, bits)


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
