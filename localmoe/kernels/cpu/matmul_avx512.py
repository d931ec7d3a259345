"""Matrix times vector with 512-bit vectors and VNNI, at the speed of memory; the contract is `matmul.py`'s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from localmoe.kernels.cpu.blocks import PREFETCH, six_bit_scales
from localmoe.kernels.cpu.build import kernel

_TWICE = [*range(16)] * 2


def _block32_gemv(v: Any, nbytes: int, load_pair: Any, load_one: Any, offset: int) -> Callable[..., None]:
    """Blocks of a float16 scale and 32 values stored with `offset` added, which the loaders bring as unsigned bytes.

    Measured on Zen 4 and left: two rows at once, sharing what the activations decide, lost half the speed of memory;
    int32 sums of four activations, in place of the second dot product, made Q4_0 9 % faster and Q8_0 13 % slower.
    """
    halves = v.strided(v.u16x8, nbytes)
    offsets, offsets_one = v.constants(v.u8x64, offset), v.constants(v.u8x32, offset)
    s0, s1, s2, s3 = (v.shuffle([2 * j] * 8 + [2 * j + 1] * 8) for j in range(4))

    def pair(p, x):
        values = v.load(v.i8x64, x)
        stored = v.dot(v.zero(v.i32), load_pair(p + 2, p + (nbytes + 2)), values)
        return v.convert(v.f32, stored - v.dot(v.zero(v.i32), offsets(), values))

    def one(p, x):
        values = v.load(v.i8x32, x)
        stored = v.dot(v.zero(v.i32x8), load_one(p + 2), values)
        return v.convert(v.f32x8, stored - v.dot(v.zero(v.i32x8), offsets_one(), values))

    pair, one = v.function(pair), v.function(one)

    def gemv(weights, row_nbytes, activations, out, columns, row_start, row_stop):
        blocks, scales = columns >> 5, activations + ((columns + 63) & -64)
        eights = blocks & -8
        for row in range(row_start, row_stop):
            w = weights + row * row_nbytes
            a, b, rest = v.zero(v.f32), v.zero(v.f32), v.zero(v.f32x8)
            for block in range(0, eights, 8):
                p, x = w + block * nbytes, activations + block * 32
                for ahead in range(PREFETCH, PREFETCH + 8 * nbytes, 64):
                    v.prefetch(p + ahead)
                d = v.half(halves(p)) * v.load(v.f32x8, scales + block * 4)
                a = v.fma(pair(p, x), s0(d, d), a)
                b = v.fma(pair(p + 2 * nbytes, x + 64), s1(d, d), b)
                a = v.fma(pair(p + 4 * nbytes, x + 128), s2(d, d), a)
                b = v.fma(pair(p + 6 * nbytes, x + 192), s3(d, d), b)
            for block in range(eights, blocks):
                p = w + block * nbytes
                scale = v.load_half(v.float32, p) * v.load(v.float32, scales + block * 4)
                rest = v.fma(one(p, activations + block * 32), v.splat(v.f32x8, scale), rest)
            v.store(out + row * 4, v.total(a + b) + v.total(rest))

    return gemv


@kernel("gemv_q8_0", arguments=7, isa="avx512")
def gemv_q8_0(v: Any) -> Callable[..., None]:
    join = v.shuffle([*range(64)])

    def load_one(p):
        return v.load(v.u8x32, p) ^ 128

    def load_pair(p, q):
        return join(v.load(v.u8x32, p), v.load(v.u8x32, q)) ^ 128

    return _block32_gemv(v, 34, v.function(load_pair), v.function(load_one), 128)


@kernel("gemv_q4_0", arguments=7, isa="avx512")
def gemv_q4_0(v: Any) -> Callable[..., None]:
    twice = v.shuffle([*range(8)] * 2)
    both_twice = v.shuffle([*range(8)] * 2 + [*range(8, 16)] * 2)
    shift_one = v.constants(v.u16x16, [0] * 8 + [4] * 8)
    shift_pair = v.constants(v.u16x32, ([0] * 8 + [4] * 8) * 2)

    def load_one(p):
        packed = v.load(v.u16x8, p)
        return v.bits(v.u8x32, (twice(packed, packed) >> shift_one()) & 0x0F0F)

    def load_pair(p, q):
        return v.bits(v.u8x64, (both_twice(v.load(v.u16x8, p), v.load(v.u16x8, q)) >> shift_pair()) & 0x0F0F)

    return _block32_gemv(v, 18, v.function(load_pair), v.function(load_one), 8)


@kernel("gemv_q5_0", arguments=7, isa="avx512")
def gemv_q5_0(v: Any) -> Callable[..., None]:
    twice, both_twice = v.shuffle([*range(8)] * 2), v.shuffle([*range(8)] * 2 + [*range(8, 16)] * 2)
    shift_one = v.constants(v.u16x16, [0] * 8 + [4] * 8)
    shift_pair = v.constants(v.u16x32, ([0] * 8 + [4] * 8) * 2)

    def load_one(p):
        packed = v.load(v.u16x8, p + 4)
        nibbles = v.bits(v.u8x32, (twice(packed, packed) >> shift_one()) & 0x0F0F)
        return nibbles | (v.marked(v.u8x32, v.load(v.int32, p)) & 16)

    def load_pair(p, q):
        nibbles = (both_twice(v.load(v.u16x8, p + 4), v.load(v.u16x8, q + 4)) >> shift_pair()) & 0x0F0F
        fifths = v.marked(v.u8x64, v.load(v.uint32, p) | (v.load(v.uint32, q) << 32))
        return v.bits(v.u8x64, nibbles) | (fifths & 16)

    return _block32_gemv(v, 22, v.function(load_pair), v.function(load_one), 16)


def _k_sums(v: Any, load: Any) -> Any:
    """(block, activations, scales i16x8) -> i32 sums of scale · quant · activation over 256, from `load[j](block)`: 64
    quants."""
    first, second, third, fourth = load
    s0, s1, s2, s3 = (v.shuffle([2 * j] * 16 + [2 * j + 1] * 16) for j in range(4))

    def sums(p, x, scales):
        a = v.dot_words(v.zero(v.i32), v.byte_pairs(first(p), v.load(v.i8x64, x)), s0(scales, scales))
        b = v.dot_words(v.zero(v.i32), v.byte_pairs(second(p), v.load(v.i8x64, x + 64)), s1(scales, scales))
        a = v.dot_words(a, v.byte_pairs(third(p), v.load(v.i8x64, x + 128)), s2(scales, scales))
        b = v.dot_words(b, v.byte_pairs(fourth(p), v.load(v.i8x64, x + 192)), s3(scales, scales))
        return a + b

    return v.function(sums)


def _k_gemv(v: Any, nbytes: int, load: Any) -> Callable[..., None]:
    """Q4_K and Q5_K: float16 d and dmin, six-bit scales and minima of 8 x 32, then what `load` reads."""
    sums_of, unpack = _k_sums(v, load), six_bit_scales(v)

    def gemv(weights, row_nbytes, activations, out, columns, row_start, row_stop):
        sums32 = activations + columns
        scales = sums32 + (columns >> 4) + (columns >> 3)
        for row in range(row_start, row_stop):
            w = weights + row * row_nbytes
            total, minimum = v.zero(v.f32), v.zero(v.f32x4)
            for block in range(columns >> 8):
                p = w + block * nbytes
                v.prefetch(p + PREFETCH)
                v.prefetch(p + PREFETCH + 64)
                v.prefetch(p + PREFETCH + 128)
                dx = v.load(v.float32, scales + block * 4)
                six, minima = unpack(p + 4)
                sums = sums_of(p, activations + block * 256, six)
                lows = v.word_pairs(minima, v.load(v.i16x8, sums32 + block * 16))
                total = v.fma(v.convert(v.f32, sums), v.splat(v.f32, v.load_half(v.float32, p) * dx), total)
                minimum = v.fma(v.convert(v.f32x4, lows), v.splat(v.f32x4, v.load_half(v.float32, p + 2) * dx), minimum)
            v.store(out + row * 4, v.total(total) - v.total(minimum))

    return gemv


@kernel("gemv_q4_k", arguments=7, isa="avx512")
def gemv_q4_k(v: Any) -> Callable[..., None]:
    twice, shifts = v.shuffle(_TWICE), v.constants(v.u16x32, [0] * 16 + [4] * 16)

    def quants(j):
        def load(p):
            packed = v.load(v.u16x16, p + (16 + 32 * j))
            return v.bits(v.u8x64, (twice(packed, packed) >> shifts()) & 0x0F0F)

        return v.function(load)

    return _k_gemv(v, 144, [quants(j) for j in range(4)])


@kernel("gemv_q5_k", arguments=7, isa="avx512")
def gemv_q5_k(v: Any) -> Callable[..., None]:
    twice, shifts = v.shuffle(_TWICE), v.constants(v.u16x32, [0] * 16 + [4] * 16)

    def quants(j):
        bit = v.constants(v.u16x32, [2 * j] * 16 + [2 * j + 1] * 16)

        def load(p):
            packed, high = v.load(v.u16x16, p + (48 + 32 * j)), v.load(v.u16x16, p + 16)
            fifth = ((twice(high, high) >> bit()) & 0x0101) << 4
            return v.bits(v.u8x64, ((twice(packed, packed) >> shifts()) & 0x0F0F) | fifth)

        return v.function(load)

    return _k_gemv(v, 176, [quants(j) for j in range(4)])


@kernel("gemv_q6_k", arguments=7, isa="avx512")
def gemv_q6_k(v: Any) -> Callable[..., None]:
    """Low nibbles [128], two high bits [64], int8 scales [16], float16 d; quants are stored with 32 added."""
    twice = v.shuffle(_TWICE)
    low, high = v.constants(v.u16x32, [4] * 16 + [2] * 16), v.constants(v.u16x32, [0] * 16 + [2] * 16)
    t0, t1, t2, t3 = (v.shuffle([i for part in range(4) for i in [4 * j + part] * 8]) for j in range(4))

    def first(ql, qh):
        two = v.load(v.u16x16, qh)
        return v.bits(v.u8x64, (v.load(v.u16x32, ql) & 0x0F0F) | ((twice(two, two) << low()) & 0x3030))

    def second(ql, qh):
        two = v.load(v.u16x16, qh)
        return v.bits(v.u8x64, ((v.load(v.u16x32, ql) >> 4) & 0x0F0F) | ((twice(two, two) >> high()) & 0x3030))

    first, second = v.function(first), v.function(second)

    def gemv(weights, row_nbytes, activations, out, columns, row_start, row_stop):
        sums16 = activations + columns + (columns >> 4)
        scales = sums16 + (columns >> 3)
        for row in range(row_start, row_stop):
            w = weights + row * row_nbytes
            total, offset = v.zero(v.f32), v.zero(v.f32x8)
            for block in range(columns >> 8):
                p = w + block * 210
                x = activations + block * 256
                v.prefetch(p + PREFETCH)
                v.prefetch(p + PREFETCH + 64)
                v.prefetch(p + PREFETCH + 128)
                v.prefetch(p + PREFETCH + 192)
                sc = v.convert(v.i16x16, v.load(v.i8x16, p + 192))
                a = v.dot_words(v.zero(v.i32), v.byte_pairs(first(p, p + 128), v.load(v.i8x64, x)), t0(sc, sc))
                b = v.dot_words(v.zero(v.i32), v.byte_pairs(second(p, p + 128), v.load(v.i8x64, x + 64)), t1(sc, sc))
                a = v.dot_words(a, v.byte_pairs(first(p + 64, p + 160), v.load(v.i8x64, x + 128)), t2(sc, sc))
                b = v.dot_words(b, v.byte_pairs(second(p + 64, p + 160), v.load(v.i8x64, x + 192)), t3(sc, sc))
                d = v.load_half(v.float32, p + 208) * v.load(v.float32, scales + block * 4)
                total = v.fma(v.convert(v.f32, a + b), v.splat(v.f32, d), total)
                shifted = v.word_pairs(sc, v.load(v.i16x16, sums16 + block * 32))
                offset = v.fma(v.convert(v.f32x8, shifted), v.splat(v.f32x8, d * np.float32(32)), offset)
            v.store(out + row * 4, v.total(total) - v.total(offset))

    return gemv
