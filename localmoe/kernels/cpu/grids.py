"""Readers of the formats with code books of 4 or 8 values (IQ1, IQ2, IQ3), shared by matrix products; no kernel of its
own.

A weight is d · fraction · (2 scale + 1) · grid value · sign. In IQ1 the values -1, 0 and 1 are shifted by an eighth up
or down: they are read as eighths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from localmoe.kernels.cpu.blocks import code_book, parities


@dataclass(frozen=True, slots=True)
class Grid:
    """A format: `read(v)` is a kernel function (block, j) -> grid values u8x32 of columns 32 j on, i8x32 of -1 where
    they are negative, scales: one, or with `halves` a byte of one for the first 16 columns and, four bits up, one for
    the others. `size(v)` is a kernel function (block) -> d."""

    nbytes: int
    fraction: float
    halves: bool
    read: Callable[[Any], Any]
    size: Callable[[Any], Any]


def _joined(v: Any, width: int) -> Any:
    """Pieces of `width` values, four of 8 or eight of 4, as u8x32."""
    two, four, eight = v.shuffle([*range(8)]), v.shuffle([*range(16)]), v.shuffle([*range(32)])

    def eights(a, b, c, d):
        return eight(four(a, b), four(c, d))

    def fours(a, b, c, d, e, f, g, h):
        return eight(four(two(a, b), two(c, d)), four(two(e, f), two(g, h)))

    return v.function(eights if width == 8 else fours)


def _seven_bit_signs(v: Any) -> Any:
    """(four times seven bits) -> 32 signs: each eighth one makes the number of negative ones even."""
    eighth = parities(v)

    def signs(packed):
        a, b = eighth(packed & 127), eighth((packed >> 7) & 127)
        c, d = eighth((packed >> 14) & 127), eighth((packed >> 21) & 127)
        return v.convert(v.int32, a | (b << 8) | (c << 16) | (d << 24))

    return v.function(signs)


def _iq2_xxs(v: Any) -> Any:
    """Float16 d, 8 x (indices u8[4], u32 of four 7-bit signs and a 4-bit scale)."""
    grid, join, signs = v.table(code_book("IQ2_XXS")), _joined(v, 8), _seven_bit_signs(v)

    def thirty_two(p, j):
        q, book = p + 2 + 8 * j, grid()
        packed = v.load(v.uint32, q + 4)
        a, b = v.load(v.u8x8, book + v.load(v.uint8, q) * 8), v.load(v.u8x8, book + v.load(v.uint8, q + 1) * 8)
        c, d = v.load(v.u8x8, book + v.load(v.uint8, q + 2) * 8), v.load(v.u8x8, book + v.load(v.uint8, q + 3) * 8)
        return join(a, b, c, d), v.marked(v.i8x32, signs(packed)), packed >> 28

    return v.function(thirty_two)


def _iq2_xs(v: Any) -> Any:
    """Float16 d, u16[32]: 9-bit index and 7-bit signs, scale nibbles [8]."""
    grid, join, eighth = v.table(code_book("IQ2_XS")), _joined(v, 8), parities(v)

    def thirty_two(p, j):
        q, book = p + 2 + 8 * j, grid()
        e, f = v.load(v.uint16, q), v.load(v.uint16, q + 2)
        g, h = v.load(v.uint16, q + 4), v.load(v.uint16, q + 6)
        a, b = v.load(v.u8x8, book + (e & 511) * 8), v.load(v.u8x8, book + (f & 511) * 8)
        c, d = v.load(v.u8x8, book + (g & 511) * 8), v.load(v.u8x8, book + (h & 511) * 8)
        signs = eighth(e >> 9) | (eighth(f >> 9) << 8) | (eighth(g >> 9) << 16) | (eighth(h >> 9) << 24)
        return join(a, b, c, d), v.marked(v.i8x32, signs), v.load(v.uint8, p + 66 + j)

    return v.function(thirty_two)


def _iq2_s(v: Any) -> Any:
    """Float16 d, indices u8[32], signs u8[32], two high index bits u8[8], scale nibbles [8]."""
    grid, join = v.table(code_book("IQ2_S")), _joined(v, 8)

    def thirty_two(p, j):
        q, book, high = p + 2 + 4 * j, grid(), v.load(v.uint8, p + 66 + j) << 8
        a = v.load(v.u8x8, book + (v.load(v.uint8, q) | (high & 0x300)) * 8)
        b = v.load(v.u8x8, book + (v.load(v.uint8, q + 1) | ((high >> 2) & 0x300)) * 8)
        c = v.load(v.u8x8, book + (v.load(v.uint8, q + 2) | ((high >> 4) & 0x300)) * 8)
        d = v.load(v.u8x8, book + (v.load(v.uint8, q + 3) | ((high >> 6) & 0x300)) * 8)
        return join(a, b, c, d), v.marked(v.i8x32, v.load(v.int32, q + 32)), v.load(v.uint8, p + 74 + j)

    return v.function(thirty_two)


def _iq3_xxs(v: Any) -> Any:
    """Float16 d, indices u8[64], u32[8] of four 7-bit signs and a 4-bit scale."""
    grid, join, signs = v.table(code_book("IQ3_XXS")), _joined(v, 4), _seven_bit_signs(v)

    def entry(q):
        return v.load(v.u8x4, grid() + v.load(v.uint8, q) * 4)

    entry = v.function(entry)

    def thirty_two(p, j):
        q, packed = p + 2 + 8 * j, v.load(v.uint32, p + 66 + 4 * j)
        a, b, c, d = entry(q), entry(q + 1), entry(q + 2), entry(q + 3)
        e, f, g, h = entry(q + 4), entry(q + 5), entry(q + 6), entry(q + 7)
        return join(a, b, c, d, e, f, g, h), v.marked(v.i8x32, signs(packed)), packed >> 28

    return v.function(thirty_two)


def _iq3_s(v: Any) -> Any:
    """Float16 d, indices u8[64], ninth index bits u8[8], signs u8[32], scale nibbles [4]."""
    grid, join = v.table(code_book("IQ3_S")), _joined(v, 4)

    def entry(q, ninth):
        return v.load(v.u8x4, grid() + (v.load(v.uint8, q) | (ninth & 256)) * 4)

    entry = v.function(entry)

    def thirty_two(p, j):
        q, n = p + 2 + 8 * j, v.load(v.uint8, p + 66 + j) << 8
        a, b, c, d = entry(q, n), entry(q + 1, n >> 1), entry(q + 2, n >> 2), entry(q + 3, n >> 3)
        e, f, g, h = entry(q + 4, n >> 4), entry(q + 5, n >> 5), entry(q + 6, n >> 6), entry(q + 7, n >> 7)
        scale = (v.load(v.uint8, p + 106 + (j >> 1)) >> (4 * (j & 1))) & 15
        return join(a, b, c, d, e, f, g, h), v.marked(v.i8x32, v.load(v.int32, p + 74 + 4 * j)), scale

    return v.function(thirty_two)


def _eighths(v: Any) -> Any:
    """(index, whether the shift is downwards) -> eight values of IQ1's book in eighths, i8x8"""
    grid = v.table(8 * code_book("IQ1_S"))

    def values(index, downwards):
        return v.load(v.i8x8, grid() + index * 8) + (1 - 2 * downwards)

    return v.function(values)


def _magnitudes(v: Any) -> Any:
    """(four i8x8) -> (u8x32, i8x32 of -1 where they were negative)"""
    join = _joined(v, 8)

    def split(a, b, c, d):
        values = join(a, b, c, d)
        negative = values >> 7
        return v.bits(v.u8x32, (values ^ negative) - negative), negative

    return v.function(split)


def _iq1_s(v: Any) -> Any:
    """Float16 d, indices u8[32], u16[8] of four 3-bit high index parts, a 3-bit scale, whether the shift is down."""
    values, split = _eighths(v), _magnitudes(v)

    def thirty_two(p, j):
        q, high = p + 2 + 4 * j, np.int64(v.load(v.uint16, p + 34 + 2 * j))
        down, upper = high >> 15, high << 8
        a = values(v.load(v.uint8, q) | (upper & 0x700), down)
        b = values(v.load(v.uint8, q + 1) | ((upper >> 3) & 0x700), down)
        c = values(v.load(v.uint8, q + 2) | ((upper >> 6) & 0x700), down)
        d = values(v.load(v.uint8, q + 3) | ((upper >> 9) & 0x700), down)
        magnitudes, negative = split(a, b, c, d)
        return magnitudes, negative, (high >> 12) & 7

    return v.function(thirty_two)


def _iq1_m(v: Any) -> Any:
    """Indices u8[32], nibbles [32] of 3 high index bits and whether the shift is down, u16[4] of four 3-bit scales and
    a nibble of d."""
    values, split = _eighths(v), _magnitudes(v)

    def thirty_two(p, j):
        q, high = p + 4 * j, np.int64(v.load(v.uint16, p + 32 + 2 * j)) << 8
        a = values(v.load(v.uint8, q) | (high & 0x700), (high >> 11) & 1)
        b = values(v.load(v.uint8, q + 1) | ((high >> 4) & 0x700), (high >> 15) & 1)
        c = values(v.load(v.uint8, q + 2) | ((high >> 8) & 0x700), (high >> 19) & 1)
        d = values(v.load(v.uint8, q + 3) | ((high >> 12) & 0x700), (high >> 23) & 1)
        magnitudes, negative = split(a, b, c, d)
        scales = np.int64(v.load(v.uint16, p + 48 + 2 * (j >> 1))) >> (6 * (j & 1))
        return magnitudes, negative, (scales & 7) | ((scales << 1) & 0x70)

    return v.function(thirty_two)


def first_half(v: Any) -> Any:
    """(block) -> the float16 it begins with."""

    def size(p):
        return v.load_half(v.float32, p)

    return v.function(size)


def scattered_half(v: Any) -> Any:
    """(block of IQ1_M) -> the float16 in the upper nibbles of four words."""

    def size(p):
        q = v.load(v.int64, p + 48)
        return v.half(((q >> 12) & 15) | ((q >> 24) & 0xF0) | ((q >> 36) & 0xF00) | ((q >> 48) & 0xF000))

    return v.function(size)


GRIDS = {
    "IQ1_S": Grid(50, 0.125, False, _iq1_s, first_half),
    "IQ1_M": Grid(56, 0.125, True, _iq1_m, scattered_half),
    "IQ2_XXS": Grid(66, 0.125, False, _iq2_xxs, first_half),
    "IQ2_XS": Grid(74, 0.125, True, _iq2_xs, first_half),
    "IQ2_S": Grid(82, 0.125, True, _iq2_s, first_half),
    "IQ3_XXS": Grid(98, 0.25, False, _iq3_xxs, first_half),
    "IQ3_S": Grid(110, 1.0, False, _iq3_s, first_half),
}
