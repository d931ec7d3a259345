"""Matrix times vector on the formats with code books of up to 512 entries (IQ2_XXS, IQ2_XS, IQ3), with 512-bit vectors
and VNNI; the contract is `matmul.py`'s.

An entry of a code book becomes a 16-bit word of small fields, so that 256 entries fit eight registers and 32 of them
are looked up at once. Each of four vectors of quants comes from such words by a shift: two neighbouring columns of
every eight, as the places of their values and their signs in a table of 16 bytes. The activations are brought into that
order once for four rows; a lane then sums 16 neighbouring columns, which share a scale in all of the formats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from localmoe.kernels.cpu.blocks import code_book
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.cpu.grids import GRIDS
from localmoe.kernels.cpu.rows import four_rows
from localmoe.kernels.cpu.rows_avx512 import two_halves

OFFSET = 128  # is added to values, as products take one unsigned operand


def _spread(signs: Any) -> Any:
    """Eight sign bits as a word: every second bit, of even columns in the low byte, of odd ones in the high byte."""
    return (signs | signs << 7) & 0x5555


def _activation_parts(v: Any) -> Any:
    """(address of 256 int8) -> four i8x64: of every eight columns the first two, the next two, …"""
    early, late = (v.shuffle([4 * i + j for j in two for i in range(16)]) for two in ((0, 1), (2, 3)))
    first, second = v.shuffle([*range(16), *range(32, 48)]), v.shuffle([*range(16, 32), *range(48, 64)])

    def parts(p):
        a, b = v.load(v.u16x32, p), v.load(v.u16x32, p + 64)
        c, d = v.load(v.u16x32, p + 128), v.load(v.u16x32, p + 192)
        e, f, g, h = early(a, b), early(c, d), late(a, b), late(c, d)
        y0, y1 = v.bits(v.i8x64, first(e, f)), v.bits(v.i8x64, second(e, f))
        return y0, y1, v.bits(v.i8x64, first(g, h)), v.bits(v.i8x64, second(g, h))

    return v.function(parts)


def _rows(
    v: Any, name: str, fields: Any, masks: tuple[int, int], tables: tuple[list[int], list[int]]
) -> Callable[..., None]:
    """The kernel of `fields(block)` -> four u16x32, signs as by `_spread`, odd scales u32x16.

    `masks` say which bits of the first and third, of the second and fourth, are a value's place in the first or second
    of the `tables`; the sign is beside them.
    """
    parts, halves = _activation_parts(v), two_halves(v)
    even, odd = (v.constants(v.u8x64, table * 4) for table in tables)
    low, high = (v.constants(v.u16x32, mask) for mask in masks)
    b0, b1, b2, b3 = (v.shuffle([2 * i] * 16) for i in range(4))
    fraction = np.float32(GRIDS[name].fraction)

    def row(p, y0, y1, y2, y3, begin, size, total):
        a, b, c, d, signs, scales = fields(p)
        upper = signs >> 4
        a = v.look_up(even(), v.bits(v.u8x64, v.merged(low(), a, signs)))
        b = v.look_up(odd(), v.bits(v.u8x64, v.merged(high(), b, signs)))
        c = v.look_up(even(), v.bits(v.u8x64, v.merged(low(), c, upper)))
        d = v.look_up(odd(), v.bits(v.u8x64, v.merged(high(), d, upper)))
        products = v.dot(v.dot(v.dot(v.dot(begin, a, y0), b, y1), c, y2), d, y3)
        return v.fma(v.convert(v.f32, products * v.bits(v.i32, scales)), size, total)

    row = v.function(row)

    def step(p, q, r, s, activations, columns, first, sums):
        a, b, c, d, none = sums
        y0, y1, y2, y3 = parts(activations + first)
        size = v.load(v.float32, activations + columns + (columns >> 4) + (columns >> 3) + (first >> 6)) * fraction
        sums16 = v.load(v.i16x16, activations + columns + (columns >> 4) + (first >> 3))
        begin, ds = v.zero(v.i32) - (v.convert(v.i32, sums16) << 7), v.half(halves(p, q, r, s)) * size
        a, b = row(p, y0, y1, y2, y3, begin, b0(ds, ds), a), row(q, y0, y1, y2, y3, begin, b1(ds, ds), b)
        c, d = row(r, y0, y1, y2, y3, begin, b2(ds, ds), c), row(s, y0, y1, y2, y3, begin, b3(ds, ds), d)
        return a, b, c, d, none

    return four_rows(v, v.function(step), GRIDS[name].nbytes, 256)


def _codes(name: str, width: int) -> tuple[list[int], npt.NDArray[np.int64]]:
    """The values of a code book, rising, and its entries as places among them."""
    values, codes = np.unique(code_book(name), return_inverse=True)
    return [int(value) for value in values], codes.reshape(-1, width)


def _two_bit_kernel(v: Any, name: str, read: Any) -> Callable[..., None]:
    """`read(block)` -> indices of entries of eight values u16x32, signs, odd scales u32x16."""
    values, codes = _codes(name, 8)
    words = [int(word) for word in codes @ (1 << np.array([2, 10, 0, 8, 6, 14, 4, 12]))]
    even = [OFFSET + (1 - 2 * (i & 1)) * values[min(i >> 2, 2)] for i in range(16)]
    odd = [OFFSET + (1 - 2 * (i >> 2 & 1)) * values[min(i & 3, 2)] for i in range(16)]
    book, read = v.words(words), v.function(read)

    def fields(p):
        indices, signs, scales = read(p)
        word = book(indices)
        upper = word >> 4
        return word, word, upper, upper, signs, scales

    return _rows(v, name, v.function(fields), (0x0C0C, 0x0303), (even, odd))


def _three_bit_kernel(v: Any, name: str, read: Any) -> Callable[..., None]:
    """`read(block)` -> indices of the even entries of four values u16x32, of the odd ones, signs, odd scales u32x16."""
    values, codes = _codes(name, 4)
    low, high = codes[:, :2] << 1, ((codes[:, 2:] & 3) << 4) | ((codes[:, 2:] >> 2) << 7)
    words = [int(word) for word in (low | high) @ np.array([1, 256])]
    even = [OFFSET + (1 - 2 * (i & 1)) * values[i >> 1] for i in range(16)]
    odd = [OFFSET + (1 - 2 * (i >> 2 & 1)) * values[(i & 3) | (i >> 3 << 2)] for i in range(16)]
    book, read = v.words(words), v.function(read)

    def fields(p):
        early, late, signs, scales = read(p)
        a, b = book(early), book(late)
        return a, a >> 4, b, b >> 4, signs, scales

    return _rows(v, name, v.function(fields), (0x0E0E, 0x0B0B), (even, odd))


def _parities() -> list[int]:
    """For seven sign bits, the word of eight whose number is even."""
    return [_spread(i | (i.bit_count() & 1) << 7) for i in range(128)]


def _packed_signs(v: Any, place: int) -> Any:
    """(u8x64) -> signs: in every eight bytes, four times seven bits from byte `place` on."""
    signs, shifts = v.words(_parities()), v.constants(v.u16x32, [0, 7, 6, 5] * 8)
    windows = v.shuffle([8 * i + place + j for i in range(8) for j in (0, 1, 0, 1, 1, 2, 2, 3)])

    def spread(x):
        return signs(v.bits(v.u16x32, windows(x, x)) >> shifts())

    return v.function(spread)


def _plain_signs(v: Any) -> Any:
    """(address of 32 bytes) -> signs"""

    def spread(p):
        signs = v.convert(v.u16x32, v.load(v.u8x32, p))
        return (signs | (signs << 7)) & 0x5555

    return v.function(spread)


@kernel("gemv_iq2_xxs", arguments=7, isa="avx512")
def gemv_iq2_xxs(v: Any) -> Callable[..., None]:
    """Float16 d, 8 x (indices u8[4], u32 of four 7-bit signs and a 4-bit scale)."""
    spread = _packed_signs(v, 4)
    indices = v.shuffle([8 * i + j for i in range(8) for j in (0, 0, 1, 1, 2, 2, 3, 3)])
    upper = v.shuffle([2 * i + 1 for i in range(8) for _ in range(2)])

    def read(p):
        x, y = v.load(v.u32x16, p + 2), v.load(v.u8x64, p + 2)
        return v.bits(v.u16x32, indices(y, y)), spread(y), upper(x, x) >> 27 | 1

    return _two_bit_kernel(v, "IQ2_XXS", read)


@kernel("gemv_iq2_xs", arguments=7, isa="avx512")
def gemv_iq2_xs(v: Any) -> Callable[..., None]:
    """Float16 d, u16[32]: 9-bit index and 7-bit signs, scale nibbles [8]."""
    signs, twice = v.words(_parities()), v.shuffle([0] * 8 + [1] * 8)
    shifts = v.constants(v.u32x16, [4 * i for i in range(8)] * 2)

    def read(p):
        x, both = v.load(v.u16x32, p + 2), v.load(v.u32x2, p + 66)
        return x, signs(x >> 9), ((twice(both, both) >> shifts()) << 1) & 30 | 1

    return _two_bit_kernel(v, "IQ2_XS", read)


@kernel("gemv_iq3_xxs", arguments=7, isa="avx512")
def gemv_iq3_xxs(v: Any) -> Callable[..., None]:
    """Float16 d, indices u8[64], u32[8] of four 7-bit signs and a 4-bit scale."""
    spread, twice = _packed_signs(v, 0), v.shuffle([i for i in range(8) for _ in range(2)])

    def read(p):
        x, packed = v.load(v.u16x32, p + 2), v.load(v.u32x8, p + 66)
        packed = twice(packed, packed)
        return x, x >> 8, spread(v.bits(v.u8x64, packed)), packed >> 27 | 1

    return _three_bit_kernel(v, "IQ3_XXS", read)


@kernel("gemv_iq3_s", arguments=7, isa="avx512")
def gemv_iq3_s(v: Any) -> Callable[..., None]:
    """Float16 d, indices u8[64], ninth index bits u8[8], signs u8[32], scale nibbles [4]."""
    spread, lower = _plain_signs(v), v.constants(v.u16x32, 0xFF)
    shifts = v.constants(v.u32x16, [4 * (i // 2) for i in range(16)])

    def read(p):
        x, ninth = v.load(v.u16x32, p + 2), v.bits(v.u16x32, v.marked(v.u8x64, v.load(v.int64, p + 66)))
        early, late = v.merged(lower(), x, ninth << 1), (x >> 8) | (ninth & 0x100)
        scales = (v.splat(v.u32x16, v.load(v.uint32, p + 106)) >> shifts()) << 1 & 30 | 1
        return early, late, spread(p + 74), scales

    return _three_bit_kernel(v, "IQ3_S", read)
