"""Rows of GGUF blocks as bytes, scales and minima, for the integer GEMM; knows no matrix.

Kernel `unpack_<format>`: (source, columns, quants uint8[columns], scales float32[columns/group], minima), `columns`
being whole blocks. A weight is scale · (quant - `offset(isa)`), or scale · quant + minimum for formats with minima.
These are float32[columns/group], or for each block of 256 int16[256/group] and then the float32 that they are times.
Layouts as in `dequantise.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from localmoe.formats import FORMATS
from localmoe.kernels.cpu.blocks import E2M1, iq4_values, nibbles, q4_k_quants, q5_k_quants, q6_k_quants, six_bit_scales
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.cpu.isa import Isa

Factory = Callable[[Any], Callable[..., None]]


@dataclass(frozen=True, slots=True)
class Integer:
    """How the integer GEMM takes a format: the form of its activations, columns that share a scale, and whether groups
    have minima."""

    form: str
    group: int
    minima: bool


INTEGER: dict[str, Integer] = {}
SIGNED = {"Q8_0": ("q8_32", 32), "IQ4_NL": ("q8_32", 32), "IQ4_XS": ("q8_256", 32)}  # eight bits, with form and group


def offset(isa: Isa) -> int:
    """What is added to signed quants: so much that every format fits a byte, or, where products of bytes are added in
    16 bits and saturate, no more than seven bits take (formats in SIGNED then stay signed)."""
    return 128 if isa.name == "avx512" else 64


def signed(format_name: str, isa: Isa) -> bool:
    """Whether quants are int8 without offset."""
    return format_name in SIGNED and isa.name != "avx512"


def low_words(form: str, group: int) -> int:
    """32-bit words of minima for 256 columns."""
    return 256 // group if form == "q8_32" else 128 // group + 1


def unpacks(name: str, form: str, group: int, minima: bool = False) -> Callable[[Factory], Factory]:
    """Register a factory of `block(source, quants, scales, minima)` for one block of format `name`."""

    def register(factory: Factory) -> Factory:
        format = FORMATS[name]
        elements, nbytes, step = format.elements, format.nbytes, 4 * format.elements // group
        low_step = 4 * low_words(form, group) * format.elements // 256

        def rows(v: Any) -> Callable[..., None]:
            block = v.function(factory(v))

            def unpack(source, columns, quants, scales, lows):
                for i in range(columns // elements):
                    block(source + i * nbytes, quants + i * elements, scales + i * step, lows + i * low_step)

            return unpack

        kernel(f"unpack_{name.lower()}", arguments=5)(rows)
        INTEGER[name] = Integer(form, group, minima)
        return factory

    return register


@unpacks("Q8_0", "q8_32", 32)
def q8_0(v: Any) -> Any:
    turn = 0 if signed("Q8_0", v.isa) else 128

    def block(p, quants, scales, lows):
        v.store(quants, v.load(v.u8x32, p + 2) ^ turn)
        v.store(scales, v.load_half(v.float32, p))

    return block


@unpacks("Q4_0", "q8_32", 32)
def q4_0(v: Any) -> Any:
    halves, shift = nibbles(v), offset(v.isa) - 8

    def block(p, quants, scales, lows):
        v.store(quants, halves(p + 2) + shift)
        v.store(scales, v.load_half(v.float32, p))

    return block


@unpacks("Q4_1", "q8_32", 32, minima=True)
def q4_1(v: Any) -> Any:
    halves = nibbles(v)

    def block(p, quants, scales, lows):
        v.store(quants, halves(p + 4))
        v.store(scales, v.load_half(v.float32, p))
        v.store(lows, v.load_half(v.float32, p + 2))

    return block


@unpacks("Q5_0", "q8_32", 32)
def q5_0(v: Any) -> Any:
    halves, shift = nibbles(v), offset(v.isa) - 16

    def block(p, quants, scales, lows):
        fifths = v.marked(v.u8x32, v.load(v.int32, p + 2)) & 16
        v.store(quants, (halves(p + 6) | fifths) + shift)
        v.store(scales, v.load_half(v.float32, p))

    return block


@unpacks("Q5_1", "q8_32", 32, minima=True)
def q5_1(v: Any) -> Any:
    halves = nibbles(v)

    def block(p, quants, scales, lows):
        v.store(quants, halves(p + 8) | (v.marked(v.u8x32, v.load(v.int32, p + 4)) & 16))
        v.store(scales, v.load_half(v.float32, p))
        v.store(lows, v.load_half(v.float32, p + 2))

    return block


def _store_eight(v: Any, readers: list[Any], added: int = 0) -> Any:
    """(block, quants): 256 quants, `readers[j]` bringing 32 of them."""
    q0, q1, q2, q3, q4, q5, q6, q7 = readers

    def store(p, quants):
        v.store(quants, q0(p) + added)
        v.store(quants + 32, q1(p) + added)
        v.store(quants + 64, q2(p) + added)
        v.store(quants + 96, q3(p) + added)
        v.store(quants + 128, q4(p) + added)
        v.store(quants + 160, q5(p) + added)
        v.store(quants + 192, q6(p) + added)
        v.store(quants + 224, q7(p) + added)

    return v.function(store)


def _k_block(v: Any, readers: list[Any]) -> Any:
    """Q4_K and Q5_K."""
    unpack, store = six_bit_scales(v), _store_eight(v, readers)

    def block(p, quants, scales, lows):
        six, minima = unpack(p + 4)
        v.store(scales, v.convert(v.f32x8, six) * v.load_half(v.float32, p))
        v.store(lows, minima)
        v.store(lows + 16, -v.load_half(v.float32, p + 2))
        store(p, quants)

    return block


@unpacks("Q4_K", "q8_256", 32, minima=True)
def q4_k(v: Any) -> Any:
    return _k_block(v, q4_k_quants(v))


@unpacks("Q5_K", "q8_256", 32, minima=True)
def q5_k(v: Any) -> Any:
    return _k_block(v, q5_k_quants(v))


@unpacks("Q6_K", "q8_256", 16)
def q6_k(v: Any) -> Any:
    store = _store_eight(v, q6_k_quants(v), offset(v.isa) - 32)

    def block(p, quants, scales, lows):
        v.store(scales, v.convert(v.f32x16, v.load(v.i8x16, p + 192)) * v.load_half(v.float32, p + 208))
        store(p, quants)

    return block


@unpacks("Q2_K", "q8_256", 16, minima=True)
def q2_k(v: Any) -> Any:
    def block(p, quants, scales, lows):
        both = v.load(v.u8x16, p)
        v.store(scales, v.convert(v.f32x16, both & 15) * v.load_half(v.float32, p + 80))
        v.store(lows, v.convert(v.i16x16, both >> 4))
        v.store(lows + 32, -v.load_half(v.float32, p + 82))
        for half in range(2):
            two = v.load(v.u8x32, p + 16 + 32 * half)
            v.store(quants + 128 * half, two & 3)
            v.store(quants + 128 * half + 32, (two >> 2) & 3)
            v.store(quants + 128 * half + 64, (two >> 4) & 3)
            v.store(quants + 128 * half + 96, two >> 6)

    return block


@unpacks("Q3_K", "q8_256", 16)
def q3_k(v: Any) -> Any:
    added = offset(v.isa) - 4

    def block(p, quants, scales, lows):
        d = v.load_half(v.float32, p + 108)
        for i in range(16):
            low = (v.load(v.uint8, p + 96 + (i & 7)) >> (4 * (i >> 3))) & 15
            high = (v.load(v.uint8, p + 104 + (i & 3)) >> (2 * (i >> 2))) & 3
            v.store(scales + 4 * i, d * np.float32((low | (high << 4)) - 32))
        for j in range(8):
            two = (v.load(v.u8x32, p + 32 + 32 * (j >> 2)) >> (2 * (j & 3))) & 3
            third = ((v.load(v.u8x32, p) >> j) & 1) << 2
            v.store(quants + 32 * j, (two | third) + added)

    return block


def _table(v: Any, name: str, values: list[int]) -> Any:
    """(address of 16 bytes) -> u8x32: what their nibbles stand for, as the products want it."""
    halves, added = nibbles(v), 0 if signed(name, v.isa) else offset(v.isa)
    table = v.constants(v.i8x32, [(value + added + 128) % 256 - 128 for value in values] * 2)

    def quants(p):
        return v.bits(v.u8x32, v.look_up(table(), halves(p)))

    return v.function(quants)


@unpacks("IQ4_NL", "q8_32", 32)
def iq4_nl(v: Any) -> Any:
    table = _table(v, "IQ4_NL", iq4_values())

    def block(p, quants, scales, lows):
        v.store(quants, table(p + 2))
        v.store(scales, v.load_half(v.float32, p))

    return block


@unpacks("MXFP4", "q8_32", 32)
def mxfp4(v: Any) -> Any:
    table = _table(v, "MXFP4", E2M1)

    def block(p, quants, scales, lows):
        v.store(quants, table(p + 1))
        size = v.bits(v.float32, v.convert(v.int32, v.load(v.uint8, p) << 23))
        v.store(scales, size * np.float32(0.5))

    return block


@unpacks("IQ4_XS", "q8_256", 32)
def iq4_xs(v: Any) -> Any:
    table = _table(v, "IQ4_XS", iq4_values())

    def block(p, quants, scales, lows):
        d, high, low = v.load_half(v.float32, p), v.load(v.uint16, p + 2), v.load(v.uint32, p + 4)
        for j in range(8):
            v.store(quants + 32 * j, table(p + 8 + 16 * j))
            scale = (((low >> (4 * j)) & 15) | (((high >> (2 * j)) & 3) << 4)) - 32
            v.store(scales + 4 * j, d * np.float32(scale))

    return block
