"""Matrix times vector with 512-bit vectors and VNNI, formats of 256-element blocks; the contract is `matmul.py`'s.

In all of them a piece of 16 bytes holds quants of one scale, or of two in its low and high bits: sums of four products
fit 16 bits, so two such vectors become one of 16-bit pairs, which one instruction multiplies with both scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from localmoe.kernels.cpu.blocks import iq4_values
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.cpu.rows import four_rows
from localmoe.kernels.cpu.rows_avx512 import alternating, each_row, in_pieces, joined, two_halves


def _pair_sums(v: Any) -> Any:
    """(i32x16 sums for low words, for high words as they will be shifted, scales u32x16 as pairs) -> f32x16."""

    def scaled(low, high, scales):
        pairs = v.bits(v.i16x32, (low & 0xFFFF) | high)
        return v.convert(v.f32, v.dot_words(v.zero(v.i32), pairs, v.bits(v.i16x32, scales)))

    return v.function(scaled)


def _repeated(v: Any, lanes: int) -> Any:
    """Shuffle of 16 bytes in `lanes` lanes: the same in all four pieces."""
    return v.shuffle([*range(lanes)] * 4)


def _four_or_five_bits(v: Any, nbytes: int, quants: Any, shift: int) -> Callable[..., None]:
    """Q4_K and Q5_K: float16 d and dmin, six-bit scales and minima of 8 x 32 (get_scale_min_k4 of ggml-quants.c), then
    what `quants(block)` brings: u8x64 of the even groups' first and second halves, then of the odd groups', these with
    sums that are `shift` bits short of a high word."""
    join, (even, odd), scaled = joined(v, v.u8x16), alternating(v), _pair_sums(v)
    t0, t1, t2, t3 = each_row(v)
    x_place, y_place = (v.shuffle([4 * i + j for i in range(4) for j in four]) for four in ((1, 3, 2, 3), (1, 1, 1, 2)))
    x_shift, x_mask = v.constants(v.u32x16, [0, 0, 0, 4] * 4), v.constants(v.u32x16, [0x3F3F3F3F, 0x0F0F0F0F] * 8)
    y_mask = v.constants(v.u32x16, [0, 0x30303030] * 8)
    scale_words = in_pieces(v, [i for j in range(8) for i in (j, 16)])
    minimum_words = in_pieces(v, [i for j in range(8) for i in (8 + j, 16)])
    sizes, minima = v.shuffle([0, 4, 8, 12]), v.shuffle([2 * r + 1 for r in range(4) for _ in range(4)])
    b0, b1, b2, b3 = (v.shuffle([2 * r] * 16) for r in range(4))
    repeated = _repeated(v, 8)
    even_groups = v.shuffle([*range(32), *range(64, 96)])
    odd_groups = v.shuffle([*range(32, 64), *range(96, 128)])

    def row(p, y0, y1, z0, z1, scales, size, total):
        a, b, c, d = quants(p)
        low = v.dot(v.dot(v.zero(v.i32), a, y0), b, y1)
        high = v.dot(v.dot(v.zero(v.i32), c, z0), d, z1)
        return v.fma(scaled(low, high << shift, scales), size, total)

    row = v.function(row)

    def step(p, q, r, s, activations, columns, first, sums):
        a, b, c, d, minimum = sums
        sums32, x = activations + columns + (first >> 4), activations + first
        size = v.load(v.float32, activations + columns + (columns >> 4) + (columns >> 3) + (first >> 6))
        heads = v.bits(v.u32x16, join(p, q, r, s))
        six = ((x_place(heads, heads) >> x_shift()) & x_mask()) | ((y_place(heads, heads) >> 2) & y_mask())
        six = v.bits(v.u8x64, six)
        scales = v.bits(v.u32x16, scale_words(six, v.zero(v.u8x64)))
        lows = v.bits(v.i16x32, minimum_words(six, v.zero(v.u8x64)))
        ds = v.half(v.bits(v.u16x8, sizes(heads, heads))) * size
        s32 = v.load(v.i16x8, sums32)
        lows = v.convert(v.f32, v.zero(v.i32) - v.word_pairs(lows, repeated(s32, s32)))
        minimum = v.fma(lows, minima(ds, ds), minimum)
        e, f, g, h = v.load(v.i8x64, x), v.load(v.i8x64, x + 64), v.load(v.i8x64, x + 128), v.load(v.i8x64, x + 192)
        y, z, g, h = even_groups(e, f), odd_groups(e, f), even_groups(g, h), odd_groups(g, h)
        y0, y1, z0, z1 = even(y, g), odd(y, g), even(z, h), odd(z, h)
        a = row(p, y0, y1, z0, z1, t0(scales, scales), b0(ds, ds), a)
        b = row(q, y0, y1, z0, z1, t1(scales, scales), b1(ds, ds), b)
        c = row(r, y0, y1, z0, z1, t2(scales, scales), b2(ds, ds), c)
        d = row(s, y0, y1, z0, z1, t3(scales, scales), b3(ds, ds), d)
        return a, b, c, d, minimum

    return four_rows(v, v.function(step), nbytes, 256)


@kernel("gemv_q4_k", arguments=7, isa="avx512")
def gemv_q4_k(v: Any) -> Callable[..., None]:
    even, odd = alternating(v)

    def quants(p):
        x, y = v.load(v.u8x64, p + 16), v.load(v.u8x64, p + 80)
        a, b = even(x, y), odd(x, y)
        return a & 15, b & 15, a & 0xF0, b & 0xF0

    return _four_or_five_bits(v, 144, v.function(quants), 12)


@kernel("gemv_q5_k", arguments=7, isa="avx512")
def gemv_q5_k(v: Any) -> Callable[..., None]:
    even, odd = alternating(v)
    repeated = _repeated(v, 16)
    left, right = (v.constants(v.u32x16, [n for n in row for _ in range(4)]) for row in ((3, 1, 0, 0), (0, 0, 1, 3)))

    def fifths(p):
        """Bits 2 i and 2 i + 1 of each byte, in piece i, as bits 3 and 4."""
        x = v.load(v.u8x16, p)
        x = v.bits(v.u32x16, repeated(x, x))
        return v.bits(v.u8x64, (x << left()) >> right())

    fifths = v.function(fifths)

    def quants(p):
        x, y = v.load(v.u8x64, p + 48), v.load(v.u8x64, p + 112)
        a, b, e, f = even(x, y), odd(x, y), fifths(p + 16), fifths(p + 32)
        c, d = v.bits(v.u8x64, v.bits(v.u16x32, a) >> 4), v.bits(v.u8x64, v.bits(v.u16x32, b) >> 4)
        a, b = (a & 15) | ((e + e) & 16), (b & 15) | ((f + f) & 16)
        return a, b, (c & 15) | (e & 16), (d & 15) | (f & 16)

    return _four_or_five_bits(v, 176, v.function(quants), 16)


@kernel("gemv_q6_k", arguments=7, isa="avx512")
def gemv_q6_k(v: Any) -> Callable[..., None]:
    """Low nibbles [128], two high bits [64], int8 scales [16], float16 d; quants are stored with 32 added."""
    join, scaled, twice = joined(v, v.u8x16), _pair_sums(v), v.shuffle([*range(16)] * 2)
    t0, t1, t2, t3 = each_row(v)
    up, down = v.constants(v.u16x32, [4] * 16 + [2] * 16), v.constants(v.u16x32, [0] * 16 + [2] * 16)
    pairs = [[8 * half + i + 4 * j for i in range(4) for j in range(2)] for half in range(2)]
    w0, w1 = (in_pieces(v, [i for place in order for i in (16, place)]) for order in pairs)
    m0, m1 = (v.shuffle(order * 4) for order in pairs)
    b0, b1, b2, b3 = (v.shuffle([r] * 16) for r in range(4))
    each, words = v.shuffle([r for r in range(4) for _ in range(4)]), two_halves(v)
    second = v.shuffle([1, 3, 5, 7])

    def half(ql, qh, y, z, scales):
        packed, two = v.load(v.u8x64, ql), v.load(v.u16x16, qh)
        two = twice(two, two)
        low = (packed & 15) | v.bits(v.u8x64, (two << up()) & 0x3030)
        high = v.bits(v.u8x64, ((v.bits(v.u16x32, packed) >> 4) & 0x0F0F) | ((two >> down()) & 0x3030))
        return scaled(v.dot(v.zero(v.i32), low, y), v.dot(v.zero(v.i32), high, z) << 16, scales)

    half = v.function(half)

    def row(p, x, scales0, scales1, size, total):
        total = v.fma(half(p, p + 128, v.load(v.i8x64, x), v.load(v.i8x64, x + 64), scales0), size, total)
        other = half(p + 64, p + 160, v.load(v.i8x64, x + 128), v.load(v.i8x64, x + 192), scales1)
        return v.fma(other, size, total)

    row = v.function(row)

    def step(p, q, r, s, activations, columns, first, sums):
        a, b, c, d, offset = sums
        x, sums16 = activations + first, activations + columns + (columns >> 4) + (first >> 3)
        size = v.load(v.float32, activations + columns + (columns >> 4) + (columns >> 3) + (first >> 6))
        heads, none = join(p + 192, q + 192, r + 192, s + 192), v.zero(v.u8x64)
        i = v.bits(v.i16x32, w0(heads, none)) >> 8
        j = v.bits(v.i16x32, w1(heads, none)) >> 8
        s16 = v.load(v.i16x16, sums16)
        shifted = v.dot_words(v.word_pairs(i, m0(s16, s16)), j, m1(s16, s16))
        halves = words(p + 206, q + 206, r + 206, s + 206)
        ds = v.half(second(halves, halves)) * size
        offset = v.fma(v.convert(v.f32, shifted), each(ds, ds) * np.float32(-32), offset)
        i, j = v.bits(v.u32x16, i), v.bits(v.u32x16, j)
        a, b = row(p, x, t0(i, i), t0(j, j), b0(ds, ds), a), row(q, x, t1(i, i), t1(j, j), b1(ds, ds), b)
        c, d = row(r, x, t2(i, i), t2(j, j), b2(ds, ds), c), row(s, x, t3(i, i), t3(j, j), b3(ds, ds), d)
        return a, b, c, d, offset

    return four_rows(v, v.function(step), 210, 256)


def _two_bit_parts(v: Any) -> Any:
    """(activations of a block) -> four i8x64, part i: columns 32 i to 32 i + 31 and the same of the second half."""
    pair = v.shuffle([*range(64)])

    def parts(x):
        a, b = v.load(v.i8x32, x), v.load(v.i8x32, x + 32)
        c, d = v.load(v.i8x32, x + 64), v.load(v.i8x32, x + 96)
        e, f = v.load(v.i8x32, x + 128), v.load(v.i8x32, x + 160)
        g, h = v.load(v.i8x32, x + 192), v.load(v.i8x32, x + 224)
        return pair(a, e), pair(b, f), pair(c, g), pair(d, h)

    return v.function(parts)


# Scales of parts 0 and 1, then of parts 2 and 3, as pairs in the pieces of a vector of quants.
_PART_PAIRS = [
    [8 * side + i + 2 * j + 4 * late for side in range(2) for i in range(2) for j in range(2)] for late in range(2)
]


@kernel("gemv_q2_k", arguments=7, isa="avx512")
def gemv_q2_k(v: Any) -> Callable[..., None]:
    """Scale and minimum nibbles [16], two bits [64], float16 d, float16 dmin."""
    join, scaled, parts, words = joined(v, v.u8x16), _pair_sums(v), _two_bit_parts(v), two_halves(v)
    t0, t1, t2, t3 = each_row(v)
    w0, w1 = (in_pieces(v, [i for place in order for i in (place, 16)]) for order in _PART_PAIRS)
    n0, n1 = (in_pieces(v, [i for place in range(8) for i in (8 * half + place, 16)]) for half in range(2))
    m0, m1 = _repeated(v, 8), v.shuffle([*range(8, 16)] * 4)
    b0, b1, b2, b3 = (v.shuffle([2 * r] * 16) for r in range(4))
    minima, quadruple = v.shuffle([2 * r + 1 for r in range(4) for _ in range(4)]), v.constants(v.u16x32, [2, 0] * 16)

    def row(p, y0, y1, y2, y3, scales0, scales1, size, total):
        x = v.load(v.u8x64, p + 16)
        upper = v.bits(v.u8x64, v.bits(v.u16x32, x) >> 4)
        early = scaled(v.dot(v.zero(v.i32), x & 3, y0), v.dot(v.zero(v.i32), x & 12, y1) << 16, scales0)
        late = scaled(v.dot(v.zero(v.i32), upper & 3, y2), v.dot(v.zero(v.i32), upper & 12, y3) << 16, scales1)
        return v.fma(early + late, size, total)

    row = v.function(row)

    def step(p, q, r, s, activations, columns, first, sums):
        a, b, c, d, minimum = sums
        y0, y1, y2, y3 = parts(activations + first)
        size = v.load(v.float32, activations + columns + (columns >> 4) + (columns >> 3) + (first >> 6))
        heads, none = join(p, q, r, s), v.zero(v.u8x64)
        lows = v.bits(v.u8x64, v.bits(v.u16x32, heads) >> 4) & 15
        heads = heads & 15
        i = v.bits(v.u32x16, v.bits(v.u16x32, w0(heads, none)) << quadruple())
        j = v.bits(v.u32x16, v.bits(v.u16x32, w1(heads, none)) << quadruple())
        s16 = v.load(v.i16x16, activations + columns + (columns >> 4) + (first >> 3))
        shifted = v.word_pairs(v.bits(v.i16x32, n0(lows, none)), m0(s16, s16))
        shifted = v.dot_words(shifted, v.bits(v.i16x32, n1(lows, none)), m1(s16, s16))
        halves = v.half(words(p + 80, q + 80, r + 80, s + 80)) * size
        minimum = v.fma(v.convert(v.f32, v.zero(v.i32) - shifted), minima(halves, halves), minimum)
        ds = halves * np.float32(0.25)
        a = row(p, y0, y1, y2, y3, t0(i, i), t0(j, j), b0(ds, ds), a)
        b = row(q, y0, y1, y2, y3, t1(i, i), t1(j, j), b1(ds, ds), b)
        c = row(r, y0, y1, y2, y3, t2(i, i), t2(j, j), b2(ds, ds), c)
        d = row(s, y0, y1, y2, y3, t3(i, i), t3(j, j), b3(ds, ds), d)
        return a, b, c, d, minimum

    return four_rows(v, v.function(step), 84, 256)


@kernel("gemv_q3_k", arguments=7, isa="avx512")
def gemv_q3_k(v: Any) -> Callable[..., None]:
    """Third bits [32], two bits [64], six-bit scales [12], less 32, float16 d; quants are stored with 4 added."""
    join, scaled, parts, twice = joined(v, v.u8x16), _pair_sums(v), _two_bit_parts(v), v.shuffle([*range(16)] * 2)
    t0, t1, t2, t3 = each_row(v)
    w0, w1 = (in_pieces(v, [i for place in order for i in (16, place)]) for order in _PART_PAIRS)
    n0, n1 = (in_pieces(v, [i for place in range(8) for i in (16, 8 * half + place)]) for half in range(2))
    m0, m1 = _repeated(v, 8), v.shuffle([*range(8, 16)] * 4)
    low_place, low_shift = in_pieces(v, [*range(2, 10)] * 2), v.constants(v.u32x16, [0, 0, 4, 4] * 4)
    high_place = in_pieces(v, [*range(10, 14)] * 4)
    left, right = v.constants(v.u32x16, [4, 2, 0, 0] * 4), v.constants(v.u32x16, [0, 0, 0, 2] * 4)
    quadruple, sides = v.constants(v.u16x32, [6, 8] * 16), v.constants(v.u16x32, [0] * 16 + [4] * 16)
    sizes, each = v.shuffle([7, 15, 23, 31]), v.shuffle([r for r in range(4) for _ in range(4)])
    b0, b1, b2, b3 = (v.shuffle([r] * 16) for r in range(4))

    def row(p, y0, y1, y2, y3, scales0, scales1, size, total):
        x, third = v.load(v.u8x64, p + 32), v.load(v.u16x16, p)
        third = twice(third, third) >> sides()
        upper = v.bits(v.u8x64, v.bits(v.u16x32, x) >> 4)
        q0 = (x & 3) | v.bits(v.u8x64, (third << 2) & 0x0404)
        q1 = (x & 12) | v.bits(v.u8x64, (third << 3) & 0x1010)
        q2 = (upper & 3) | v.bits(v.u8x64, third & 0x0404)
        q3 = (upper & 12) | v.bits(v.u8x64, (third << 1) & 0x1010)
        early = scaled(v.dot(v.zero(v.i32), q0, y0), v.dot(v.zero(v.i32), q1, y1) << 16, scales0)
        late = scaled(v.dot(v.zero(v.i32), q2, y2), v.dot(v.zero(v.i32), q3, y3) << 16, scales1)
        return v.fma(early + late, size, total)

    row = v.function(row)

    def step(p, q, r, s, activations, columns, first, sums):
        a, b, c, d, offset = sums
        y0, y1, y2, y3 = parts(activations + first)
        size = v.load(v.float32, activations + columns + (columns >> 4) + (columns >> 3) + (first >> 6))
        heads, none = join(p + 94, q + 94, r + 94, s + 94), v.zero(v.u8x64)
        low = v.bits(v.u32x16, low_place(heads, heads)) >> low_shift()
        high = (v.bits(v.u32x16, high_place(heads, heads)) << left()) >> right()
        six = (v.bits(v.u8x64, low) & 15) | (v.bits(v.u8x64, high) & 0x30)
        six = six - 32
        i = v.bits(v.u32x16, v.bits(v.i16x32, w0(six, none)) >> v.bits(v.i16x32, quadruple()))
        j = v.bits(v.u32x16, v.bits(v.i16x32, w1(six, none)) >> v.bits(v.i16x32, quadruple()))
        s16 = v.load(v.i16x16, activations + columns + (columns >> 4) + (first >> 3))
        shifted = v.word_pairs(v.bits(v.i16x32, n0(six, none)) >> 8, m0(s16, s16))
        shifted = v.dot_words(shifted, v.bits(v.i16x32, n1(six, none)) >> 8, m1(s16, s16))
        words = v.bits(v.u16x32, heads)
        ds = v.half(sizes(words, words)) * size
        offset = v.fma(v.convert(v.f32, shifted), each(ds, ds) * np.float32(-4), offset)
        ds = ds * np.float32(0.25)
        a = row(p, y0, y1, y2, y3, t0(i, i), t0(j, j), b0(ds, ds), a)
        b = row(q, y0, y1, y2, y3, t1(i, i), t1(j, j), b1(ds, ds), b)
        c = row(r, y0, y1, y2, y3, t2(i, i), t2(j, j), b2(ds, ds), c)
        d = row(s, y0, y1, y2, y3, t3(i, i), t3(j, j), b3(ds, ds), d)
        return a, b, c, d, offset

    return four_rows(v, v.function(step), 110, 256)


@kernel("gemv_iq4_xs", arguments=7, isa="avx512")
def gemv_iq4_xs(v: Any) -> Callable[..., None]:
    """Float16 d, two high scale bits u16, low scale nibbles [4], nibbles [8 x 16]; scales are stored with 32 added."""
    join, (even, odd) = joined(v, v.u8x16), alternating(v)
    t0, t1, t2, t3 = each_row(v)
    table, offsets = v.constants(v.u8x64, [x + 128 for x in iq4_values()] * 4), v.constants(v.u8x64, 128)
    low_place, high_place = (v.shuffle([4 * i + j for i in range(4) for _ in range(4)]) for j in (1, 0))
    low0, low1 = (v.constants(v.u32x16, [16 * half + 4 * i for i in range(4)] * 4) for half in range(2))
    high0, high1 = (v.constants(v.u32x16, [12 + 8 * half + 2 * i for i in range(4)] * 4) for half in range(2))
    sizes = v.shuffle([8 * i for i in range(4) for _ in range(4)])

    def half(p, y, z, begin):
        packed = v.load(v.u8x64, p)
        low, high = packed & 15, v.bits(v.u8x64, v.bits(v.u16x32, packed) >> 4) & 15
        return v.convert(v.f32, v.dot(v.dot(begin, v.look_up(table(), low), y), v.look_up(table(), high), z))

    half = v.function(half)

    def row(p, y0, z0, y1, z1, begin0, begin1, scales0, scales1, total):
        total = v.fma(half(p + 8, y0, z0, begin0), scales0, total)
        return v.fma(half(p + 72, y1, z1, begin1), scales1, total)

    row = v.function(row)

    def begin_with(y, z):
        return v.zero(v.i32) - v.dot(v.dot(v.zero(v.i32), offsets(), y), offsets(), z)

    begin_with = v.function(begin_with)

    def step(p, q, r, s, activations, columns, first, sums):
        a, b, c, d, none = sums
        x = activations + first
        size = v.load(v.float32, activations + columns + (columns >> 4) + (columns >> 3) + (first >> 6))
        heads = v.bits(v.u32x16, join(p, q, r, s))
        low, high, words = low_place(heads, heads), high_place(heads, heads), v.bits(v.u16x32, heads)
        ds = v.half(sizes(words, words)) * size
        i = v.bits(v.i32, ((low >> low0()) & 15) | ((high >> high0()) & 0x30)) - 32
        j = v.bits(v.i32, ((low >> low1()) & 15) | ((high >> high1()) & 0x30)) - 32
        i, j = v.convert(v.f32, i) * ds, v.convert(v.f32, j) * ds
        e, f, g, h = v.load(v.i8x64, x), v.load(v.i8x64, x + 64), v.load(v.i8x64, x + 128), v.load(v.i8x64, x + 192)
        y0, z0, y1, z1 = even(e, f), odd(e, f), even(g, h), odd(g, h)
        begin0, begin1 = begin_with(y0, z0), begin_with(y1, z1)
        a = row(p, y0, z0, y1, z1, begin0, begin1, t0(i, i), t0(j, j), a)
        b = row(q, y0, z0, y1, z1, begin0, begin1, t1(i, i), t1(j, j), b)
        c = row(r, y0, z0, y1, z1, begin0, begin1, t2(i, i), t2(j, j), c)
        d = row(s, y0, z0, y1, z1, begin0, begin1, t3(i, i), t3(j, j), d)
        return a, b, c, d, none

    return four_rows(v, v.function(step), 136, 256)
