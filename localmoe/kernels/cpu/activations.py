"""The forms in which kernels read activations, and the kernels that make them; knows no weight format.

For K columns, one row is, without gaps unless said (all integers signed):

- f32:    float32[K].
- q8_32:  int8[K] | padding to 64 | float32 scale[K/32].                           K % 32 == 0
- q8_256: int8[K] | int16 sum32[K/32] | int16 sum16[K/16] | float32 scale[K/256].  K % 256 == 0

x ≈ int8 · scale, scale = max|x| / 127 in a block of 32 or 256, rounded to nearest even, so never -128. sum32 and sum16
are the sums of 32 and 16 neighbouring int8. A block whose max|x| is below 1e-30 becomes zero; NaN or infinity in a
block makes its scale NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from localmoe.kernels.cpu.build import kernel

KINDS = ("f32", "q8_32", "q8_256")
QUANTISERS = {"q8_32": "quantise_q8_32", "q8_256": "quantise_q8_256"}
_SMALLEST = np.float32(1e-30)


def activation_nbytes(kind: str, columns: int) -> int:
    """Bytes of one row of `columns` activations, a multiple of 64 so that rows may follow each other."""
    if kind == "q8_32":
        used = (columns + 63) // 64 * 64 + columns // 32 * 4
    elif kind == "q8_256":
        used = columns + columns // 32 * 2 + columns // 16 * 2 + columns // 256 * 4
    else:
        assert kind == "f32", kind
        used = columns * 4
    return (used + 63) // 64 * 64


def _scale(v: Any) -> Any:
    """(address, elements) -> (scale of the block, what to multiply its values with)."""

    def scale(x, elements):
        peak, wrong = v.zero(v.f32), v.zero(v.f32)
        for i in range(0, elements, v.lanes):
            values = v.load(v.f32, x + i * 4)
            peak = v.maximum(v.absolute(values), peak)
            wrong = v.fma(values, v.zero(v.f32), wrong)
        largest = v.largest(peak)
        nothing = v.total(wrong)
        if largest < _SMALLEST:
            return nothing, np.float32(0)
        return largest / np.float32(127) + nothing, np.float32(127) / largest

    return v.function(scale)


@kernel("quantise_q8_32", arguments=3)
def quantise_q8_32(v: Any) -> Callable[..., None]:
    """(x float32, activations q8_32, columns)"""
    scale = _scale(v)
    lanes = v.lanes
    bytes_kind = getattr(v, f"i8x{lanes}")

    def quantise(x, activations, columns):
        scales = activations + ((columns + 63) & -64)
        for block in range(columns >> 5):
            source = x + block * 128
            size, inverse = scale(source, 32)
            v.store(scales + block * 4, size)
            for i in range(0, 32, lanes):
                values = v.nearest(v.load(v.f32, source + i * 4) * inverse)
                v.store(activations + block * 32 + i, v.convert(bytes_kind, values))

    return quantise


def _sums_of_sixteen(v: Any) -> Any:
    """(address of 16 · lanes int8) -> i32 of all lanes: sums of 16 neighbours, in order."""
    lanes = v.lanes
    even, odd = (v.shuffle([*range(side, 2 * lanes, 2)]) for side in (0, 1))
    bytes_kind, ones = getattr(v, f"i8x{4 * lanes}"), v.constants(getattr(v, f"u8x{4 * lanes}"), 1)

    def sums(p):
        a = v.dot(v.zero(v.i32), ones(), v.load(bytes_kind, p))
        b = v.dot(v.zero(v.i32), ones(), v.load(bytes_kind, p + 4 * lanes))
        c = v.dot(v.zero(v.i32), ones(), v.load(bytes_kind, p + 8 * lanes))
        d = v.dot(v.zero(v.i32), ones(), v.load(bytes_kind, p + 12 * lanes))
        a, c = even(a, b) + odd(a, b), even(c, d) + odd(c, d)
        return even(a, c) + odd(a, c)

    return v.function(sums)


@kernel("quantise_q8_256", arguments=3)
def quantise_q8_256(v: Any) -> Callable[..., None]:
    """(x float32, activations q8_256, columns)"""
    scale, sixteen, one_each = _scale(v), _sums_of_sixteen(v), v.constants(v.i16x16, 1)
    lanes = v.lanes
    bytes_kind, words_kind = getattr(v, f"i8x{lanes}"), getattr(v, f"i16x{lanes}")

    def quantise(x, activations, columns):
        sums32 = activations + columns
        sums16 = sums32 + (columns >> 4)
        scales = sums16 + (columns >> 3)
        for block in range(columns >> 8):
            source, target, sums = x + block * 1024, activations + block * 256, sums16 + block * 32
            size, inverse = scale(source, 256)
            v.store(scales + block * 4, size)
            for i in range(0, 256, lanes):
                v.store(target + i, v.convert(bytes_kind, v.nearest(v.load(v.f32, source + i * 4) * inverse)))
            for i in range(0, 16, lanes):
                v.store(sums + 2 * i, v.convert(words_kind, sixteen(target + 16 * i)))
            pairs = v.word_pairs(v.load(v.i16x16, sums), one_each())
            v.store(sums32 + block * 16, v.convert(v.i16x8, pairs))

    return quantise
