"""Matrix times vector on GGUF blocks: one source for every instruction set without its own; knows no threads or ops.

Every kernel: (weights, row_nbytes, activations, out, columns, row_start, row_stop) -> out[r] float32 for row_start <= r
< row_stop, out being the address of row 0. The order of additions depends on `columns` alone, so a row's result is the
same in any split. `weights` is where row 0 begins, or for formats of `formats.SCALED` a record (`scaled.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from localmoe.errors import UnsupportedError
from localmoe.formats import FORMATS, SCALED, Format
from localmoe.kernels.cpu import (  # noqa: F401  (they register kernels)
    dequantise_grids,
    matmul_avx2,
    matmul_avx512,
    matmul_entries_avx512,
    matmul_grids,
    matmul_grids_avx512,
    matmul_k,
    matmul_k_avx512,
    scaled,
)
from localmoe.kernels.cpu.blocks import E2M1, PREFETCH, iq4_values, nibbles
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.cpu.dequantise import BLOCKS, Block
from localmoe.kernels.cpu.rows import stream

FAST: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "F32": ("gemv_f32", "f32"),
        "F16": ("gemv_f16", "f32"),
        "BF16": ("gemv_bf16", "f32"),
        "Q8_0": ("gemv_q8_0", "q8_32"),
        "Q4_0": ("gemv_q4_0", "q8_32"),
        "Q4_1": ("gemv_q4_1", "q8_32"),
        "Q5_0": ("gemv_q5_0", "q8_32"),
        "Q5_1": ("gemv_q5_1", "q8_32"),
        "IQ4_NL": ("gemv_iq4_nl", "q8_32"),
        "MXFP4": ("gemv_mxfp4", "q8_32"),
        "Q2_K": ("gemv_q2_k", "q8_256"),
        "Q3_K": ("gemv_q3_k", "q8_256"),
        "Q4_K": ("gemv_q4_k", "q8_256"),
        "Q5_K": ("gemv_q5_k", "q8_256"),
        "Q6_K": ("gemv_q6_k", "q8_256"),
        "IQ4_XS": ("gemv_iq4_xs", "q8_256"),
        "IQ1_S": ("gemv_iq1_s", "q8_256"),
        "IQ1_M": ("gemv_iq1_m", "q8_256"),
        "IQ2_XXS": ("gemv_iq2_xxs", "q8_256"),
        "IQ2_XS": ("gemv_iq2_xs", "q8_256"),
        "IQ2_S": ("gemv_iq2_s", "q8_256"),
        "IQ3_XXS": ("gemv_iq3_xxs", "q8_256"),
        "IQ3_S": ("gemv_iq3_s", "q8_256"),
    }
)


FLOAT_COLUMNS = 2048  # of float32 activations, which stay in the first-level cache beside what is read


def gemv_kernel(format: Format) -> tuple[str, str]:
    """The kernel that multiplies rows of `format`, and the kind of activations it reads.

    Raises UnsupportedError for a format that no kernel reads.
    """
    if format.name in FAST:
        return FAST[format.name]
    if format.name not in (*BLOCKS, *SCALED):
        possible = ", ".join([*FAST, *BLOCKS, *SCALED])
        raise UnsupportedError(f"no cpu kernel reads weights of type {format.name}; possible: {possible}")
    return f"gemv_{format.name.lower()}", "f32"


def dequantise_kernel(format: Format) -> str:
    """The kernel that turns rows of `format` into float32. Raises UnsupportedError as `gemv_kernel` does."""
    gemv_kernel(format)
    return f"dequantise_{format.name.lower()}"


def _float_gemv(v: Any, load: Any, nbytes: int) -> Callable[..., None]:
    """Weights of `nbytes` each that `load(kind, address)` brings as float32; activations f32.

    One row at a time: two or four, which share the loads of activations, are slower (rows of 4 and 11 KB). But four
    take turns at a piece of the activations, which else would come from the second level for each.
    """
    lanes, piece, side = v.lanes, FLOAT_COLUMNS, 4
    first_lines, places, follow = stream(v)
    held, step, width = v.stack(side * 16 * v.lanes), 4 * v.lanes, 4 * v.lanes * nbytes

    def kept(sums, begun):
        """The four vectors of a row's sums, zero where it has not begun."""
        a, b, c, d = v.zero(v.f32), v.zero(v.f32), v.zero(v.f32), v.zero(v.f32)
        if begun:
            a, b = v.load(v.f32, sums), v.load(v.f32, sums + 4 * lanes)
            c, d = v.load(v.f32, sums + 8 * lanes), v.load(v.f32, sums + 12 * lanes)
        return a, b, c, d

    kept = v.function(kept)

    def gemv(weights, row_nbytes, activations, out, columns, row_start, row_stop):
        fours, whole, together = columns - columns % step, columns - columns % lanes, side * row_nbytes
        end, sums = weights + row_stop * row_nbytes, held()
        first_lines(weights + row_start * row_nbytes, end, together)
        for row in range(row_start, row_stop, side):
            w, rows = weights + row * row_nbytes, min(side, row_stop - row)
            far, near = places(w, end, together)
            for start in range(0, fours, piece):
                count = min(piece, fours - start)
                for r in range(rows):
                    p, x, place = w + r * row_nbytes + start * nbytes, activations + 4 * start, sums + 16 * r * lanes
                    ahead = (side * start + r * count) * nbytes
                    a, b, c, d = kept(place, start > 0)
                    for k in range(0, count, step):
                        q, y = p + k * nbytes, x + k * 4
                        follow(far, near, ahead + k * nbytes, ahead + k * nbytes + width)
                        a = v.fma(load(v.f32, q), v.load(v.f32, y), a)
                        b = v.fma(load(v.f32, q + lanes * nbytes), v.load(v.f32, y + lanes * 4), b)
                        c = v.fma(load(v.f32, q + 2 * lanes * nbytes), v.load(v.f32, y + lanes * 8), c)
                        d = v.fma(load(v.f32, q + 3 * lanes * nbytes), v.load(v.f32, y + lanes * 12), d)
                    v.store(place, a)
                    v.store(place + 4 * lanes, b)
                    v.store(place + 8 * lanes, c)
                    v.store(place + 12 * lanes, d)
            for r in range(rows):
                p = w + r * row_nbytes
                a, b, c, d = kept(sums + 16 * r * lanes, fours > 0)
                for k in range(fours, whole, lanes):
                    a = v.fma(load(v.f32, p + k * nbytes), v.load(v.f32, activations + k * 4), a)
                total = v.total((a + b) + (c + d))
                for k in range(whole, columns):
                    total = v.fma(load(v.float32, p + k * nbytes), v.load(v.float32, activations + k * 4), total)
                v.store(out + (row + r) * 4, total)

    return gemv


@kernel("gemv_f32", arguments=7)
def gemv_f32(v: Any) -> Callable[..., None]:
    return _float_gemv(v, v.load, 4)


@kernel("gemv_f16", arguments=7)
def gemv_f16(v: Any) -> Callable[..., None]:
    return _float_gemv(v, v.load_half, 2)


@kernel("gemv_bf16", arguments=7)
def gemv_bf16(v: Any) -> Callable[..., None]:
    return _float_gemv(v, v.load_bfloat, 2)


def _block32_gemv(v: Any, nbytes: int, scale: Any, dot: Any) -> Callable[..., None]:
    """Blocks of 32 values; `scale(block)` is float32, `dot(block, address of 32 int8)` is i32x8."""

    def gemv(weights, row_nbytes, activations, out, columns, row_start, row_stop):
        blocks = columns >> 5
        scales = activations + ((columns + 63) & -64)
        for row in range(row_start, row_stop):
            w = weights + row * row_nbytes
            a, b = v.zero(v.f32x8), v.zero(v.f32x8)
            for block in range(blocks):
                p = w + block * nbytes
                v.prefetch(p + PREFETCH)
                d = scale(p) * v.load(v.float32, scales + block * 4)
                products = dot(p, activations + block * 32)
                a, b = v.fma(v.convert(v.f32x8, products), v.splat(v.f32x8, d), b), a
            v.store(out + row * 4, v.total(a + b))

    return gemv


def _block32_minimum_gemv(v: Any, nbytes: int, quants: Any) -> Callable[..., None]:
    """Q4_1 and Q5_1: float16 d, float16 m, then what `quants(block)` brings, u8x32; a weight is d · quant + m."""
    ones, one_each = v.constants(v.i16x16, 1), v.constants(v.u8x32, 1)

    def gemv(weights, row_nbytes, activations, out, columns, row_start, row_stop):
        scales = activations + ((columns + 63) & -64)
        for row in range(row_start, row_stop):
            w = weights + row * row_nbytes
            a, b = v.zero(v.f32x8), v.zero(v.f32x8)
            for block in range(columns >> 5):
                p, y = w + block * nbytes, v.load(v.i8x32, activations + block * 32)
                v.prefetch(p + PREFETCH)
                size = v.load(v.float32, scales + block * 4)
                products = v.convert(v.f32x8, v.word_pairs(v.byte_pairs(quants(p), y), ones()))
                sum32 = v.convert(v.f32x8, v.word_pairs(v.byte_pairs(one_each(), y), ones()))
                a = v.fma(products, v.splat(v.f32x8, v.load_half(v.float32, p) * size), a)
                b = v.fma(sum32, v.splat(v.f32x8, v.load_half(v.float32, p + 2) * size), b)
            v.store(out + row * 4, v.total(a + b))

    return gemv


def _half_scale(v: Any) -> Any:
    def scale(p):
        return v.load_half(v.float32, p)

    return v.function(scale)


def _five_bits(v: Any) -> Any:
    """(address of 32 fifth bits, then 16 bytes of nibbles) -> u8x32"""
    halves = nibbles(v)

    def quants(p):
        return halves(p + 4) | (v.marked(v.u8x32, v.load(v.int32, p)) & 16)

    return v.function(quants)


@kernel("gemv_q8_0", arguments=7)
def gemv_q8_0(v: Any) -> Callable[..., None]:
    def dot(p, x):
        return v.dot(v.zero(v.i32x8), v.load(v.i8x32, p + 2), v.load(v.i8x32, x))

    return _block32_gemv(v, 34, _half_scale(v), v.function(dot))


def _offset_gemv(v: Any, nbytes: int, quants: Any, offset: int) -> Callable[..., None]:
    """A float16 scale, then what `quants(address)` brings, u8x32, stored with `offset` added."""
    offsets, ones = v.constants(v.u8x32, offset), v.constants(v.i16x16, 1)

    def dot(p, x):
        y = v.load(v.i8x32, x)
        return v.word_pairs(v.byte_pairs(quants(p + 2), y) - v.byte_pairs(offsets(), y), ones())

    return _block32_gemv(v, nbytes, _half_scale(v), v.function(dot))


@kernel("gemv_q4_0", arguments=7)
def gemv_q4_0(v: Any) -> Callable[..., None]:
    return _offset_gemv(v, 18, nibbles(v), 8)


@kernel("gemv_q5_0", arguments=7)
def gemv_q5_0(v: Any) -> Callable[..., None]:
    return _offset_gemv(v, 22, _five_bits(v), 16)


@kernel("gemv_q4_1", arguments=7)
def gemv_q4_1(v: Any) -> Callable[..., None]:
    halves = nibbles(v)

    def quants(p):
        return halves(p + 4)

    return _block32_minimum_gemv(v, 20, v.function(quants))


@kernel("gemv_q5_1", arguments=7)
def gemv_q5_1(v: Any) -> Callable[..., None]:
    five_bits = _five_bits(v)

    def quants(p):
        return five_bits(p + 4)

    return _block32_minimum_gemv(v, 24, v.function(quants))


def _table_gemv(v: Any, nbytes: int, scale: Any, place: int, values: list[int]) -> Callable[..., None]:
    """Blocks whose nibbles, at `place`, stand for 16 small values."""
    table, halves = v.constants(v.i8x32, values * 2), nibbles(v)

    def dot(p, x):
        return v.dot(v.zero(v.i32x8), v.look_up(table(), halves(p + place)), v.load(v.i8x32, x))

    return _block32_gemv(v, nbytes, scale, v.function(dot))


@kernel("gemv_iq4_nl", arguments=7)
def gemv_iq4_nl(v: Any) -> Callable[..., None]:
    return _table_gemv(v, 18, _half_scale(v), 2, iq4_values())


@kernel("gemv_mxfp4", arguments=7)
def gemv_mxfp4(v: Any) -> Callable[..., None]:
    """Exponent u8, nibbles [16]. An exponent of 0 gives 0 instead of 2^-127, which no sum would keep."""

    def scale(p):
        return v.bits(v.float32, v.convert(v.int32, v.load(v.uint8, p) << 23)) * np.float32(0.5)

    return _table_gemv(v, 17, v.function(scale), 1, E2M1)


def _block_gemv(format: Format, factory: Block) -> Callable[[Any], Callable[..., None]]:
    """Any other format, right rather than fast: a block at a time becomes float32 on the stack; activations f32."""

    def kernel_factory(v: Any) -> Callable[..., None]:
        block, held = v.function(factory(v)), v.stack(4 * format.elements)
        elements, nbytes, lanes = format.elements, format.nbytes, v.lanes

        def gemv(weights, row_nbytes, activations, out, columns, row_start, row_stop):
            buffer = held()
            for row in range(row_start, row_stop):
                total = v.zero(v.f32)
                for i in range(columns // elements):
                    block(weights + row * row_nbytes + i * nbytes, buffer)
                    x = activations + i * (4 * elements)
                    for k in range(0, 4 * elements, 4 * lanes):
                        total = v.fma(v.load(v.f32, buffer + k), v.load(v.f32, x + k), total)
                v.store(out + row * 4, v.total(total))

        return gemv

    return kernel_factory


for _name, _factory in BLOCKS.items():
    if _name not in FAST:
        kernel(f"gemv_{_name.lower()}", arguments=7)(_block_gemv(FORMATS[_name], _factory))
