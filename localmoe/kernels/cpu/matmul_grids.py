"""Matrix times vector on the formats with code books of 4 or 8 values (IQ2, IQ3), for every instruction set; the
contract is `matmul.py`'s.

A weight is d · (2 scale + 1) · grid value · sign, a fixed fraction of it; the signs go to the activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from localmoe.kernels.cpu.blocks import PREFETCH, code_book, parities
from localmoe.kernels.cpu.build import kernel


def _grid_gemv(v: Any, nbytes: int, thirty_two: Any, fraction: float) -> Callable[..., None]:
    """`thirty_two(block, j)` -> values u8x32 of columns 32 j on, their signs as bits, scales i16x16 for pairs."""

    def products(p, j, x, total):
        values, signs, scales = thirty_two(p, j)
        negative = v.marked(v.i8x32, signs)
        y = (v.load(v.i8x32, x + 32 * j) ^ negative) - negative
        return v.dot_words(total, v.byte_pairs(values, y), scales)

    products = v.function(products)

    def gemv(weights, row_nbytes, activations, out, columns, row_start, row_stop):
        sizes = activations + columns + (columns >> 4) + (columns >> 3)
        for row in range(row_start, row_stop):
            w = weights + row * row_nbytes
            total = v.zero(v.f32x8)
            for block in range(columns >> 8):
                p, x = w + block * nbytes, activations + block * 256
                for ahead in range(PREFETCH, PREFETCH + nbytes, 64):
                    v.prefetch(p + ahead)
                sums, others = v.zero(v.i32x8), v.zero(v.i32x8)
                for j in range(0, 8, 2):
                    sums, others = products(p, j, x, sums), products(p, j + 1, x, others)
                d = v.load_half(v.float32, p) * v.load(v.float32, sizes + block * 4) * np.float32(fraction)
                total = v.fma(v.convert(v.f32x8, sums + others), v.splat(v.f32x8, d), total)
            v.store(out + row * 4, v.total(total))

    return gemv


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


def _odd_scale(v: Any) -> Any:
    """(scale) -> 2 scale + 1 in all of i16x16."""

    def odd(scale):
        return v.splat(v.i16x16, 2 * np.int64(scale) + 1)

    return v.function(odd)


def _odd_scales(v: Any) -> Any:
    """(byte of two scales) -> 2 scale + 1, i16x16: eight times the low one, eight times the high one."""
    shifts = v.constants(v.i16x16, [0] * 8 + [4] * 8)

    def odd(both):
        scales = (v.splat(v.i16x16, np.int64(both)) >> shifts()) & 15
        return scales + scales + 1

    return v.function(odd)


@kernel("gemv_iq2_xxs", arguments=7)
def gemv_iq2_xxs(v: Any) -> Callable[..., None]:
    """Float16 d, 8 x (indices u8[4], u32 of four 7-bit signs and a 4-bit scale)."""
    grid, join, signs, odd = v.table(code_book("IQ2_XXS")), _joined(v, 8), _seven_bit_signs(v), _odd_scale(v)

    def thirty_two(p, j):
        q, book = p + 2 + 8 * j, grid()
        packed = v.load(v.uint32, q + 4)
        a, b = v.load(v.u8x8, book + v.load(v.uint8, q) * 8), v.load(v.u8x8, book + v.load(v.uint8, q + 1) * 8)
        c, d = v.load(v.u8x8, book + v.load(v.uint8, q + 2) * 8), v.load(v.u8x8, book + v.load(v.uint8, q + 3) * 8)
        return join(a, b, c, d), signs(packed), odd(packed >> 28)

    return _grid_gemv(v, 66, v.function(thirty_two), 0.125)


@kernel("gemv_iq2_xs", arguments=7)
def gemv_iq2_xs(v: Any) -> Callable[..., None]:
    """Float16 d, u16[32]: 9-bit index and 7-bit signs, scale nibbles [8]."""
    grid, join, eighth, odd = v.table(code_book("IQ2_XS")), _joined(v, 8), parities(v), _odd_scales(v)

    def thirty_two(p, j):
        q, book = p + 2 + 8 * j, grid()
        e, f = v.load(v.uint16, q), v.load(v.uint16, q + 2)
        g, h = v.load(v.uint16, q + 4), v.load(v.uint16, q + 6)
        a, b = v.load(v.u8x8, book + (e & 511) * 8), v.load(v.u8x8, book + (f & 511) * 8)
        c, d = v.load(v.u8x8, book + (g & 511) * 8), v.load(v.u8x8, book + (h & 511) * 8)
        signs = eighth(e >> 9) | (eighth(f >> 9) << 8) | (eighth(g >> 9) << 16) | (eighth(h >> 9) << 24)
        return join(a, b, c, d), v.convert(v.int32, signs), odd(v.load(v.uint8, p + 66 + j))

    return _grid_gemv(v, 74, v.function(thirty_two), 0.125)


@kernel("gemv_iq2_s", arguments=7)
def gemv_iq2_s(v: Any) -> Callable[..., None]:
    """Float16 d, indices u8[32], signs u8[32], two high index bits u8[8], scale nibbles [8]."""
    grid, join, odd = v.table(code_book("IQ2_S")), _joined(v, 8), _odd_scales(v)

    def thirty_two(p, j):
        q, book, high = p + 2 + 4 * j, grid(), v.load(v.uint8, p + 66 + j) << 8
        a = v.load(v.u8x8, book + (v.load(v.uint8, q) | (high & 0x300)) * 8)
        b = v.load(v.u8x8, book + (v.load(v.uint8, q + 1) | ((high >> 2) & 0x300)) * 8)
        c = v.load(v.u8x8, book + (v.load(v.uint8, q + 2) | ((high >> 4) & 0x300)) * 8)
        d = v.load(v.u8x8, book + (v.load(v.uint8, q + 3) | ((high >> 6) & 0x300)) * 8)
        return join(a, b, c, d), v.load(v.int32, q + 32), odd(v.load(v.uint8, p + 74 + j))

    return _grid_gemv(v, 82, v.function(thirty_two), 0.125)


@kernel("gemv_iq3_xxs", arguments=7)
def gemv_iq3_xxs(v: Any) -> Callable[..., None]:
    """Float16 d, indices u8[64], u32[8] of four 7-bit signs and a 4-bit scale."""
    grid, join, signs, odd = v.table(code_book("IQ3_XXS")), _joined(v, 4), _seven_bit_signs(v), _odd_scale(v)

    def entry(q):
        return v.load(v.u8x4, grid() + v.load(v.uint8, q) * 4)

    entry = v.function(entry)

    def thirty_two(p, j):
        q, packed = p + 2 + 8 * j, v.load(v.uint32, p + 66 + 4 * j)
        a, b, c, d = entry(q), entry(q + 1), entry(q + 2), entry(q + 3)
        e, f, g, h = entry(q + 4), entry(q + 5), entry(q + 6), entry(q + 7)
        return join(a, b, c, d, e, f, g, h), signs(packed), odd(packed >> 28)

    return _grid_gemv(v, 98, v.function(thirty_two), 0.25)


@kernel("gemv_iq3_s", arguments=7)
def gemv_iq3_s(v: Any) -> Callable[..., None]:
    """Float16 d, indices u8[64], ninth index bits u8[8], signs u8[32], scale nibbles [4]."""
    grid, join, odd = v.table(code_book("IQ3_S")), _joined(v, 4), _odd_scale(v)

    def entry(q, ninth):
        return v.load(v.u8x4, grid() + (v.load(v.uint8, q) | (ninth & 256)) * 4)

    entry = v.function(entry)

    def thirty_two(p, j):
        q, n = p + 2 + 8 * j, v.load(v.uint8, p + 66 + j) << 8
        a, b, c, d = entry(q, n), entry(q + 1, n >> 1), entry(q + 2, n >> 2), entry(q + 3, n >> 3)
        e, f, g, h = entry(q + 4, n >> 4), entry(q + 5, n >> 5), entry(q + 6, n >> 6), entry(q + 7, n >> 7)
        scale = (v.load(v.uint8, p + 106 + (j >> 1)) >> (4 * (j & 1))) & 15
        return join(a, b, c, d, e, f, g, h), v.load(v.int32, p + 74 + 4 * j), odd(scale)

    return _grid_gemv(v, 110, v.function(thirty_two), 1.0)
