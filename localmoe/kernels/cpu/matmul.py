"""Matrix times vector on GGUF blocks: one source for every instruction set without its own; knows no threads or ops.

Every kernel: (weights, row_nbytes, activations, out, columns, row_start, row_stop) -> out[r] float32 for row_start <= r
< row_stop, out being the address of row 0. The order of additions depends on `columns` alone, so a row's result is the
same in any split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from localmoe.errors import UnsupportedError
from localmoe.formats import FORMATS, Format
from localmoe.kernels.cpu import dequantise_grids, matmul_avx512  # noqa: F401  (they register kernels)
from localmoe.kernels.cpu.blocks import PREFETCH, six_bit_scales
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.cpu.dequantise import BLOCKS, Block

FAST: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "F32": ("gemv_f32", "f32"),
        "F16": ("gemv_f16", "f32"),
        "BF16": ("gemv_bf16", "f32"),
        "Q8_0": ("gemv_q8_0", "q8_32"),
        "Q4_0": ("gemv_q4_0", "q8_32"),
        "Q5_0": ("gemv_q5_0", "q8_32"),
        "Q4_K": ("gemv_q4_k", "q8_256"),
        "Q5_K": ("gemv_q5_k", "q8_256"),
        "Q6_K": ("gemv_q6_k", "q8_256"),
    }
)

# Into the second level, as float activations fill half of the first; two rows at once (fewer loads) were slower.
_FLOATS_AHEAD = 1024


def gemv_kernel(format: Format) -> tuple[str, str]:
    """The kernel that multiplies rows of `format`, and the kind of activations it reads.

    Raises UnsupportedError for a format that no kernel reads.
    """
    if format.name in FAST:
        return FAST[format.name]
    if format.name not in BLOCKS:
        possible = ", ".join([*FAST, *BLOCKS])
        raise UnsupportedError(f"no cpu kernel reads weights of type {format.name}; possible: {possible}")
    return f"gemv_{format.name.lower()}", "f32"


def dequantise_kernel(format: Format) -> str:
    """The kernel that turns rows of `format` into float32. Raises UnsupportedError as `gemv_kernel` does."""
    gemv_kernel(format)
    return f"dequantise_{format.name.lower()}"


def _float_gemv(v: Any, load: Any, nbytes: int) -> Callable[..., None]:
    """Weights of `nbytes` each that `load(kind, address)` brings as float32; activations f32."""
    lanes = v.lanes

    def gemv(weights, row_nbytes, activations, out, columns, row_start, row_stop):
        whole = columns - columns % lanes
        fours = columns - columns % (4 * lanes)
        for row in range(row_start, row_stop):
            w = weights + row * row_nbytes
            a, b, c, d = v.zero(v.f32), v.zero(v.f32), v.zero(v.f32), v.zero(v.f32)
            for k in range(0, fours, 4 * lanes):
                p = w + k * nbytes
                x = activations + k * 4
                v.prefetch_second(p + _FLOATS_AHEAD)
                if 4 * lanes * nbytes > 64:
                    v.prefetch_second(p + _FLOATS_AHEAD + 64)
                if 4 * lanes * nbytes > 128:
                    v.prefetch_second(p + _FLOATS_AHEAD + 128)
                    v.prefetch_second(p + _FLOATS_AHEAD + 192)
                a = v.fma(load(v.f32, p), v.load(v.f32, x), a)
                b = v.fma(load(v.f32, p + lanes * nbytes), v.load(v.f32, x + lanes * 4), b)
                c = v.fma(load(v.f32, p + 2 * lanes * nbytes), v.load(v.f32, x + lanes * 8), c)
                d = v.fma(load(v.f32, p + 3 * lanes * nbytes), v.load(v.f32, x + lanes * 12), d)
            for k in range(fours, whole, lanes):
                a = v.fma(load(v.f32, w + k * nbytes), v.load(v.f32, activations + k * 4), a)
            total = v.total((a + b) + (c + d))
            for k in range(whole, columns):
                total = v.fma(load(v.float32, w + k * nbytes), v.load(v.float32, activations + k * 4), total)
            v.store(out + row * 4, total)

    return gemv


@kernel("gemv_f32", arguments=7)
def gemv_f32(v: Any) -> Callable[..., None]:
    return _float_gemv(v, v.load, 4)


@kernel("gemv_f16", arguments=7)
def gemv_f16(v: Any) -> Callable[..., None]:
    return _float_gemv(v, v.load_half, 2)


@kernel("gemv_bf16", arguments=7)
def gemv_bf16(v: Any) -> Callable[..., None]:
    return _float_gemv(v, v.load_bfloat, 2)


def _block32_gemv(v: Any, nbytes: int, dot: Any) -> Callable[..., None]:
    """Blocks of a float16 scale and 32 values; `dot(address of the values, address of 32 int8) -> i32x8`."""

    def gemv(weights, row_nbytes, activations, out, columns, row_start, row_stop):
        blocks = columns >> 5
        scales = activations + ((columns + 63) & -64)
        for row in range(row_start, row_stop):
            w = weights + row * row_nbytes
            a, b = v.zero(v.f32x8), v.zero(v.f32x8)
            for block in range(blocks):
                p = w + block * nbytes
                v.prefetch(p + PREFETCH)
                d = v.load_half(v.float32, p) * v.load(v.float32, scales + block * 4)
                products = dot(p + 2, activations + block * 32)
                a, b = v.fma(v.convert(v.f32x8, products), v.splat(v.f32x8, d), b), a
            v.store(out + row * 4, v.total(a + b))

    return gemv


@kernel("gemv_q8_0", arguments=7)
def gemv_q8_0(v: Any) -> Callable[..., None]:
    def dot(p, x):
        return v.dot(v.zero(v.i32x8), v.load(v.i8x32, p), v.load(v.i8x32, x))

    return _block32_gemv(v, 34, v.function(dot))


@kernel("gemv_q4_0", arguments=7)
def gemv_q4_0(v: Any) -> Callable[..., None]:
    twice, shifts = v.shuffle([*range(8)] * 2), v.constants(v.u16x16, [0] * 8 + [4] * 8)
    eights, ones = v.constants(v.u8x32, 8), v.constants(v.i16x16, 1)

    def dot(p, x):
        packed, y = v.load(v.u16x8, p), v.load(v.i8x32, x)
        quants = v.bits(v.u8x32, (twice(packed, packed) >> shifts()) & 0x0F0F)
        return v.word_pairs(v.byte_pairs(quants, y) - v.byte_pairs(eights(), y), ones())

    return _block32_gemv(v, 18, v.function(dot))


@kernel("gemv_q5_0", arguments=7)
def gemv_q5_0(v: Any) -> Callable[..., None]:
    """Block of 32: float16 d, fifth bits u32, nibbles [16]; quants are stored with 16 added."""
    twice, shifts = v.shuffle([*range(8)] * 2), v.constants(v.u16x16, [0] * 8 + [4] * 8)
    sixteens, ones = v.constants(v.u8x32, 16), v.constants(v.i16x16, 1)

    def dot(p, x):
        packed, y = v.load(v.u16x8, p + 4), v.load(v.i8x32, x)
        quants = v.bits(v.u8x32, (twice(packed, packed) >> shifts()) & 0x0F0F)
        quants = quants | (v.marked(v.u8x32, v.load(v.int32, p)) & 16)
        return v.word_pairs(v.byte_pairs(quants, y) - v.byte_pairs(sixteens(), y), ones())

    return _block32_gemv(v, 22, v.function(dot))


def _eighths(v: Any) -> list[Any]:
    """Eight functions: lane j of an i16x8, spread over i16x16."""
    return [v.shuffle([j] * 16) for j in range(8)]


def _k_gemv(v: Any, nbytes: int, load: Any) -> Callable[..., None]:
    """Q4_K and Q5_K: float16 d and dmin, six-bit scales and minima of 8 x 32, then 32 quants by `load[j](block)`."""
    unpack = six_bit_scales(v)
    q0, q1, q2, q3, q4, q5, q6, q7 = load
    s0, s1, s2, s3, s4, s5, s6, s7 = _eighths(v)

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

    sums_of = v.function(sums_of)

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
    def quants(j):
        place, shift = 16 + 32 * (j // 2), 4 * (j % 2)

        def load(p):
            return v.bits(v.u8x32, (v.load(v.u16x16, p + place) >> shift) & 0x0F0F)

        return v.function(load)

    return _k_gemv(v, 144, [quants(j) for j in range(8)])


@kernel("gemv_q5_k", arguments=7)
def gemv_q5_k(v: Any) -> Callable[..., None]:
    def quants(j):
        place, shift = 48 + 32 * (j // 2), 4 * (j % 2)

        def load(p):
            fifth = ((v.load(v.u16x16, p + 16) >> j) & 0x0101) << 4
            return v.bits(v.u8x32, ((v.load(v.u16x16, p + place) >> shift) & 0x0F0F) | fifth)

        return v.function(load)

    return _k_gemv(v, 176, [quants(j) for j in range(8)])


@kernel("gemv_q6_k", arguments=7)
def gemv_q6_k(v: Any) -> Callable[..., None]:
    """Low nibbles [128], two high bits [64], int8 scales [16], float16 d; quants are stored with 32 added."""

    def scaled(j):
        """32 quants from 32 j on, times activations and their two scales."""
        half, part = divmod(j, 4)
        ql, qh, shift = 64 * half + 32 * (part % 2), 128 + 32 * half, 4 * (part // 2)
        up, down = max(4 - 2 * part, 0), max(2 * part - 4, 0)
        scale = v.shuffle([2 * j] * 8 + [2 * j + 1] * 8)

        def products(total, p, x, scales):
            two = ((v.load(v.u16x16, p + qh) >> down) << up) & 0x3030
            quants = v.bits(v.u8x32, ((v.load(v.u16x16, p + ql) >> shift) & 0x0F0F) | two)
            return v.dot_words(total, v.byte_pairs(quants, v.load(v.i8x32, x + 32 * j)), scale(scales, scales))

        return v.function(products)

    p0, p1, p2, p3, p4, p5, p6, p7 = (scaled(j) for j in range(8))

    def gemv(weights, row_nbytes, activations, out, columns, row_start, row_stop):
        sums16 = activations + columns + (columns >> 4)
        scales = sums16 + (columns >> 3)
        for row in range(row_start, row_stop):
            w = weights + row * row_nbytes
            total, offset = v.zero(v.f32x8), v.zero(v.f32x8)
            for block in range(columns >> 8):
                p, x = w + block * 210, activations + block * 256
                v.prefetch(p + PREFETCH)
                v.prefetch(p + PREFETCH + 64)
                v.prefetch(p + PREFETCH + 128)
                v.prefetch(p + PREFETCH + 192)
                sc = v.convert(v.i16x16, v.load(v.i8x16, p + 192))
                a = p2(p0(v.zero(v.i32x8), p, x, sc), p, x, sc)
                b = p3(p1(v.zero(v.i32x8), p, x, sc), p, x, sc)
                a = p6(p4(a, p, x, sc), p, x, sc)
                b = p7(p5(b, p, x, sc), p, x, sc)
                d = v.load_half(v.float32, p + 208) * v.load(v.float32, scales + block * 4)
                total = v.fma(v.convert(v.f32x8, a + b), v.splat(v.f32x8, d), total)
                shifted = v.word_pairs(sc, v.load(v.i16x16, sums16 + block * 32))
                offset = v.fma(v.convert(v.f32x8, shifted), v.splat(v.f32x8, d * np.float32(32)), offset)
            v.store(out + row * 4, v.total(total) - v.total(offset))

    return gemv


def _block_gemv(format: Format, factory: Block) -> Callable[[Any], Callable[..., None]]:
    """Any other format, right rather than fast: a block at a time becomes float32 on the stack; activations f32."""

    def kernel_factory(v: Any) -> Callable[..., None]:
        block, held = v.function(factory(v)), v.stack(4 * format.elements)
        elements, nbytes, lanes = format.elements, format.nbytes, v.lanes

        def gemv(weights, row_nbytes, activations, out, columns, row_start, row_stop):
            buffer = held()
            for row in range(row_start, row_stop):
                total = v.zero(v.f32)
                for i in range(columns // elements):
                    block(weights + row * row_nbytes + i * nbytes, buffer)
                    x = activations + i * (4 * elements)
                    for k in range(0, 4 * elements, 4 * lanes):
                        total = v.fma(v.load(v.f32, buffer + k), v.load(v.f32, x + k), total)
                v.store(out + row * 4, v.total(total))

        return gemv

    return kernel_factory


for _name, _factory in BLOCKS.items():
    if _name not in FAST:
        kernel(f"gemv_{_name.lower()}", arguments=7)(_block_gemv(FORMATS[_name], _factory))
