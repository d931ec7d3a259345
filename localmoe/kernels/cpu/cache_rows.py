"""Rows of the KV cache in memory, as GGUF's F32, F16 or Q8_0: their bytes, and how float32 become a row; knows no op.

A row is padded with zeros to whole blocks and at least whole vectors (`program.cache_row`). A block of Q8_0 is a
float16 scale, max|x| / 127 of its 32 values, then their int8: x / scale to the nearest, ties to even (ggml-quants.c,
quantize_row_q8_0, with the scale before it is rounded). A scale below 1e-30 makes them zero; NaN or infinity in a block
makes its scale NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from localmoe.formats import F16, F32, Format

SCALE_NBYTES = 2  # before the int8 of a block
_SMALLEST = np.float32(1e-30)


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
    lanes, elements, nbytes = v.lanes, format.elements, format.nbytes
    bytes_kind, stack = getattr(v, f"i8x{lanes}"), v.stack(4 * elements)

    def quantise_block(source, target):
        peak, wrong = v.zero(v.f32), v.zero(v.f32)
        for i in range(0, elements, lanes):
            values = v.load(v.f32, source + 4 * i)
            peak = v.maximum(v.absolute(values), peak)
            wrong = v.fma(values, v.zero(v.f32), wrong)
        scale = v.largest(peak) / np.float32(127) + v.total(wrong)
        inverse = np.float32(1) / scale if scale > _SMALLEST else np.float32(0)
        v.store_half(target, scale)
        for i in range(0, elements, lanes):
            quants = v.nearest(v.load(v.f32, source + 4 * i) * inverse)
            v.store(target + SCALE_NBYTES + i, v.convert(bytes_kind, quants))

    quantise = v.function(quantise_block)

    def write(source, target, width):
        tail, whole = stack(), width - width % elements
        for i in range(0, whole, elements):
            quantise(source + 4 * i, target + i // elements * nbytes)
        if whole < width:
            for i in range(0, elements, lanes):
                v.store(tail + 4 * i, v.zero(v.f32))
            for i in range(whole, width):
                v.store(tail + 4 * (i - whole), v.load(v.float32, source + 4 * i))
            quantise(tail, target + whole // elements * nbytes)

    return v.function(write)
