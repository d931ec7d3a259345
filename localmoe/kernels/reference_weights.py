"""What weights hold, as float32 arrays: numpy twins; knows no op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from localmoe.errors import UnsupportedError
from localmoe.formats import Bytes, Format, Weight
from localmoe.kernels.program import Floats

Array = npt.NDArray[Any]


def dequantise(data: Bytes, format: Format) -> Floats:
    """Blocks -> float32 values, by the `gguf` package (which follows ggml's dequantize_row functions)."""
    if format.name == "F32":
        return data.view(np.float32)
    if format.name == "F16":
        return data.view(np.float16).astype(np.float32)
    if format.name == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if format.name in _UNKNOWN_TO_GGUF:
        return _UNKNOWN_TO_GGUF[format.name](data.reshape(-1, format.nbytes)).reshape(-1)
    from gguf import GGMLQuantizationType, quants

    try:
        return quants.dequantize(data, GGMLQuantizationType(format.id)).reshape(-1).astype(np.float32)
    except (NotImplementedError, ValueError, KeyError) as error:
        raise UnsupportedError(f"the reference device cannot dequantise {format.name} blocks") from error


def _half(blocks: Array) -> Floats:
    """The float16 that blocks begin with, (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)


def _q1_0(blocks: Array) -> Floats:
    """A float16 scale, then 128 sign bits, a set one positive."""
    signs = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").astype(bool)
    return np.where(signs, _half(blocks), -_half(blocks))


def _q2_0(blocks: Array) -> Floats:
    """A float16 scale, then 64 times two bits, the lowest first: -1 to 2."""
    two = (blocks[:, 2:, None] >> np.arange(0, 8, 2, dtype=np.uint8)) & 3
    return _half(blocks) * (two.reshape(len(blocks), -1).astype(np.float32) - 1)


def _q8_k(blocks: Array) -> Floats:
    """A float32 scale, then 256 whole numbers; sums of 16 follow, that only products need."""
    scale = np.ascontiguousarray(blocks[:, :4]).view(np.float32)
    return np.asarray(scale * blocks[:, 4:260].view(np.int8))


def _f8_e4m3(blocks: Array) -> Floats:
    """A sign, four bits of exponent (bias 7, 0: subnormal) and three of the fraction."""
    bits = blocks.astype(np.int32)
    exponent, fraction = (bits >> 3) & 15, (bits & 7).astype(np.float32)
    size = np.where(exponent == 0, np.ldexp(fraction, -9), np.ldexp(fraction + 8, exponent - 10))
    return np.asarray(np.where(bits & 128, -size, size), np.float32)


_UNKNOWN_TO_GGUF: dict[str, Callable[[Array], Floats]] = {
    "Q1_0": _q1_0, "Q2_0": _q2_0, "Q8_K": _q8_k, "F8_E4M3": _f8_e4m3,
}  # fmt: skip


def values(weight: Weight) -> Floats:
    """All values of a weight, in its shape."""
    return np.stack([matrix(weight, i) for i in range(len(weight.slabs))]).reshape(weight.shape)


def matrix(weight: Weight, index: int = 0) -> Floats:
    """One matrix of a weight, (rows, columns)."""
    return rows(weight, 0, weight.rows, index)


def rows(weight: Weight, start: int, stop: int, index: int = 0) -> Floats:
    """Rows of one matrix of a weight, (stop - start, columns)."""
    data = weight.slabs[index][start * weight.row_nbytes : stop * weight.row_nbytes]
    plain = dequantise(data, weight.format).reshape(stop - start, weight.columns)
    return plain * weight.scales[index].of_rows(start, stop, weight.columns) if weight.scales else plain
