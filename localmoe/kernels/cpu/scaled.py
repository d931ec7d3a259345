"""Formats whose scales lie beside the values, F8_E4M3 and NVFP4: dequantised, and times a vector; knows no threads.

Here `weights` is the address of a record, eight bytes each: where row 0 begins, where the scales (float32) begin, bytes
of a row of them, rows and columns that share one, and the row of the scales' own matrix that row 0 is. Values of
F8_E4M3 become float16 by moving bits, whose exponents mean 8 less than e4m3's: no table, subnormals included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from localmoe.formats import Scales, Weight
from localmoe.kernels.cpu.arguments import slots
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.cpu.dequantise_grids import nvfp4
from localmoe.kernels.cpu.rows import stream

OF_FLOAT16 = np.float32(2.0**8)
BLOCK, BLOCK_NBYTES = 64, 36  # NVFP4


def record(weight: Weight, matrix: int) -> tuple[tuple[int, ...], npt.NDArray[np.float32]]:
    """The numbers of a matrix's record, and the scales, which must live as long as it."""
    ones = Scales(np.ones((1, 1), np.float32), weight.rows, weight.columns)
    scales = weight.scales[matrix] if weight.scales else ones
    values = np.ascontiguousarray(scales.values)
    place = (weight.slabs[matrix].ctypes.data, values.ctypes.data, values.strides[0])
    return (*place, scales.rows, scales.columns, scales.first), values


def _scales_of(v: Any) -> Any:
    """(record, row) -> the address of the row's scales."""
    slot = slots(v)

    def scales_of(matrix, row):
        return slot(matrix, 1) + (slot(matrix, 5) + row) // slot(matrix, 3) * slot(matrix, 2)

    return v.function(scales_of)


def _e4m3(v: Any, lanes: int) -> Any:
    """(address) -> as many values, each 1/256 of what it stands for; `lanes` 0: a single one."""
    if not lanes:

        def one(p):
            return v.half((v.load(v.int8, p) << 7) & 0xBFFF)

        return v.function(one)
    bytes_of, words = getattr(v, f"i8x{lanes}"), getattr(v, f"i16x{lanes}")

    def many(p):
        return v.half((v.convert(words, v.load(bytes_of, p)) << 7) & (0xBFFF - 0x10000))  # all but a second sign bit

    return v.function(many)


@kernel("dequantise_f8_e4m3", arguments=6)
def dequantise_f8_e4m3(v: Any) -> Callable[..., None]:
    slot, scales_of, many, one = slots(v), _scales_of(v), _e4m3(v, 16), _e4m3(v, 0)

    def dequantise(weights, row_nbytes, row, start, destination, elements):
        p, scales, each = slot(weights, 0) + row * row_nbytes + start, scales_of(weights, row), slot(weights, 4)
        k = 0
        while k < elements:
            column = (start + k) // each
            stop = min(elements, (column + 1) * each - start)
            d = v.load(v.float32, scales + 4 * column)
            whole = stop - (stop - k) % 16
            for i in range(k, whole, 16):
                v.store(destination + 4 * i, many(p + i) * OF_FLOAT16 * d)
            for i in range(whole, stop):
                v.store(destination + 4 * i, one(p + i) * OF_FLOAT16 * d)
            k = stop

    return dequantise


@kernel("gemv_f8_e4m3", arguments=7)
def gemv_f8_e4m3(v: Any) -> Callable[..., None]:
    slot, scales_of, lanes = slots(v), _scales_of(v), v.lanes
    many, one = _e4m3(v, lanes), _e4m3(v, 0)
    first_lines, places, follow = stream(v)

    def gemv(weights, row_nbytes, activations, out, columns, row_start, row_stop):
        begin, each = slot(weights, 0), slot(weights, 4)
        end = begin + row_stop * row_nbytes
        first_lines(begin + row_start * row_nbytes, end, row_nbytes)
        for row in range(row_start, row_stop):
            w, scales = begin + row * row_nbytes, scales_of(weights, row)
            far, near = places(w, end, row_nbytes)
            sums, total = v.zero(v.f32), np.float32(0)
            for k in range(0, columns, each):
                stop = min(columns, k + each)
                d = v.load(v.float32, scales + k // each * 4) * OF_FLOAT16
                whole, twos = stop - (stop - k) % lanes, stop - (stop - k) % (2 * lanes)
                a, b, few = v.zero(v.f32), v.zero(v.f32), np.float32(0)
                follow(far, near, k, stop)
                for i in range(k, twos, 2 * lanes):
                    x = activations + 4 * i
                    a = v.fma(many(w + i), v.load(v.f32, x), a)
                    b = v.fma(many(w + i + lanes), v.load(v.f32, x + 4 * lanes), b)
                for i in range(twos, whole, lanes):
                    a = v.fma(many(w + i), v.load(v.f32, activations + 4 * i), a)
                for i in range(whole, stop):
                    few += one(w + i) * v.load(v.float32, activations + 4 * i)
                sums, total = v.fma(a + b, v.splat(v.f32, d), sums), total + few * d
            v.store(out + row * 4, v.total(sums) + total)

    return gemv


@kernel("dequantise_nvfp4", arguments=6)
def dequantise_nvfp4(v: Any) -> Callable[..., None]:
    slot, scales_of, block = slots(v), _scales_of(v), v.function(nvfp4(v))

    def dequantise(weights, row_nbytes, row, start, destination, elements):
        p, scales, each = slot(weights, 0) + row * row_nbytes, scales_of(weights, row), slot(weights, 4)
        for i in range(0, elements, BLOCK):
            y, d = destination + 4 * i, v.load(v.float32, scales + (start + i) // each * 4)
            block(p + (start + i) // BLOCK * BLOCK_NBYTES, y)
            for k in range(0, 4 * BLOCK, 64):
                v.store(y + k, v.load(v.f32x16, y + k) * d)

    return dequantise


@kernel("gemv_nvfp4", arguments=7)
def gemv_nvfp4(v: Any) -> Callable[..., None]:
    """Right rather than fast: a block at a time becomes float32 on the stack."""
    slot, scales_of, block, held, lanes = slots(v), _scales_of(v), v.function(nvfp4(v)), v.stack(4 * BLOCK), v.lanes

    def gemv(weights, row_nbytes, activations, out, columns, row_start, row_stop):
        buffer, each = held(), slot(weights, 4)
        for row in range(row_start, row_stop):
            p, scales, total = slot(weights, 0) + row * row_nbytes, scales_of(weights, row), v.zero(v.f32)
            for i in range(0, columns, BLOCK):
                block(p + i // BLOCK * BLOCK_NBYTES, buffer)
                x, part = activations + 4 * i, v.zero(v.f32)
                for k in range(0, 4 * BLOCK, 4 * lanes):
                    part = v.fma(v.load(v.f32, buffer + k), v.load(v.f32, x + k), part)
                total = v.fma(part, v.splat(v.f32, v.load(v.float32, scales + i // each * 4)), total)
            v.store(out + row * 4, v.total(total))

    return gemv
