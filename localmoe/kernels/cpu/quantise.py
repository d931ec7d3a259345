"""Rows of float32 as GGUF blocks: Q8_0 and the blocks of 256, to the bits of `kernels/quantise.py`, which says how.

Kernel `quantise_<format>`: (source float32, destination, elements), elements being whole blocks. The parts of a block
are lanes: value i of every part stands in one vector, so that the twin's sums in order are additions of vectors.
Nothing is fused, as the twin rounds every product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from localmoe.formats import FORMATS
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.quantise import SCALED, SMALLEST, Scaled

NAMES = ("Q8_0", *SCALED)
_MAGIC = np.float32(12582912)  # 1.5 · 2^23: added and taken away, it rounds |x| < 2^22 to the nearest even
_ZERO, _ONE = np.float32(0), np.float32(1)


@kernel("quantise_q8_0", arguments=3)
def quantise_q8_0(v: Any) -> Callable[..., None]:
    """d f16 | int8[32]: halves are rounded away from zero"""
    floor = _floor(v)

    def quants(x):
        size = v.absolute(x)
        whole = floor(size)
        q = whole + floor((size - whole) * np.float32(2))
        return v.convert(v.i8x16, v.nearest(v.above(v.zero(v.f32x16), x, -q, q)))

    quants = v.function(quants)

    def quantise(source, destination, elements):
        for i in range(elements // 32):
            x, p = source + 128 * i, destination + 34 * i
            low, high = v.load(v.f32x16, x), v.load(v.f32x16, x + 64)
            scale = v.largest(v.maximum(v.absolute(low), v.absolute(high))) / np.float32(127)
            inverse = _ONE / scale if scale > SMALLEST else _ZERO
            v.store_half(p, scale)
            v.store(p + 2, quants(low * inverse))
            v.store(p + 18, quants(high * inverse))

    return quantise


def _floor(v: Any) -> Any:
    """(vector of |x| < 2^22) -> the whole numbers below."""

    def floor(x):
        near = (x + _MAGIC) - _MAGIC
        return v.above(near, x, near - _ONE, near)

    return v.function(floor)


def _inverse(v: Any) -> Any:
    """(vector) -> 1 / x, and 0 where x is 0."""

    def inverse(x):
        nothing = x - x
        return v.above(v.absolute(x), nothing, (nothing + _ONE) / x, nothing)

    return v.function(inverse)


def _rounded(v: Any, how: Scaled) -> Any:
    """(x + start, inverse of the step) -> quants `least` … `most`, as floats."""
    least, most = np.float32(how.least), np.float32(how.most)

    def rounded(x, inverse):
        nothing = inverse - inverse
        held = v.minimum(v.maximum(x * inverse, nothing + least), nothing + most)
        return (held + _MAGIC) - _MAGIC

    return v.function(rounded)


def _fit(v: Any, how: Scaled, kind: Any) -> Any:
    """(parts, room for as much) -> scale and offset of each part, as the twin's `fitted` and `fitted_evenly`."""
    part, nbytes, count = how.part, 4 * how.parts, len(how.widths)
    inverse, least, most = _inverse(v), np.float32(how.least), np.float32(how.most)
    signed, bound = (1, how.most) if how.offsets else (-1, -how.least)
    steps = v.table(np.array([signed * (bound + width) for width in how.widths], np.float32))
    offsets, values = how.offsets, np.float32(part)

    def fit(x, y):
        nothing = v.zero(kind)
        low = high = v.load(kind, x)
        for i in range(1, part):
            value = v.load(kind, x + nbytes * i)
            low, high = v.minimum(value, low), v.maximum(value, high)
        if offsets:
            low = v.minimum(low, nothing)
            span = high - low
        else:
            span = v.above(high, -low, high, low)
        unit = v.above(v.absolute(span), nothing + SMALLEST, (nothing + _ONE) / span, nothing)
        base = low if offsets else nothing
        total = nothing
        for i in range(part):
            value = v.load(kind, x + nbytes * i) - base
            v.store(y + nbytes * i, value)
            total = total + value
        best, scale, offset = nothing - _ONE, nothing, -base
        for k in range(count):
            factor = unit * v.load(v.float32, steps() + 4 * k)
            ones, squares, products = nothing, nothing, nothing
            for i in range(part):
                value = v.load(kind, y + nbytes * i)
                held = v.minimum(v.maximum(value * factor, nothing + least), nothing + most)
                quants = (held + _MAGIC) - _MAGIC
                ones, squares = ones + quants, squares + quants * quants
                products = products + quants * value
            shift = nothing
            if offsets:
                shift = (squares * total - ones * products) * inverse(squares * values - ones * ones)
                shift = v.minimum(shift, -base)
            rest = products - shift * ones
            slope = rest * inverse(squares)
            gain = shift * ((total + total) - shift * values) + slope * rest
            scale, offset = v.above(gain, best, slope, scale), v.above(gain, best, -base - shift, offset)
            best = v.above(gain, best, gain, best)
        return scale, offset

    return v.function(fit)


def _choose(v: Any, how: Scaled, kind: Any) -> Any:
    """(parts, scale, offset, d, m) -> the multiples of d and m, as the twin's `_best_multiples`."""
    part, nbytes, refits, offsets = how.part, 4 * how.parts, how.refits, how.offsets
    floor, inverse, rounded = _floor(v), _inverse(v), _rounded(v, how)
    low = np.float32(0 if offsets else -how.limit)
    high, share = np.float32(how.limit - (not offsets)), np.float32(1 / part)
    attempts = 4 if offsets else 2

    def error_of(x, step, start):
        error, back = v.zero(kind), inverse(step)
        for i in range(part):
            value = v.load(kind, x + nbytes * i)
            left = rounded(value + start, back) * step - start - value
            error = error + left * left
        return error

    error_of = v.function(error_of)

    def refitted(x, a, b, d, m):
        start, back = b * m, inverse(a * d)
        squares, products, shift = v.zero(kind), v.zero(kind), v.zero(kind)
        for i in range(part):
            moved = v.load(kind, x + nbytes * i) + start
            quants = rounded(moved, back)
            squares, products = squares + quants * quants, products + quants * moved
        back_d, back_m = inverse(v.splat(kind, d)), inverse(v.splat(kind, m))
        a = ((products * inverse(squares)) * back_d + _MAGIC) - _MAGIC
        a = v.minimum(v.maximum(a, v.zero(kind) + low), v.zero(kind) + high)
        step = a * d
        for i in range(part):
            value = v.load(kind, x + nbytes * i)
            shift = shift + (rounded(value + start, back) * step - value)
        return a, ((shift * share) * back_m + _MAGIC) - _MAGIC

    refitted = v.function(refitted)

    def choose(x, scale, offset, d, m):
        nothing = v.zero(kind)
        below, under = floor(scale * inverse(v.splat(kind, d))), floor(offset * inverse(v.splat(kind, m)))
        error = nothing + np.float32(np.inf)
        scales, minima = nothing, nothing
        for k in range(attempts + refits):
            if k < attempts:
                a, b = below + np.float32(k & 1), under + np.float32(k >> 1)
            else:
                a, b = refitted(x, scales, minima, d, m)
            a = v.minimum(v.maximum(a, nothing + low), nothing + high)
            b = v.minimum(v.maximum(b, nothing), nothing + high)
            found = error_of(x, a * d, b * m)
            scales, minima = v.above(error, found, a, scales), v.above(error, found, b, minima)
            error = v.above(error, found, found, error)
        return scales, minima

    return v.function(choose)


def _scaled(v: Any, how: Scaled) -> Any:
    """(256 float32, room) -> d and m; in the room quants u8[256], then scales and offsets, int32 for each part."""
    kind, parts, part = getattr(v, f"f32x{how.parts}"), how.parts, how.part
    whole = getattr(v, f"i32x{parts}")
    fit, choose, inverse, rounded = _fit(v, how, kind), _choose(v, how, kind), _inverse(v), _rounded(v, how)
    column, turned, spare, held = v.strided(kind, 4 * part), v.stack(1024), v.stack(1024), v.stack(192)
    limit, signed, least = np.float32(how.limit), not how.offsets, how.least

    def scaled(source, room):
        x, table = turned(), held()
        for i in range(part):
            v.store(x + 4 * parts * i, column(source + 4 * i))
        scale, offset = fit(x, spare())
        widest = v.largest(scale)
        if signed:
            lowest = -v.largest(-scale)
            widest = -(widest if widest > -lowest else lowest)
        v.store_half(table, widest / limit)
        v.store_half(table + 2, v.largest(offset) / limit)
        d, m = v.load_half(v.float32, table) + _ZERO, v.load_half(v.float32, table + 2) + _ZERO
        scales, minima = choose(x, scale, offset, d, m)
        v.store(room + 256, v.bits(whole, v.nearest(scales)))
        v.store(room + 256 + 4 * parts, v.bits(whole, v.nearest(minima)))
        v.store(table + 64, inverse(scales * d))
        v.store(table + 128, minima * m)
        for j in range(parts):
            back, start = v.load(v.float32, table + 64 + 4 * j), v.load(v.float32, table + 128 + 4 * j)
            for i in range(0, part, 16):
                values = v.load(v.f32x16, source + 4 * (part * j + i)) + start
                quants = v.nearest(rounded(values, v.splat(v.f32x16, back))) - least
                v.store(room + part * j + i, v.convert(v.u8x16, quants))
        return d, m

    return v.function(scaled)


def _quarters(v: Any) -> Any:
    """(quants, destination, shift): two bits of each of 256, from bit `shift` on, in 64 bytes."""

    def quarters(quants, destination, shift):
        for half in range(2):
            q = quants + 128 * half
            packed = (v.load(v.u8x32, q) >> shift) & 3
            for n in range(1, 4):
                packed = packed | (((v.load(v.u8x32, q + 32 * n) >> shift) & 3) << (2 * n))
            v.store(destination + 32 * half, packed)

    return v.function(quarters)


def _bit_of_eight(v: Any) -> Any:
    """(quants, destination, bit): that bit of the values i, i + 32 … i + 224 in byte i of 32."""

    def gathered(quants, destination, bit):
        packed = (v.load(v.u8x32, quants) >> bit) & 1
        for n in range(1, 8):
            packed = packed | (((v.load(v.u8x32, quants + 32 * n) >> bit) & 1) << n)
        v.store(destination, packed)

    return v.function(gathered)


def _nibbles(v: Any, distance: int) -> Any:
    """(quants, destination): low nibbles of 128 bytes; each byte has a value and the one `distance` behind it."""

    def nibbles(quants, destination):
        for i in range(0, 128, 32):
            q = quants + 2 * (i // distance) * distance + i % distance
            v.store(destination + i, (v.load(v.u8x32, q) & 15) | (v.load(v.u8x32, q + distance) << 4))

    return v.function(nibbles)


def _six_bit_pairs(v: Any) -> Any:
    """(scales and minima int32[8] each, destination of 12 bytes)."""

    def packed(scales, destination):
        for j in range(4):
            a, b = v.load(v.int32, scales + 4 * j), v.load(v.int32, scales + 16 + 4 * j)
            c, e = v.load(v.int32, scales + 32 + 4 * j), v.load(v.int32, scales + 48 + 4 * j)
            v.store(destination + j, v.convert(v.uint8, a | ((b >> 4) << 6)))
            v.store(destination + 4 + j, v.convert(v.uint8, c | ((e >> 4) << 6)))
            v.store(destination + 8 + j, v.convert(v.uint8, (b & 15) | ((e & 15) << 4)))

    return v.function(packed)


def _blocks(name: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Register a factory of `pack(room, d, m, destination)` as kernel `quantise_<name>`; the room is that of
    `_scaled`."""

    def register(factory: Callable[[Any], Any]) -> Callable[[Any], Any]:
        nbytes = FORMATS[name].nbytes

        def rows(v: Any) -> Callable[..., None]:
            scaled, pack, held = _scaled(v, SCALED[name]), v.function(factory(v)), v.stack(384)

            def quantise(source, destination, elements):
                room = held()
                for i in range(elements // 256):
                    d, m = scaled(source + 1024 * i, room)
                    pack(room, d, m, destination + nbytes * i)

            return quantise

        kernel(f"quantise_{name.lower()}", arguments=3)(rows)
        return factory

    return register


@_blocks("Q2_K")
def q2_k(v: Any) -> Any:
    quarters = _quarters(v)

    def pack(room, d, m, p):
        for j in range(16):
            scale, minimum = v.load(v.int32, room + 256 + 4 * j), v.load(v.int32, room + 320 + 4 * j)
            v.store(p + j, v.convert(v.uint8, scale | (minimum << 4)))
        quarters(room, p + 16, 0)
        v.store_half(p + 80, d)
        v.store_half(p + 82, m)

    return pack


@_blocks("Q3_K")
def q3_k(v: Any) -> Any:
    quarters, bits = _quarters(v), _bit_of_eight(v)

    def pack(room, d, m, p):
        bits(room, p, 2)
        quarters(room, p + 32, 0)
        for j in range(8):
            a, b = v.load(v.int32, room + 256 + 4 * j) + 32, v.load(v.int32, room + 288 + 4 * j) + 32
            v.store(p + 96 + j, v.convert(v.uint8, (a & 15) | ((b & 15) << 4)))
        for j in range(4):
            upper = np.int32(0)
            for n in range(4):
                upper = upper | (((v.load(v.int32, room + 256 + 4 * (4 * n + j)) + 32) >> 4) << (2 * n))
            v.store(p + 104 + j, v.convert(v.uint8, upper))
        v.store_half(p + 108, d)

    return pack


@_blocks("Q4_K")
def q4_k(v: Any) -> Any:
    pairs, nibbles = _six_bit_pairs(v), _nibbles(v, 32)

    def pack(room, d, m, p):
        v.store_half(p, d)
        v.store_half(p + 2, m)
        pairs(room + 256, p + 4)
        nibbles(room, p + 16)

    return pack


@_blocks("Q5_K")
def q5_k(v: Any) -> Any:
    pairs, nibbles, bits = _six_bit_pairs(v), _nibbles(v, 32), _bit_of_eight(v)

    def pack(room, d, m, p):
        v.store_half(p, d)
        v.store_half(p + 2, m)
        pairs(room + 256, p + 4)
        bits(room, p + 16, 4)
        nibbles(room, p + 48)

    return pack


@_blocks("Q6_K")
def q6_k(v: Any) -> Any:
    quarters, nibbles = _quarters(v), _nibbles(v, 64)

    def pack(room, d, m, p):
        nibbles(room, p)
        quarters(room, p + 128, 4)
        for j in range(16):
            v.store(p + 192 + j, v.convert(v.uint8, v.load(v.int32, room + 256 + 4 * j)))
        v.store_half(p + 208, d)

    return pack
