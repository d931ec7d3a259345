"""Matrix times vector with 256-bit vectors, formats of 32-element blocks of nibbles, four rows at a time; the contract
is `matmul.py`'s.

A vector holds the nibbles of two rows: one shift parts them, and low halves meet the first 16 activations, high halves
the others, so that their products can be added before they are widened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from localmoe.kernels.cpu.blocks import E2M1
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.cpu.rows import four_rows


def _halves(v: Any) -> Any:
    """(p, q, r, s) -> f32x4: the float16 at each address."""

    def halves(p, q, r, s):
        a, b = v.convert(v.int64, v.load(v.uint16, p)), v.convert(v.int64, v.load(v.uint16, q))
        c, d = v.convert(v.int64, v.load(v.uint16, r)), v.convert(v.int64, v.load(v.uint16, s))
        return v.half(v.bits(v.u16x4, (a | (b << 16)) | ((c | (d << 16)) << 32)))

    return v.function(halves)


def _exponents(v: Any) -> Any:
    """As `_halves`, of bytes that are exponents of float32. 0 gives 0 instead of 2^-127, which no sum would keep."""

    def exponents(p, q, r, s):
        a, b = v.convert(v.int32, v.load(v.uint8, p)), v.convert(v.int32, v.load(v.uint8, q))
        c, d = v.convert(v.int32, v.load(v.uint8, r)), v.convert(v.int32, v.load(v.uint8, s))
        four = v.bits(v.u8x4, v.convert(v.int32, (a | (b << 8)) | ((c | (d << 8)) << 16)))
        return v.bits(v.f32x4, v.convert(v.u32x4, four) << 23)

    return v.function(exponents)


def _nibbles(v: Any, offset: int) -> Any:
    """(p, q) -> low halves of the 16 bytes at `offset` of two blocks, u8x32, and the high halves."""
    join = v.shuffle([*range(32)])

    def halves(p, q):
        packed = join(v.load(v.u8x16, p + offset), v.load(v.u8x16, q + offset))
        return packed & 15, v.bits(v.u8x32, (v.bits(v.u16x16, packed) >> 4) & 0x0F0F)

    return v.function(halves)


def _pairs_of_rows(
    v: Any, nbytes: int, quants: Any, scales: Any, offset: int, factor: float = 1.0
) -> Callable[..., None]:
    """Blocks of 32 values, stored with `offset` added: `quants(p, q)` brings the first 16 of two rows and the second
    16, both u8x32; `scales(p, q, r, s)`, f32x4, are multiplied by `factor`. A quant has at most six bits: two products
    are added in 16."""
    offsets, ones, twice = v.constants(v.u8x32, offset), v.constants(v.i16x16, 1), v.shuffle([*range(16)] * 2)
    first_rows, second_rows = v.shuffle([0] * 4 + [1] * 4), v.shuffle([2] * 4 + [3] * 4)
    left, right = v.shuffle([0, 1, 2, 3]), v.shuffle([4, 5, 6, 7])

    def two(p, q, y, z, taken, scale, total):
        low, high = quants(p, q)
        pairs = (v.byte_pairs(low, y) + v.byte_pairs(high, z)) - taken
        return v.fma(v.convert(v.f32, v.word_pairs(pairs, ones())), scale, total)

    two = v.function(two)

    def block(p, q, r, s, activations, columns, first, sums):
        a, b, c, d, fifth = sums
        low, high = v.load(v.i8x16, activations + first), v.load(v.i8x16, activations + first + 16)
        y, z = twice(low, low), twice(high, high)
        taken = v.byte_pairs(offsets(), y) + v.byte_pairs(offsets(), z)
        size = v.load(v.float32, activations + ((columns + 63) & -64) + (first >> 3)) * np.float32(factor)
        size = scales(p, q, r, s) * size
        a, b = two(p, q, y, z, taken, first_rows(size, size), a), two(r, s, y, z, taken, second_rows(size, size), b)
        return a, b, c, d, fifth

    block = v.function(block)

    def blocks(p, q, r, s, activations, columns, first, sums):
        for i in range(4):
            o = i * nbytes
            sums = block(p + o, q + o, r + o, s + o, activations, columns, first + 32 * i, sums)
        return sums

    def totals(sums):
        a, b = sums[0], sums[1]
        return v.total(left(a, a)), v.total(right(a, a)), v.total(left(b, b)), v.total(right(b, b))

    return four_rows(v, v.function(blocks), 4 * nbytes, 128, block, totals=v.function(totals))


@kernel("gemv_q4_0", arguments=7, isa="avx2")
def gemv_q4_0(v: Any) -> Callable[..., None]:
    return _pairs_of_rows(v, 18, _nibbles(v, 2), _halves(v), 8)


@kernel("gemv_mxfp4", arguments=7, isa="avx2")
def gemv_mxfp4(v: Any) -> Callable[..., None]:
    """Exponent u8, nibbles [16]."""
    nibbles, table = _nibbles(v, 1), v.constants(v.u8x32, [value + 12 for value in E2M1] * 2)

    def quants(p, q):
        low, high = nibbles(p, q)
        return v.look_up(table(), low), v.look_up(table(), high)

    return _pairs_of_rows(v, 17, v.function(quants), _exponents(v), 12, 0.5)
