"""Matrix times vector with 512-bit vectors and VNNI, formats of 32-element blocks; the contract is `matmul.py`'s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from localmoe.kernels.cpu.blocks import E2M1, iq4_values
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.cpu.rows import four_rows
from localmoe.kernels.cpu.rows_avx512 import alternating, each_row, joined


def _windows(nbytes: int, offset: int, size: int) -> tuple[int, int]:
    """Where two vectors of 64 bytes begin that cover `size` bytes at `offset` of each of four blocks and lie inside
    them."""
    places = [i * nbytes + offset for i in range(4)]
    for first in (0, offset):
        rest = [place for place in places if not first <= place <= first + 64 - size]
        for second in (rest[0] - offset, 4 * nbytes - 64) if rest else (first,):
            if all(second <= place <= second + 64 - size for place in rest):
                return first, second
    raise AssertionError(f"no two vectors cover {size} bytes at {offset} of blocks of {nbytes}")


def _pieces(v: Any, nbytes: int, offset: int) -> Any:
    """(address of four blocks) -> u8x64: 16 bytes at `offset` of each, by two loads where four and three insertions
    would be slower; `nbytes` 0: of one block, four times."""
    if nbytes % 2 or not nbytes:
        join = joined(v, v.u8x16)

        def pieces(p):
            q = p + offset
            return join(q, q + nbytes, q + 2 * nbytes, q + 3 * nbytes)

        return v.function(pieces)
    first, second = _windows(nbytes, offset, 16)
    places = [i * nbytes + offset for i in range(4)]
    starts = [(p - first) // 2 if first <= p <= first + 48 else 32 + (p - second) // 2 for p in places]
    pick = v.shuffle([start + i for start in starts for i in range(8)])

    def pieces_of_windows(p):
        return v.bits(v.u8x64, pick(v.load(v.u16x32, p + first), v.load(v.u16x32, p + second)))

    return v.function(pieces_of_windows)


def _halves(v: Any, nbytes: int, offset: int) -> Any:
    """(four addresses, of four blocks each) -> f32x16: the float16 at `offset` of each block, a piece for each address;
    `nbytes` 0: of one block, four times."""
    two, four = v.shuffle([*range(8)]), v.shuffle([*range(16)])
    first, second = _windows(nbytes, offset, 2) if nbytes else (0, 0)
    places = [(i * nbytes + offset - first) // 2 for i in range(4)]
    if not nbytes:
        spread = v.shuffle([0] * 4)

        def at(p):
            bits = v.bits(v.u16x2, v.load(v.uint32, p + offset))
            return spread(bits, bits)

    elif first == second:
        pair = v.shuffle(places + [32 + place for place in places])

        def halves_of_pairs(p, q, r, s):
            low = pair(v.load(v.u16x32, p + first), v.load(v.u16x32, q + first))
            return v.half(four(low, pair(v.load(v.u16x32, r + first), v.load(v.u16x32, s + first))))

        return v.function(halves_of_pairs)
    else:
        places = [i * nbytes + offset for i in range(4)]
        pick = v.shuffle([(p - first) // 2 if p <= first + 62 else 32 + (p - second) // 2 for p in places])

        def at(p):
            return pick(v.load(v.u16x32, p + first), v.load(v.u16x32, p + second))

    at = v.function(at)

    def halves(p, q, r, s):
        return v.half(four(two(at(p), at(q)), two(at(r), at(s))))

    return v.function(halves)


def _activations(v: Any, factor: float) -> tuple[Any, Any]:
    """Two functions (activations, columns, first) -> first and second halves of four blocks' int8, and their scales
    times `factor` as f32x16, in every piece the same four; the second function is for one block, which takes all four
    places, with three scales 0."""
    even, odd = alternating(v)
    repeated, alone, halves = v.shuffle([*range(4)] * 4), v.shuffle([0, 16, 16, 16] * 4), v.shuffle([*range(16)] * 4)

    def four(activations, columns, first):
        x = activations + first
        y, z = v.load(v.i8x64, x), v.load(v.i8x64, x + 64)
        scales = v.load(v.f32x4, activations + ((columns + 63) & -64) + (first >> 3))
        return even(y, z), odd(y, z), repeated(scales, scales) * np.float32(factor)

    def one(activations, columns, first):
        y, z = v.load(v.i8x16, activations + first), v.load(v.i8x16, activations + first + 16)
        scale = v.load(v.float32, activations + ((columns + 63) & -64) + (first >> 3)) * np.float32(factor)
        return halves(y, y), halves(z, z), alone(v.splat(v.f32, scale), v.zero(v.f32))

    return v.function(four), v.function(one)


def _blocks32(
    v: Any, nbytes: int, quants: Any, scales: Any, offset: int, factor: float = 1.0, near: int = 0
) -> Callable[..., None]:
    """Blocks of 32 values, stored with `offset` added.

    `quants(stride)(p)` brings those of four blocks `stride` apart as two u8x64, their first and their second halves;
    `scales(v, stride, 0)` is as `_halves`; what they bring is multiplied by `factor`.
    """
    offsets = v.constants(v.u8x64, offset)
    t0, t1, t2, t3 = each_row(v)

    def step(stride, prepare):
        load, scales_of = v.function(quants(stride)), scales(v, stride, 0)

        def row(p, y, z, begin, scale, total):
            first, second = load(p)
            return v.fma(v.convert(v.f32, v.dot(v.dot(begin, first, y), second, z)), scale, total)

        row = v.function(row)

        def rows(p, q, r, s, activations, columns, first, sums):
            a, b, c, d, none = sums
            y, z, scale = prepare(activations, columns, first)
            begin = v.zero(v.i32) - v.dot(v.dot(v.zero(v.i32), offsets(), y), offsets(), z)
            scale = scales_of(p, q, r, s) * scale
            a, b = row(p, y, z, begin, t0(scale, scale), a), row(q, y, z, begin, t1(scale, scale), b)
            c, d = row(r, y, z, begin, t2(scale, scale), c), row(s, y, z, begin, t3(scale, scale), d)
            return a, b, c, d, none

        return v.function(rows)

    four, one = _activations(v, factor)
    return four_rows(v, step(nbytes, four), 4 * nbytes, 128, step(0, one), near)


def _blocks32_minimum(v: Any, nbytes: int, quants: Any) -> Callable[..., None]:
    """Q4_1 and Q5_1: float16 d, float16 m, then unsigned quants; a weight is d · quant + m."""
    ones = v.constants(v.u8x64, 1)
    t0, t1, t2, t3 = each_row(v)
    f0, f1, f2, f3 = (v.shuffle([4 * i + lane for i in range(4)] * 4) for lane in range(4))

    def step(stride, prepare):
        load, scales_of, minima_of = v.function(quants(stride)), _halves(v, stride, 0), _halves(v, stride, 2)

        def row(p, y, z, scale, total):
            first, second = load(p)
            products = v.dot(v.dot(v.zero(v.i32), first, y), second, z)
            return v.fma(v.convert(v.f32, products), scale, total)

        row = v.function(row)

        def rows(p, q, r, s, activations, columns, first, sums):
            a, b, c, d, minimum = sums
            y, z, size = prepare(activations, columns, first)
            quarters = v.dot(v.dot(v.zero(v.i32), ones(), y), ones(), z)
            sum32 = (f0(quarters, quarters) + f1(quarters, quarters)) + (
                f2(quarters, quarters) + f3(quarters, quarters)
            )
            minimum = v.fma(minima_of(p, q, r, s) * size, v.convert(v.f32, sum32), minimum)
            scale = scales_of(p, q, r, s) * size
            a, b = row(p, y, z, t0(scale, scale), a), row(q, y, z, t1(scale, scale), b)
            c, d = row(r, y, z, t2(scale, scale), c), row(s, y, z, t3(scale, scale), d)
            return a, b, c, d, minimum

        return v.function(rows)

    four, one = _activations(v, 1.0)
    return four_rows(v, step(nbytes, four), 4 * nbytes, 128, step(0, one))


@kernel("gemv_q8_0", arguments=7, isa="avx512")
def gemv_q8_0(v: Any) -> Callable[..., None]:
    def quants(stride):
        first_half, second_half = _pieces(v, stride, 2), _pieces(v, stride, 18)

        def load(p):
            return first_half(p) ^ 128, second_half(p) ^ 128

        return load

    return _blocks32(v, 34, quants, _halves, 128, near=1024)


def _nibbles(v: Any, offset: int) -> Any:
    """stride -> function(p) -> low and high nibbles of 16 bytes at `offset` of each of four blocks."""

    def quants(stride):
        pieces = _pieces(v, stride, offset)

        def load(p):
            packed = pieces(p)
            return packed & 15, v.bits(v.u8x64, (v.bits(v.u16x32, packed) >> 4) & 0x0F0F)

        return load

    return quants


def _five_bits(v: Any, offset: int) -> Any:
    """stride -> function(p) -> quants of 32 fifth bits at `offset` and the nibbles behind them."""
    nibbles = _nibbles(v, offset + 4)

    def quants(stride):
        four = v.function(nibbles(stride))

        def bits(p):
            a, b = v.load(v.uint16, p), v.load(v.uint16, p + stride)
            c, d = v.load(v.uint16, p + 2 * stride), v.load(v.uint16, p + 3 * stride)
            return v.marked(v.u8x64, a | (b << 16) | (c << 32) | (d << 48)) & 16

        bits = v.function(bits)

        def load(p):
            first, second = four(p)
            return first + bits(p + offset), second + bits(p + offset + 2)

        return load

    return quants


@kernel("gemv_q4_0", arguments=7, isa="avx512")
def gemv_q4_0(v: Any) -> Callable[..., None]:
    return _blocks32(v, 18, _nibbles(v, 2), _halves, 8)


@kernel("gemv_q4_1", arguments=7, isa="avx512")
def gemv_q4_1(v: Any) -> Callable[..., None]:
    return _blocks32_minimum(v, 20, _nibbles(v, 4))


@kernel("gemv_q5_0", arguments=7, isa="avx512")
def gemv_q5_0(v: Any) -> Callable[..., None]:
    return _blocks32(v, 22, _five_bits(v, 2), _halves, 16)


@kernel("gemv_q5_1", arguments=7, isa="avx512")
def gemv_q5_1(v: Any) -> Callable[..., None]:
    return _blocks32_minimum(v, 24, _five_bits(v, 4))


def _looked_up(v: Any, offset: int, values: list[int]) -> Any:
    """stride -> function(p) -> what a table has for each nibble, with 128 added."""
    nibbles, table = _nibbles(v, offset), v.constants(v.u8x64, [value + 128 for value in values] * 4)

    def quants(stride):
        four = v.function(nibbles(stride))

        def load(p):
            first, second = four(p)
            return v.look_up(table(), first), v.look_up(table(), second)

        return load

    return quants


@kernel("gemv_iq4_nl", arguments=7, isa="avx512")
def gemv_iq4_nl(v: Any) -> Callable[..., None]:
    return _blocks32(v, 18, _looked_up(v, 2, iq4_values()), _halves, 128)


def _exponents(v: Any, nbytes: int, offset: int) -> Any:
    """As `_halves`, of bytes that are exponents of float32. 0 gives 0 instead of 2^-127, which no sum would keep."""
    four, eight = v.shuffle([*range(8)]), v.shuffle([*range(16)])

    def at(p):
        p = p + offset
        a, b = v.load(v.uint8, p), v.load(v.uint8, p + nbytes)
        c, d = v.load(v.uint8, p + 2 * nbytes), v.load(v.uint8, p + 3 * nbytes)
        return v.bits(v.u8x4, v.convert(v.int32, a | (b << 8) | (c << 16) | (d << 24)))

    at = v.function(at)

    def exponents(p, q, r, s):
        bytes16 = eight(four(at(p), at(q)), four(at(r), at(s)))
        return v.bits(v.f32, v.convert(v.u32x16, bytes16) << 23)

    return v.function(exponents)


@kernel("gemv_mxfp4", arguments=7, isa="avx512")
def gemv_mxfp4(v: Any) -> Callable[..., None]:
    return _blocks32(v, 17, _looked_up(v, 1, E2M1), _exponents, 128, 0.5)
