"""Pieces of GGML's block formats that several kernels share; no kernel of its own."""

from __future__ import annotations

from typing import Any

PREFETCH = (
    4096  # bytes ahead, into the first-level cache: best of 1, 2 and 4 KB, and of both levels, for quantised rows
)


def six_bit_scales(v: Any) -> Any:
    """(address of 12 bytes) -> (scales i16x8, minima i16x8): Q4_K's and Q5_K's packing (ggml-quants.c,
    get_scale_min_k4)."""

    def unpack(address):
        a, b, c = v.load(v.uint32, address), v.load(v.uint32, address + 4), v.load(v.uint32, address + 8)
        scales = (a & 0x3F3F3F3F) | (((c & 0x0F0F0F0F) | (((a >> 6) & 0x03030303) << 4)) << 32)
        minima = (b & 0x3F3F3F3F) | ((((c >> 4) & 0x0F0F0F0F) | (((b >> 6) & 0x03030303) << 4)) << 32)
        return v.convert(v.i16x8, v.bits(v.u8x8, scales)), v.convert(v.i16x8, v.bits(v.u8x8, minima))

    return v.function(unpack)
