"""Rows of the KV cache in memory: their bytes, and how float32 become a row, to the bits of `kernels/cache_blocks.py`,
which says what they are; knows no op.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from localmoe.formats import F16, F32, Format
from localmoe.kernels.cache_blocks import BLOCK, KEPT, SCALE_NBYTES, SMALLEST
from localmoe.kernels.cpu import rotation


def row_nbytes(v: Any, format: Format) -> Any:
    """`nbytes(columns)` in a kernel: of so many columns of a row, whole blocks."""
    elements, nbytes = format.elements, format.nbytes

    def columns_nbytes(columns):
        return columns // elements * nbytes

    return v.function(columns_nbytes)


def writer(v: Any, format: Format) -> Any:
    """`write(source, target, width)` in a kernel: `width` float32 into a row whose padding is zero, or becomes it."""
    if format.elements > 1:
        return _quantising_writer(v, format)
    put, element = v.store_half if format is F16 else v.store, format.nbytes
    assert format in (F16, F32), format.name

    def write(source, target, width):
        whole = width - width % v.lanes
        for i in range(0, whole, v.lanes):
            put(target + element * i, v.load(v.f32, source + 4 * i))
        for i in range(whole, width):
            put(target + element * i, v.load(v.float32, source + 4 * i))

    return v.function(write)


def _quantising_writer(v: Any, format: Format) -> Any:
    lanes, nbytes = v.lanes, format.nbytes
    quantise = {"Q8_0": _q8_0, "Q4_0": _q4_0}[format.name](v)
    stack, turn = v.stack(4 * BLOCK), rotation.row_turner(v)

    def write(source, target, width):
        room = stack()
        for start in range(0, width, BLOCK):
            if width - start >= BLOCK:
                for i in range(0, BLOCK, lanes):
                    v.store(room + 4 * i, v.load(v.f32, source + 4 * (start + i)))
            else:
                for i in range(0, BLOCK, lanes):
                    v.store(room + 4 * i, v.zero(v.f32))
                for i in range(start, width):
                    v.store(room + 4 * (i - start), v.load(v.float32, source + 4 * i))
            turn(room, BLOCK, KEPT)
            quantise(room, target + start // BLOCK * nbytes)

    return v.function(write)


def _peak(v: Any) -> Any:
    """(32 float32) -> max|x|, and 0, or NaN where one of them is no number."""

    def peak(source):
        peaks, wrong = v.zero(v.f32), v.zero(v.f32)
        for i in range(0, BLOCK, v.lanes):
            values = v.load(v.f32, source + 4 * i)
            peaks = v.maximum(v.absolute(values), peaks)
            wrong = v.fma(values, v.zero(v.f32), wrong)
        return v.largest(peaks), v.total(wrong)

    return v.function(peak)


def _q8_0(v: Any) -> Any:
    lanes, bytes_kind, peak = v.lanes, getattr(v, f"i8x{v.lanes}"), _peak(v)

    def quantise(source, target):
        size, wrong = peak(source)
        scale = size / np.float32(127) + wrong
        inverse = np.float32(1) / scale if scale > SMALLEST else np.float32(0)
        v.store_half(target, scale)
        for i in range(0, BLOCK, lanes):
            quants = v.nearest(v.load(v.f32, source + 4 * i) * inverse)
            v.store(target + SCALE_NBYTES + i, v.convert(bytes_kind, quants))

    return v.function(quantise)


def _q4_0(v: Any) -> Any:
    lanes, bytes_kind, peak = v.lanes, getattr(v, f"i8x{v.lanes}"), _peak(v)
    magic, one = np.float32(12582912), np.float32(1)  # 1.5 · 2^23 rounds to the nearest whole number

    def four(source, inverse):
        x = v.load(v.f32, source) * inverse + np.float32(8.5)
        near = (x + magic) - magic
        below = v.above(near, x, near - one, near)
        return v.nearest(v.minimum(below, v.splat(v.f32, np.float32(15))))

    four = v.function(four)

    def quantise(source, target):
        size, wrong = peak(source)
        signed = size
        for i in range(BLOCK - 1, -1, -1):
            x = v.load(v.float32, source + 4 * i)
            signed = x if abs(x) == size else signed
        scale = signed / np.float32(-8) + wrong
        inverse = one / scale if abs(scale) > SMALLEST else np.float32(0)
        v.store_half(target, scale)
        for i in range(0, BLOCK // 2, lanes):
            low, high = four(source + 4 * i, inverse), four(source + 4 * (i + BLOCK // 2), inverse)
            v.store(target + SCALE_NBYTES + i, v.convert(bytes_kind, low | (high << 4)))

    return v.function(quantise)
