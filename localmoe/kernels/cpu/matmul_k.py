"""Matrix times vector on blocks of 256 with scales of their own parts; the contract is `matmul.py`'s, and as there one
source serves every instruction set without its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from localmoe.kernels.cpu.blocks import (
    PREFETCH,
    iq4_values,
    nibbles,
    q4_k_quants,
    q5_k_quants,
    q6_k_quants,
    six_bit_scales,
)
from localmoe.kernels.cpu.build import kernel


def _scaled_sums(v: Any, load: Any, scale: list[Any]) -> Any:
    """(block, activations, scales) -> i32x8 sums of scale · quant · activation over 256: `load[j]` brings 32 quants,
    `scale[j]` spreads their scales."""
    q0, q1, q2, q3, q4, q5, q6, q7 = load
    s0, s1, s2, s3, s4, s5, s6, s7 = scale

    def sums_of(p, x, s):
        a = v.word_pairs(v.byte_pairs(q0(p), v.load(v.i8x32, x)), s0(s, s))
        b = v.word_pairs(v.byte_pairs(q1(p), v.load(v.i8x32, x + 32)), s1(s, s))
        a = v.dot_words(a, v.byte_pairs(q2(p), v.load(v.i8x32, x + 64)), s2(s, s))
        b = v.dot_words(b, v.byte_pairs(q3(p), v.load(v.i8x32, x + 96)), s3(s, s))
        a = v.dot_words(a, v.byte_pairs(q4(p), v.load(v.i8x32, x + 128)), s4(s, s))
        b = v.dot_words(b, v.byte_pairs(q5(p), v.load(v.i8x32, x + 160)), s5(s, s))
        a = v.dot_words(a, v.byte_pairs(q6(p), v.load(v.i8x32, x + 192)), s6(s, s))
        b = v.dot_words(b, v.byte_pairs(q7(p), v.load(v.i8x32, x + 224)), s7(s, s))
        return a + b

    return v.function(sums_of)


def _k_gemv(v: Any, nbytes: int, load: Any) -> Callable[..., None]:
    """Q4_K and Q5_K: float16 d and dmin, six-bit scales and minima of 8 x 32, then 32 quants by `load[j](block)`."""
    unpack = six_bit_scales(v)
    sums_of = _scaled_sums(v, load, [v.shuffle([j] * 16) for j in range(8)])

    def gemv(weights, row_nbytes, activations, out, columns, row_start, row_stop):
        sums32 = activations + columns
        scales = sums32 + (columns >> 4) + (columns >> 3)
        for row in range(row_start, row_stop):
            w = weights + row * row_nbytes
            total, minimum = v.zero(v.f32x8), v.zero(v.f32x4)
            for block in range(columns >> 8):
                p = w + block * nbytes
                v.prefetch(p + PREFETCH)
                v.prefetch(p + PREFETCH + 64)
                v.prefetch(p + PREFETCH + 128)
                dx = v.load(v.float32, scales + block * 4)
                six, minima = unpack(p + 4)
                sums = sums_of(p, activations + block * 256, six)
                lows = v.word_pairs(minima, v.load(v.i16x8, sums32 + block * 16))
                total = v.fma(v.convert(v.f32x8, sums), v.splat(v.f32x8, v.load_half(v.float32, p) * dx), total)
                minimum = v.fma(v.convert(v.f32x4, lows), v.splat(v.f32x4, v.load_half(v.float32, p + 2) * dx), minimum)
            v.store(out + row * 4, v.total(total) - v.total(minimum))

    return gemv


@kernel("gemv_q4_k", arguments=7)
def gemv_q4_k(v: Any) -> Callable[..., None]:
    return _k_gemv(v, 144, q4_k_quants(v))


@kernel("gemv_q5_k", arguments=7)
def gemv_q5_k(v: Any) -> Callable[..., None]:
    return _k_gemv(v, 176, q5_k_quants(v))


def _sixteens_gemv(v: Any, nbytes: int, load: Any, scales: Any) -> Callable[..., None]:
    """Blocks of 16 x 16 quants. `load[j](block)` brings 32 of them, u8x32; `scales(block)` brings two i16x16 and their
    factors: scales, and what is taken from each quant after multiplication."""
    sums_of = _scaled_sums(v, load, [v.shuffle([2 * j] * 8 + [2 * j + 1] * 8) for j in range(8)])

    def gemv(weights, row_nbytes, activations, out, columns, row_start, row_stop):
        sums16 = activations + columns + (columns >> 4)
        sizes = sums16 + (columns >> 3)
        for row in range(row_start, row_stop):
            w = weights + row * row_nbytes
            total, offset = v.zero(v.f32x8), v.zero(v.f32x8)
            for block in range(columns >> 8):
                p = w + block * nbytes
                for ahead in range(PREFETCH, PREFETCH + nbytes, 64):
                    v.prefetch(p + ahead)
                size = v.load(v.float32, sizes + block * 4)
                each, taken, d, low = scales(p)
                sums = sums_of(p, activations + block * 256, each)
                total = v.fma(v.convert(v.f32x8, sums), v.splat(v.f32x8, d * size), total)
                lows = v.word_pairs(taken, v.load(v.i16x16, sums16 + block * 32))
                offset = v.fma(v.convert(v.f32x8, lows), v.splat(v.f32x8, low * size), offset)
            v.store(out + row * 4, v.total(total) - v.total(offset))

    return gemv


@kernel("gemv_q2_k", arguments=7)
def gemv_q2_k(v: Any) -> Callable[..., None]:
    """Scale and minimum nibbles [16], two bits [64], float16 d, float16 dmin."""

    def quants(j):
        place, shift = 16 + 32 * (j // 4), 2 * (j % 4)

        def load(p):
            return v.bits(v.u8x32, (v.load(v.u16x16, p + place) >> shift) & 0x0303)

        return v.function(load)

    def scales(p):
        both = v.load(v.u8x16, p)
        each, minima = v.convert(v.i16x16, both & 15), v.convert(v.i16x16, both >> 4)
        return each, minima, v.load_half(v.float32, p + 80), v.load_half(v.float32, p + 82)

    return _sixteens_gemv(v, 84, [quants(j) for j in range(8)], v.function(scales))


@kernel("gemv_q3_k", arguments=7)
def gemv_q3_k(v: Any) -> Callable[..., None]:
    """Third bits [32], two bits [64], six-bit scales [12], less 32, float16 d; quants are stored with 4 added."""
    join = v.shuffle([*range(16)])

    def quants(j):
        place, shift = 32 + 32 * (j // 4), 2 * (j % 4)

        def load(p):
            third = ((v.load(v.u16x16, p) >> j) & 0x0101) << 2
            return v.bits(v.u8x32, ((v.load(v.u16x16, p + place) >> shift) & 0x0303) | third)

        return v.function(load)

    def scales(p):
        low, c = v.load(v.int64, p + 96), v.convert(v.int64, v.load(v.uint32, p + 104))
        early = (c & 0x03030303) | (((c >> 2) & 0x03030303) << 32)
        late = ((c >> 4) & 0x03030303) | (((c >> 6) & 0x03030303) << 32)
        first = (low & 0x0F0F0F0F0F0F0F0F) | (early << 4)
        second = ((low >> 4) & 0x0F0F0F0F0F0F0F0F) | (late << 4)
        six = v.convert(v.i16x16, join(v.bits(v.i8x8, first), v.bits(v.i8x8, second))) - 32
        d = v.load_half(v.float32, p + 108)
        return six, six, d, d * np.float32(4)

    return _sixteens_gemv(v, 110, [quants(j) for j in range(8)], v.function(scales))


@kernel("gemv_q6_k", arguments=7)
def gemv_q6_k(v: Any) -> Callable[..., None]:
    """Low nibbles [128], two high bits [64], int8 scales [16], float16 d; quants are stored with 32 added."""

    def scales(p):
        each, d = v.convert(v.i16x16, v.load(v.i8x16, p + 192)), v.load_half(v.float32, p + 208)
        return each, each, d, d * np.float32(32)

    return _sixteens_gemv(v, 210, q6_k_quants(v), v.function(scales))


@kernel("gemv_iq4_xs", arguments=7)
def gemv_iq4_xs(v: Any) -> Callable[..., None]:
    """Float16 d, two high scale bits u16, low scale nibbles [4], nibbles [8 x 16]; scales are stored with 32 added."""
    halves, table = nibbles(v), v.constants(v.i8x32, iq4_values() * 2)

    def gemv(weights, row_nbytes, activations, out, columns, row_start, row_stop):
        sizes = activations + columns + (columns >> 4) + (columns >> 3)
        for row in range(row_start, row_stop):
            w = weights + row * row_nbytes
            total, other = v.zero(v.f32x8), v.zero(v.f32x8)
            for block in range(columns >> 8):
                p, x = w + block * 136, activations + block * 256
                for ahead in range(PREFETCH, PREFETCH + 136, 64):
                    v.prefetch(p + ahead)
                d = v.load_half(v.float32, p) * v.load(v.float32, sizes + block * 4)
                high, low = v.load(v.uint16, p + 2), v.load(v.uint32, p + 4)
                for j in range(8):
                    values = v.look_up(table(), halves(p + 8 + 16 * j))
                    products = v.dot(v.zero(v.i32x8), values, v.load(v.i8x32, x + 32 * j))
                    scale = (((low >> (4 * j)) & 15) | (((high >> (2 * j)) & 3) << 4)) - 32
                    size = v.splat(v.f32x8, d * np.float32(scale))
                    total, other = v.fma(v.convert(v.f32x8, products), size, other), total
            v.store(out + row * 4, v.total(total + other))

    return gemv
