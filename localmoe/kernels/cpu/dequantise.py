"""Rows of GGUF blocks as float32, bit-identical to ggml: the formats without code books (with: `dequantise_grids.py`).

Kernel `dequantise_<format>`: (weights, row bytes, row, start, destination float32, elements), the part of a row from
`start` on, both being whole blocks; `weights` as in `matmul.py`. A format is a factory of `block(source, destination)`;
layouts from ggml-common.h, checked against libggml's output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from localmoe.formats import FORMATS
from localmoe.kernels.cpu.blocks import six_bit_scales
from localmoe.kernels.cpu.build import kernel

Block = Callable[[Any], Callable[[int, int], None]]
BLOCKS: dict[str, Block] = {}


def blocks(name: str) -> Callable[[Block], Block]:
    """Register a factory of `block(source, destination)` as format `name` and as kernel `dequantise_<name>`."""

    def register(factory: Block) -> Block:
        nbytes, elements_of_block = FORMATS[name].nbytes, FORMATS[name].elements

        def rows(v: Any) -> Callable[..., None]:
            block = v.function(factory(v))

            def dequantise(weights, row_nbytes, row, start, destination, elements):
                source = weights + row * row_nbytes + start // elements_of_block * nbytes
                for i in range(elements // elements_of_block):
                    block(source + i * nbytes, destination + i * (4 * elements_of_block))

            return dequantise

        kernel(f"dequantise_{name.lower()}", arguments=6)(rows)
        BLOCKS[name] = factory
        return factory

    return register


def _plain(v: Any, load: Any, nbytes: int) -> Callable[..., None]:
    """Floats of `nbytes` that `load(kind, address)` brings as float32."""

    def dequantise(weights, row_nbytes, row, start, destination, elements):
        source = weights + row * row_nbytes + start * nbytes
        whole = elements - elements % 16
        for i in range(0, whole, 16):
            v.store(destination + i * 4, load(v.f32x16, source + i * nbytes))
        for i in range(whole, elements):
            v.store(destination + i * 4, load(v.float32, source + i * nbytes))

    return dequantise


@kernel("dequantise_f32", arguments=6)
def dequantise_f32(v: Any) -> Callable[..., None]:
    return _plain(v, v.load, 4)


@kernel("dequantise_f16", arguments=6)
def dequantise_f16(v: Any) -> Callable[..., None]:
    return _plain(v, v.load_half, 2)


@kernel("dequantise_bf16", arguments=6)
def dequantise_bf16(v: Any) -> Callable[..., None]:
    return _plain(v, v.load_bfloat, 2)


@blocks("Q8_0")
def q8_0(v: Any) -> Any:
    """d f16 | int8[32]"""

    def block(p, y):
        d = v.load_half(v.float32, p)
        v.store(y, v.convert(v.f32x16, v.load(v.i8x16, p + 2)) * d)
        v.store(y + 64, v.convert(v.f32x16, v.load(v.i8x16, p + 18)) * d)

    return block


@blocks("Q4_0")
def q4_0(v: Any) -> Any:
    """d f16 | nibbles[16]: the low ones are elements 0-15, the high ones 16-31"""

    def block(p, y):
        d, packed = v.load_half(v.float32, p), v.load(v.u8x16, p + 2)
        v.store(y, v.convert(v.f32x16, v.bits(v.i8x16, packed & 15) - 8) * d)
        v.store(y + 64, v.convert(v.f32x16, v.bits(v.i8x16, packed >> 4) - 8) * d)

    return block


@blocks("Q4_1")
def q4_1(v: Any) -> Any:
    """d f16 | m f16 | nibbles[16]"""

    def block(p, y):
        d, m, packed = v.load_half(v.float32, p), v.load_half(v.float32, p + 2), v.load(v.u8x16, p + 4)
        v.store(y, v.convert(v.f32x16, packed & 15) * d + m)
        v.store(y + 64, v.convert(v.f32x16, packed >> 4) * d + m)

    return block


@blocks("Q8_K")
def q8_k(v: Any) -> Any:
    """d f32 | int8[256] | sums of 16 int16[16]"""

    def block(p, y):
        d = v.load(v.float32, p)
        for i in range(0, 256, 16):
            v.store(y + 4 * i, v.convert(v.f32x16, v.load(v.i8x16, p + 4 + i)) * d)

    return block


def _five_bits(v: Any) -> Any:
    """(address of 4 bytes of fifth bits, then nibbles[16]; 0 or 1 for the low or high half) -> i32x16 in 0..31."""
    each = v.constants(v.u32x16, [*range(16)])

    def quants(p, upper):
        fifth = v.splat(v.u32x16, v.load(v.uint32, p) >> (16 * upper)) >> each()
        nibbles = v.convert(v.u32x16, (v.load(v.u8x16, p + 4) >> (4 * upper)) & 15)
        return v.bits(v.i32x16, nibbles | ((fifth & 1) << 4))

    return v.function(quants)


@blocks("Q5_0")
def q5_0(v: Any) -> Any:
    """d f16 | fifth bits u32 | nibbles[16]"""
    quants = _five_bits(v)

    def block(p, y):
        d = v.load_half(v.float32, p)
        v.store(y, v.convert(v.f32x16, quants(p + 2, 0) - 16) * d)
        v.store(y + 64, v.convert(v.f32x16, quants(p + 2, 1) - 16) * d)

    return block


@blocks("Q5_1")
def q5_1(v: Any) -> Any:
    """d f16 | m f16 | fifth bits u32 | nibbles[16]"""
    quants = _five_bits(v)

    def block(p, y):
        d, m = v.load_half(v.float32, p), v.load_half(v.float32, p + 2)
        v.store(y, v.convert(v.f32x16, quants(p + 4, 0)) * d + m)
        v.store(y + 64, v.convert(v.f32x16, quants(p + 4, 1)) * d + m)

    return block


@blocks("Q2_K")
def q2_k(v: Any) -> Any:
    """scale and minimum nibbles [16] | two bits [64] | d f16 | dmin f16"""

    def block(p, y):
        d, dmin = v.load_half(v.float32, p + 80), v.load_half(v.float32, p + 82)
        for i in range(16):
            half, part, side = i >> 3, (i >> 1) & 3, i & 1
            scale = v.load(v.uint8, p + i)
            two = (v.load(v.u8x16, p + 16 + half * 32 + side * 16) >> (2 * part)) & 3
            v.store(y + i * 64, v.convert(v.f32x16, two) * (d * np.float32(scale & 15)) - dmin * np.float32(scale >> 4))

    return block


@blocks("Q3_K")
def q3_k(v: Any) -> Any:
    """third bits [32] | two bits [64] | six-bit scales [12], less 32 | d f16"""

    def block(p, y):
        d = v.load_half(v.float32, p + 108)
        for i in range(16):
            half, part, side = i >> 3, (i >> 1) & 3, i & 1
            low = (v.load(v.uint8, p + 96 + (i & 7)) >> (4 * half)) & 15
            high = (v.load(v.uint8, p + 104 + (i & 3)) >> (2 * (i >> 2))) & 3
            scale = d * np.float32((low | (high << 4)) - 32)
            two = (v.load(v.u8x16, p + 32 + half * 32 + side * 16) >> (2 * part)) & 3
            third = (v.load(v.u8x16, p + side * 16) >> (4 * half + part)) & 1
            v.store(y + i * 64, v.convert(v.f32x16, v.bits(v.i8x16, two | (third << 2)) - 4) * scale)

    return block


def _k_block(v: Any, quants: Any) -> Any:
    """Q4_K and Q5_K: d f16 | dmin f16 | six-bit scales and minima [12] | what `quants(block, 0..15)` reads: u8x16."""
    unpack, held = six_bit_scales(v), v.stack(64)

    def block(p, y):
        scales, minima = unpack(p + 4)
        table = held()
        v.store(table, v.convert(v.f32x8, scales) * v.load_half(v.float32, p))
        v.store(table + 32, v.convert(v.f32x8, minima) * v.load_half(v.float32, p + 2))
        for i in range(16):
            d, m = v.load(v.float32, table + (i >> 1) * 4), v.load(v.float32, table + 32 + (i >> 1) * 4)
            v.store(y + i * 64, v.convert(v.f32x16, quants(p, i)) * d - m)

    return block


@blocks("Q4_K")
def q4_k(v: Any) -> Any:
    """nibbles [128]"""

    def quants(p, i):
        return (v.load(v.u8x16, p + 16 + (i >> 2) * 32 + (i & 1) * 16) >> (2 * (i & 2))) & 15

    return _k_block(v, v.function(quants))


@blocks("Q5_K")
def q5_k(v: Any) -> Any:
    """fifth bits [32] | nibbles [128]"""

    def quants(p, i):
        fifth = (v.load(v.u8x16, p + 16 + (i & 1) * 16) >> (i >> 1)) & 1
        return ((v.load(v.u8x16, p + 48 + (i >> 2) * 32 + (i & 1) * 16) >> (2 * (i & 2))) & 15) | (fifth << 4)

    return _k_block(v, v.function(quants))


@blocks("Q6_K")
def q6_k(v: Any) -> Any:
    """low nibbles [128] | two high bits [64] | scales int8[16] | d f16; quants less 32"""

    def block(p, y):
        d = v.load_half(v.float32, p + 208)
        for i in range(16):
            half, part, side = i >> 3, (i >> 1) & 3, i & 1
            scale = d * np.float32(v.load(v.int8, p + 192 + i))
            low = (v.load(v.u8x16, p + half * 64 + (part & 1) * 32 + side * 16) >> (2 * (part & 2))) & 15
            high = (v.load(v.u8x16, p + 128 + half * 32 + side * 16) >> (2 * part)) & 3
            v.store(y + i * 64, v.convert(v.f32x16, v.bits(v.i8x16, low | (high << 4)) - 32) * scale)

    return block


@blocks("TQ1_0")
def tq1_0(v: Any) -> Any:
    """five ternary digits a byte [32], then [16] | four a byte [4] | d f16; a digit is the top of byte · 3^n mod 256"""

    def digits(p, y, count, powers, d):
        power = 1
        for n in range(powers):
            for i in range(count):
                digit = (((v.load(v.uint8, p + i) * power) & 255) * 3) >> 8
                v.store(y + (n * count + i) * 4, d * np.float32(digit - 1))
            power = power * 3

    digits = v.function(digits)

    def block(p, y):
        d = v.load_half(v.float32, p + 52)
        digits(p, y, 32, 5, d)
        digits(p + 32, y + 640, 16, 5, d)
        digits(p + 48, y + 960, 4, 4, d)

    return block


@blocks("TQ2_0")
def tq2_0(v: Any) -> Any:
    """two bits [64] | d f16; quants less 1"""

    def block(p, y):
        d = v.load_half(v.float32, p + 64)
        for i in range(16):
            two = (v.load(v.u8x16, p + (i >> 3) * 32 + (i & 1) * 16) >> (2 * ((i >> 1) & 3))) & 3
            v.store(y + i * 64, v.convert(v.f32x16, v.bits(v.i8x16, two) - 1) * d)

    return block


@blocks("Q1_0")
def q1_0(v: Any) -> Any:
    """d f16 | signs [16]: a set bit is +d, a clear one -d"""

    def block(p, y):
        d = v.load_half(v.float32, p)
        for i in range(128):
            bit = (v.load(v.uint8, p + 2 + (i >> 3)) >> (i & 7)) & 1
            v.store(y + i * 4, d if bit else -d)

    return block


@blocks("Q2_0")
def q2_0(v: Any) -> Any:
    """d f16 | two bits [16], the lowest first; quants less 1"""

    def block(p, y):
        d = v.load_half(v.float32, p)
        for i in range(64):
            two = (v.load(v.uint8, p + 2 + (i >> 2)) >> (2 * (i & 3))) & 3
            v.store(y + i * 4, d * np.float32(two - 1))

    return block
