"""Matrix times vector on the formats with code books of 1,024 entries and more (IQ2_S, IQ1), with 512-bit vectors and
VNNI; the contract is `matmul.py`'s.

Tables of this size fill too many registers for `matmul_grids_avx512.py`'s look-up, so entries are loaded one by one;
their indices are worked out 32 at a time, a block ahead, and pass through memory. One row at a time: four of them leave
the compiler too few registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from localmoe.kernels.cpu.blocks import code_book
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.cpu.grids import GRIDS
from localmoe.kernels.cpu.rows import stream


def _rows(v: Any, name: str, ahead: Any, block: Any) -> Callable[..., None]:
    """The kernel of `ahead(block, memory)`, which leaves in 128 bytes what the next call of `block(block, memory,
    activations, int16 sums of 16 of them, of 32) -> i32x16`, of scale times quant times activation, wants."""
    nbytes, fraction, size_of = GRIDS[name].nbytes, np.float32(GRIDS[name].fraction), GRIDS[name].size(v)
    (first_lines, places, follow), held, lines = stream(v), v.stack(256), nbytes & -64
    ahead, block = v.function(ahead), v.function(block)

    def gemv(weights, row_nbytes, activations, out, columns, row_start, row_stop):
        blocks, end, memory, turn = columns >> 8, weights + row_stop * row_nbytes, held(), 0
        sums32, sums16 = activations + columns, activations + columns + (columns >> 4)
        sizes = sums16 + (columns >> 3)
        first_lines(weights + row_start * row_nbytes, end, row_nbytes)
        if row_start < row_stop:
            ahead(weights + row_start * row_nbytes, memory)
        for row in range(row_start, row_stop):
            w, total = weights + row * row_nbytes, v.zero(v.f32)
            far, near = places(w, end, row_nbytes)
            for i in range(blocks):
                p = w + i * nbytes
                follow(far, near, i * lines, (i + 1) * lines)
                ahead(min(p + nbytes, end - nbytes), memory + (turn ^ 128))
                products = block(p, memory + turn, activations + i * 256, sums16 + i * 32, sums32 + i * 16)
                size = size_of(p) * v.load(v.float32, sizes + i * 4) * fraction
                total = v.fma(v.convert(v.f32, products), v.splat(v.f32, size), total)
                turn = turn ^ 128
            follow(far, near, blocks * lines, row_nbytes)
            v.store(out + row * 4, v.total(total))

    return gemv


def _scaled(v: Any) -> Any:
    """(four i16x32 of products, four of their scales, i32x16 to begin with) -> i32x16"""

    def scaled(a, b, c, d, s0, s1, s2, s3, begin):
        return v.dot_words(v.dot_words(v.dot_words(v.dot_words(begin, a, s0), b, s1), c, s2), d, s3)

    return v.function(scaled)


@kernel("gemv_iq2_s", arguments=7, isa="avx512")
def gemv_iq2_s(v: Any) -> Callable[..., None]:
    """Float16 d, indices u8[32], signs u8[32], two high index bits u8[8], scale nibbles [8]."""
    entries, scaled = v.entries(code_book("IQ2_S")), _scaled(v)
    shifts = v.constants(v.u16x32, ([0] * 8 + [4] * 8) * 2)
    s0, s1, s2, s3 = (
        v.shuffle([i for c in range(4) for _ in range(8) for i in (16 * c + 2 * z + c // 2, 64)]) for z in range(4)
    )

    def ahead(p, memory):
        high = v.bits(v.u16x32, v.marked(v.u8x64, v.load(v.int64, p + 66))) << 1
        v.store(memory, v.convert(v.u16x32, v.load(v.u8x32, p + 2)) | (high & 0x300))

    def block(p, memory, x, sums16, sums32):
        nibbles = v.bits(v.u16x32, v.splat(v.i64x8, v.load(v.int64, p + 74))) >> shifts()
        scales, none = v.bits(v.u8x64, ((nibbles << 1) & 0x1E1E) | 0x0101), v.zero(v.u8x64)
        a = v.byte_pairs(entries(memory), v.negative(v.load(v.i8x64, x), v.load(v.int64, p + 34)))
        b = v.byte_pairs(entries(memory + 16), v.negative(v.load(v.i8x64, x + 64), v.load(v.int64, p + 42)))
        c = v.byte_pairs(entries(memory + 32), v.negative(v.load(v.i8x64, x + 128), v.load(v.int64, p + 50)))
        d = v.byte_pairs(entries(memory + 48), v.negative(v.load(v.i8x64, x + 192), v.load(v.int64, p + 58)))
        e, f = v.bits(v.i16x32, s0(scales, none)), v.bits(v.i16x32, s1(scales, none))
        g, h = v.bits(v.i16x32, s2(scales, none)), v.bits(v.i16x32, s3(scales, none))
        return scaled(a, b, c, d, e, f, g, h, v.zero(v.i32))

    return _rows(v, "IQ2_S", ahead, block)


@kernel("gemv_iq1_s", arguments=7, isa="avx512")
def gemv_iq1_s(v: Any) -> Callable[..., None]:
    """Float16 d, indices u8[32], u16[8] of four 3-bit high index parts, a 3-bit scale, whether the shift is down.

    Eight times the values are stored with 8 added, which the sums of the activations take off with the shift."""
    entries, scaled = v.entries(8 * (code_book("IQ1_S") + 1)), _scaled(v)
    each, shifts = v.shuffle([j for j in range(8) for _ in range(4)]), v.constants(v.u16x32, [0, 3, 6, 9] * 8)
    s0, s1, s2, s3 = (v.shuffle([2 * z] * 16 + [2 * z + 1] * 16) for z in range(4))
    widened = v.shuffle([*range(4)] + [4] * 12)

    def ahead(p, memory):
        words = v.load(v.u16x8, p + 34)
        high = ((each(words, words) >> shifts()) << 8) & 0x700
        v.store(memory, v.convert(v.u16x32, v.load(v.u8x32, p + 2)) | high)

    def block(p, memory, x, sums16, sums32):
        a, b = (
            v.byte_pairs(entries(memory), v.load(v.i8x64, x)),
            v.byte_pairs(entries(memory + 16), v.load(v.i8x64, x + 64)),
        )
        c = v.byte_pairs(entries(memory + 32), v.load(v.i8x64, x + 128))
        d = v.byte_pairs(entries(memory + 48), v.load(v.i8x64, x + 192))
        words = v.load(v.u16x8, p + 34)
        s = v.bits(v.i16x8, ((words >> 11) & 14) | 1)
        lows = v.word_pairs(s * (v.bits(v.i16x8, words >> 15) * -2 - 7), v.load(v.i16x8, sums32))
        begin = widened(lows, v.zero(v.i32x4))
        return scaled(a, b, c, d, s0(s, s), s1(s, s), s2(s, s), s3(s, s), begin)

    return _rows(v, "IQ1_S", ahead, block)


@kernel("gemv_iq1_m", arguments=7, isa="avx512")
def gemv_iq1_m(v: Any) -> Callable[..., None]:
    """Indices u8[32], nibbles [32] of 3 high index bits and whether the shift is down, u16[4] of four 3-bit scales and
    a nibble of d.

    Eight times the values, shifted up, are stored with 9 added; bit 1 is taken off where the shift is down."""
    entries, scaled = v.entries(8 * (code_book("IQ1_S") + 1) + 2), _scaled(v)
    each, shifts = v.shuffle([0] * 4 + [1] * 4 + [2] * 4 + [3] * 4), v.constants(v.u16x16, [0, 3, 6, 9] * 4)
    s0, s1, s2, s3 = (v.shuffle([4 * z + i for i in range(4) for _ in range(8)]) for z in range(4))
    widened = v.shuffle([*range(8)] + [8] * 8)

    def ahead(p, memory):
        both = v.convert(v.u32x16, v.load(v.u8x16, p + 32))
        high = v.bits(v.u16x32, (both << 8) | (both << 20))
        v.store(memory, v.convert(v.u16x32, v.load(v.u8x32, p)) | (high & 0x700))
        v.store(memory + 64, v.bits(v.i16x32, high << 4) >> 15)

    def products(x, memory):
        down = v.bits(v.u8x64, v.convert(v.i64x8, v.load(v.i16x8, memory + 64)))
        return v.byte_pairs(entries(memory) ^ (down & 2), v.load(v.i8x64, x))

    products = v.function(products)

    def block(p, memory, x, sums16, sums32):
        a, b = products(x, memory), products(x + 64, memory + 16)
        c, d = products(x + 128, memory + 32), products(x + 192, memory + 48)
        words = v.load(v.u16x4, p + 48)
        s = v.bits(v.i16x16, (((each(words, words) >> shifts()) << 1) & 14) | 1)
        begin = widened(v.word_pairs(s * -9, v.load(v.i16x16, sums16)), v.zero(v.i32x8))
        return scaled(a, b, c, d, s0(s, s), s1(s, s), s2(s, s), s3(s, s), begin)

    return _rows(v, "IQ1_M", ahead, block)
