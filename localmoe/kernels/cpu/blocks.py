"""Pieces of GGML's block formats that several kernels share, the code books among them; no kernel of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

PREFETCH = 4096  # bytes ahead, into the first-level cache, where one row is read at a time


def six_bit_scales(v: Any) -> Any:
    """(address of 12 bytes) -> (scales i16x8, minima i16x8): Q4_K's and Q5_K's packing (ggml-quants.c,
    get_scale_min_k4)."""

    def unpack(address):
        a, b, c = v.load(v.uint32, address), v.load(v.uint32, address + 4), v.load(v.uint32, address + 8)
        scales = (a & 0x3F3F3F3F) | (((c & 0x0F0F0F0F) | (((a >> 6) & 0x03030303) << 4)) << 32)
        minima = (b & 0x3F3F3F3F) | ((((c >> 4) & 0x0F0F0F0F) | (((b >> 6) & 0x03030303) << 4)) << 32)
        return v.convert(v.i16x8, v.bits(v.u8x8, scales)), v.convert(v.i16x8, v.bits(v.u8x8, minima))

    return v.function(unpack)


def nibbles(v: Any) -> Any:
    """(address of 16 bytes) -> u8x32: their low halves, then their high halves."""
    twice, shifts = v.shuffle([*range(8)] * 2), v.constants(v.u16x16, [0] * 8 + [4] * 8)

    def halves(p):
        packed = v.load(v.u16x8, p)
        return v.bits(v.u8x32, (twice(packed, packed) >> shifts()) & 0x0F0F)

    return v.function(halves)


def eight(part: Callable[[Any, int], Any]) -> Callable[[Any], list[Any]]:
    """`part(v, j)` as a function of `v`: eight readers (address of a block of 256) -> 32 quants from 32 j on, u8x32."""
    return lambda v: [v.function(part(v, j)) for j in range(8)]


@eight
def q4_k_quants(v: Any, j: int) -> Any:
    place, shift = 16 + 32 * (j // 2), 4 * (j % 2)
    return lambda p: v.bits(v.u8x32, (v.load(v.u16x16, p + place) >> shift) & 0x0F0F)


@eight
def q5_k_quants(v: Any, j: int) -> Any:
    place, shift = 48 + 32 * (j // 2), 4 * (j % 2)

    def quants(p):
        fifth = ((v.load(v.u16x16, p + 16) >> j) & 0x0101) << 4
        return v.bits(v.u8x32, ((v.load(v.u16x16, p + place) >> shift) & 0x0F0F) | fifth)

    return quants


@eight
def q6_k_quants(v: Any, j: int) -> Any:
    """Low nibbles [128], two high bits [64]; stored with 32 added."""
    half, quarter = divmod(j, 4)
    ql, qh, shift = 64 * half + 32 * (quarter % 2), 128 + 32 * half, 4 * (quarter // 2)
    up, down = max(4 - 2 * quarter, 0), max(2 * quarter - 4, 0)

    def quants(p):
        two = ((v.load(v.u16x16, p + qh) >> down) << up) & 0x3030
        return v.bits(v.u8x32, ((v.load(v.u16x16, p + ql) >> shift) & 0x0F0F) | two)

    return quants


def iq4_values() -> list[int]:
    """What the nibbles of IQ4_NL and IQ4_XS stand for, -127 to 113 (ggml-common.h, kvalues_iq4nl)."""
    from gguf.quants import IQ4_NL

    return [int(value) for value in IQ4_NL.kvalues]


# What the nibbles of MXFP4 stand for, doubled (OCP Microscaling Formats 1.0, table 5).
E2M1 = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]


def code_book(name: str) -> npt.NDArray[np.int8]:
    """The code book of a format: (entries, 4 or 8) small integers."""
    from gguf import quants

    book = getattr(quants, name)
    book.init_grid()
    return np.asarray(book.grid, np.int8).reshape(book.grid_shape)


def parities(v: Any) -> Any:
    """(seven sign bits) -> eight: the last one makes their number even."""
    from gguf.quants import IQ2_XXS

    table = v.table(np.frombuffer(IQ2_XXS.ksigns, np.uint8))

    def signs(seven):
        return v.load(v.uint8, table() + seven)

    return v.function(signs)
