"""Rows of GGUF blocks as float32, the formats with code books (IQ*, MXFP4, NVFP4); the contract is `dequantise.py`'s.

The books are the `gguf` package's (gguf.quants, from ggml-common.h), read while a kernel is compiled and held in its
object.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from localmoe.kernels.cpu.blocks import E2M1, code_book, iq4_values, parities
from localmoe.kernels.cpu.dequantise import blocks


def _signed(v: Any) -> Any:
    """(f32x8, eight sign bits) -> lane i negated where bit i is set."""
    up = v.constants(v.u32x8, [31 - i for i in range(8)])

    def flip(x, signs):
        return v.bits(v.f32x8, v.bits(v.u32x8, x) ^ ((v.splat(v.u32x8, np.int64(signs)) << up()) & 0x80000000))

    return v.function(flip)


@blocks("IQ2_XXS")
def iq2_xxs(v: Any) -> Any:
    """d f16 | 8 x (indices u8[4], u32 of four 7-bit signs and a 4-bit scale)"""
    grid, eighth, flip = v.table(code_book("IQ2_XXS")), parities(v), _signed(v)

    def block(p, y):
        d = v.load_half(v.float32, p)
        for i in range(32):
            q = p + 2 + (i >> 2) * 8
            packed = v.load(v.uint32, q + 4)
            scale = d * (np.float32(0.5) + np.float32(packed >> 28)) * np.float32(0.25)
            values = v.convert(v.f32x8, v.load(v.i8x8, grid() + v.load(v.uint8, q + (i & 3)) * 8)) * scale
            v.store(y + i * 32, flip(values, eighth((packed >> (7 * (i & 3))) & 127)))

    return block


@blocks("IQ2_XS")
def iq2_xs(v: Any) -> Any:
    """d f16 | u16[32]: 9-bit index and 7-bit signs | scale nibbles [8]"""
    grid, eighth, flip = v.table(code_book("IQ2_XS")), parities(v), _signed(v)

    def block(p, y):
        d = v.load_half(v.float32, p)
        for i in range(32):
            packed = v.load(v.uint16, p + 2 + i * 2)
            scale = (v.load(v.uint8, p + 66 + (i >> 2)) >> (2 * (i & 2))) & 15
            size = d * (np.float32(0.5) + np.float32(scale)) * np.float32(0.25)
            values = v.convert(v.f32x8, v.load(v.i8x8, grid() + (packed & 511) * 8)) * size
            v.store(y + i * 32, flip(values, eighth(packed >> 9)))

    return block


@blocks("IQ2_S")
def iq2_s(v: Any) -> Any:
    """d f16 | indices u8[32] | signs u8[32] | two high index bits u8[8] | scale nibbles [8]"""
    grid, flip = v.table(code_book("IQ2_S")), _signed(v)

    def block(p, y):
        d = v.load_half(v.float32, p)
        for i in range(32):
            high = (v.load(v.uint8, p + 66 + (i >> 2)) >> (2 * (i & 3))) & 3
            scale = (v.load(v.uint8, p + 74 + (i >> 2)) >> (2 * (i & 2))) & 15
            size = d * (np.float32(0.5) + np.float32(scale)) * np.float32(0.25)
            index = v.load(v.uint8, p + 2 + i) | (high << 8)
            values = v.convert(v.f32x8, v.load(v.i8x8, grid() + index * 8)) * size
            v.store(y + i * 32, flip(values, v.load(v.uint8, p + 34 + i)))

    return block


@blocks("IQ3_XXS")
def iq3_xxs(v: Any) -> Any:
    """d f16 | indices u8[64] | u32[8] of four 7-bit signs and a 4-bit scale"""
    grid, eighth, flip, join = v.table(code_book("IQ3_XXS")), parities(v), _signed(v), v.shuffle([*range(8)])

    def block(p, y):
        d = v.load_half(v.float32, p)
        for i in range(32):
            packed = v.load(v.uint32, p + 66 + (i >> 2) * 4)
            size = d * (np.float32(0.5) + np.float32(packed >> 28)) * np.float32(0.5)
            first = v.load(v.i8x4, grid() + v.load(v.uint8, p + 2 + i * 2) * 4)
            second = v.load(v.i8x4, grid() + v.load(v.uint8, p + 3 + i * 2) * 4)
            values = v.convert(v.f32x8, join(first, second)) * size
            v.store(y + i * 32, flip(values, eighth((packed >> (7 * (i & 3))) & 127)))

    return block


@blocks("IQ3_S")
def iq3_s(v: Any) -> Any:
    """d f16 | indices u8[64] | ninth index bits u8[8] | signs u8[32] | scale nibbles [4]"""
    grid, flip, join = v.table(code_book("IQ3_S")), _signed(v), v.shuffle([*range(8)])

    def block(p, y):
        d = v.load_half(v.float32, p)
        for i in range(32):
            scale = (v.load(v.uint8, p + 106 + (i >> 3)) >> (i & 4)) & 15
            ninths = v.load(v.uint8, p + 66 + (i >> 2)) >> (2 * (i & 3))
            one = v.load(v.uint8, p + 2 + i * 2) | ((ninths & 1) << 8)
            two = v.load(v.uint8, p + 3 + i * 2) | ((ninths & 2) << 7)
            values = v.convert(v.f32x8, join(v.load(v.i8x4, grid() + one * 4), v.load(v.i8x4, grid() + two * 4)))
            v.store(y + i * 32, flip(values * (d * np.float32(1 + 2 * scale)), v.load(v.uint8, p + 74 + i)))

    return block


@blocks("IQ1_S")
def iq1_s(v: Any) -> Any:
    """d f16 | indices u8[32] | u16[8]: four 3-bit high index parts, a 3-bit scale, the sign of the shift by 1/8"""
    grid = v.table(code_book("IQ1_S"))

    def block(p, y):
        d = v.load_half(v.float32, p)
        for i in range(32):
            high = v.load(v.uint16, p + 34 + (i >> 2) * 2)
            size = d * np.float32(2 * ((high >> 12) & 7) + 1)
            delta = np.float32(-0.125) if high & 0x8000 else np.float32(0.125)
            index = v.load(v.uint8, p + 2 + i) | (((high >> (3 * (i & 3))) & 7) << 8)
            v.store(y + i * 32, (v.convert(v.f32x8, v.load(v.i8x8, grid() + index * 8)) + delta) * size)

    return block


@blocks("IQ1_M")
def iq1_m(v: Any) -> Any:
    """indices u8[32] | nibbles [16]: 3 high index bits, sign of the shift | u16[4]: four 3-bit scales, a nibble of d"""
    grid = v.table(code_book("IQ1_S"))

    def block(p, y):
        a, b = v.load(v.uint16, p + 48), v.load(v.uint16, p + 50)
        c, e = v.load(v.uint16, p + 52), v.load(v.uint16, p + 54)
        d = v.half((a >> 12) | ((b >> 8) & 0xF0) | ((c >> 4) & 0xF00) | (e & 0xF000))
        for i in range(32):
            scale = (v.load(v.uint16, p + 48 + (i >> 3) * 2) >> (3 * ((i >> 1) & 3))) & 7
            high = (v.load(v.uint8, p + 32 + (i >> 1)) >> (4 * (i & 1))) & 15
            delta = np.float32(-0.125) if high & 8 else np.float32(0.125)
            index = v.load(v.uint8, p + i) | ((high & 7) << 8)
            values = v.convert(v.f32x8, v.load(v.i8x8, grid() + index * 8)) + delta
            v.store(y + i * 32, values * (d * np.float32(2 * scale + 1)))

    return block


def _nibble_book(v: Any, values: npt.NDArray[np.float32]) -> Any:
    """(nibbles, how many bytes, scale, destination): all low nibbles, then all high ones, through a book of 16."""
    book = v.table(values)

    def look_up(p, count, scale, y):
        for i in range(count):
            packed = v.load(v.uint8, p + i)
            v.store(y + i * 4, scale * v.load(v.float32, book() + (packed & 15) * 4))
            v.store(y + (count + i) * 4, scale * v.load(v.float32, book() + (packed >> 4) * 4))

    return v.function(look_up)


@blocks("IQ4_NL")
def iq4_nl(v: Any) -> Any:
    """d f16 | nibbles [16]"""
    look_up = _nibble_book(v, np.array(iq4_values(), np.float32))

    def block(p, y):
        look_up(p + 2, 16, v.load_half(v.float32, p), y)

    return block


@blocks("IQ4_XS")
def iq4_xs(v: Any) -> Any:
    """d f16 | two high scale bits u16 | low scale nibbles [4] | nibbles [8 x 16]; scales less 32"""
    look_up = _nibble_book(v, np.array(iq4_values(), np.float32))

    def block(p, y):
        d = v.load_half(v.float32, p)
        for i in range(8):
            low = (v.load(v.uint8, p + 4 + (i >> 1)) >> (4 * (i & 1))) & 15
            high = (v.load(v.uint16, p + 2) >> (2 * i)) & 3
            look_up(p + 8 + i * 16, 16, d * np.float32((low | (high << 4)) - 32), y + i * 128)

    return block


@blocks("MXFP4")
def mxfp4(v: Any) -> Any:
    """exponent u8 | nibbles [16]; half of 2^(exponent - 127), as the values are doubled (ggml_e8m0_to_fp32_half)"""
    exponents = np.arange(256, dtype=np.uint32)
    subnormal = 0x200000 << np.minimum(exponents, 1)
    halves = v.table(np.where(exponents < 2, subnormal, (exponents - 1) << 23).astype(np.uint32))
    look_up = _nibble_book(v, np.array(E2M1, np.float32))

    def block(p, y):
        look_up(p + 1, 16, v.load(v.float32, halves() + v.load(v.uint8, p) * 4), y)

    return block


def nvfp4(v: Any) -> Any:
    """scales ue4m3 [4] | nibbles [4 x 8]; half of the scale, as the values are doubled. Its kernels: `scaled.py`."""
    from gguf.quants import NVFP4

    scales = v.table(NVFP4.ue4m3_to_fp32(np.arange(256, dtype=np.uint8)).astype(np.float32))
    look_up = _nibble_book(v, np.array(E2M1, np.float32))

    def block(p, y):
        for i in range(4):
            look_up(p + 4 + i * 8, 8, v.load(v.float32, scales() + v.load(v.uint8, p + i) * 4), y + i * 64)

    return block
