"""Matrix times matrix in 8-bit integers for prefill: weights of any integer format become bytes a strip at a time;
knows no threads.

Tokens are quantised and packed once per op into panels of PANEL_TOKENS, missing ones zero. For K columns a panel holds,
each [..][PANEL_TOKENS]: int8[K/4][..][4] · float32 scale[K/block] · then for groups of 32 columns, and for q8_256 of 16
as well, int32 start[K/group] (-128 · the group's sum) and float32 sum[K/group] (q8_32: times the scale). A token's
result does not depend on the number of tokens or on its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from localmoe.kernels.cpu.activations import quantise_q8_32, quantise_q8_256
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.cpu.isa import Isa
from localmoe.kernels.cpu.unpack import INTEGER

CHUNK = 512  # columns: a strip's bytes (16 KB with 512-bit vectors) stay in the first-level cache
PANEL_TOKENS = 6
STRIP_VECTORS = 2  # a tile is two vectors of rows times six tokens: 12 integer and 12 float sums of 32 registers
_TOKENS = 510  # sums of a strip over so many tokens stay in the second-level cache until all columns are in
_BLOCKS = {"q8_32": 32, "q8_256": 256}
_ROW_STRIDE = CHUNK + 64  # off a power of two, so that rows fall into different cache sets


def strip_rows(isa: Isa) -> int:
    """Threads should share rows by whole strips."""
    return STRIP_VECTORS * isa.lanes


def integer_kernels(format_name: str) -> tuple[str, str, str]:
    """(form of the activations, the GEMM kernel, the unpacking kernel) of a format in INTEGER."""
    taken = INTEGER[format_name]
    return taken.form, _gemm_name(taken.form, taken.group, taken.minima), f"unpack_{format_name.lower()}"


def _gemm_name(form: str, group: int, minima: bool) -> str:
    return f"gemm_{form}_{group}{'_minima' if minima else ''}"


def panel_nbytes(form: str, columns: int) -> int:
    """Bytes of one panel: what PANEL_TOKENS tokens or fewer need."""
    groups = 8 * (columns // 32) + (8 * (columns // 16) if form == "q8_256" else 0)
    return (PANEL_TOKENS * (columns + 4 * (columns // _BLOCKS[form]) + groups) + 63) // 64 * 64


def panels_nbytes(form: str, tokens: int, columns: int) -> int:
    return (tokens + PANEL_TOKENS - 1) // PANEL_TOKENS * panel_nbytes(form, columns)


def scratch_nbytes(tokens: int, isa: Isa) -> int:
    """Bytes of scratch that each thread in a GEMM kernel needs for itself."""
    rows = strip_rows(isa)
    sums = min(_TOKENS, (tokens + PANEL_TOKENS - 1) // PANEL_TOKENS * PANEL_TOKENS) * rows * 4
    return isa.lanes * (_ROW_STRIDE + 2 * _SCALES_STRIDE) + rows * (CHUNK + 2 * _SCALES_NBYTES) + sums


_SCALES_NBYTES = 4 * CHUNK // 16
_SCALES_STRIDE = _SCALES_NBYTES + 64


def _pack(v: Any, form: str) -> Callable[..., None]:
    wide, block = PANEL_TOKENS, _BLOCKS[form]
    sixteen = form == "q8_256"
    quantise = v.function(quantise_q8_256(v) if sixteen else quantise_q8_32(v))
    row, ones = v.stack(512), v.constants(v.u8x16, 1)

    def half_sum(values):
        return v.total(v.dot(v.zero(v.i32x4), ones(), v.load(v.i8x16, values)))

    half_sum = v.function(half_sum)

    def pack_piece(held, values, t, k, columns, scales, groups, halves):
        for i in range(0, columns, 4):
            v.store(values + ((k + i) * wide + 4 * t), v.load(v.int32, held + i))
        held_scales = held + (columns + (columns >> 3) + (columns >> 4) if sixteen else (columns + 63) & -64)
        for i in range(columns // block):
            v.store(scales + 4 * ((k // block + i) * wide + t), v.load(v.float32, held_scales + 4 * i))
        for i in range(columns // 32):
            first, second = half_sum(held + 32 * i), half_sum(held + 32 * i + 16)
            factor = np.float32(1) if sixteen else v.load(v.float32, held_scales + 4 * i)
            g = k // 32 + i
            v.store(groups[0] + 4 * (g * wide + t), v.convert(v.int32, -128 * (first + second)))
            v.store(groups[1] + 4 * (g * wide + t), np.float32(first + second) * factor)
            if sixteen:
                v.store(halves[0] + 4 * (2 * g * wide + t), v.convert(v.int32, -128 * first))
                v.store(halves[1] + 4 * (2 * g * wide + t), np.float32(first))
                v.store(halves[0] + 4 * ((2 * g + 1) * wide + t), v.convert(v.int32, -128 * second))
                v.store(halves[1] + 4 * ((2 * g + 1) * wide + t), np.float32(second))

    pack_piece = v.function(pack_piece)

    def pack(x, row_stride, tokens, columns, panels):
        groups = 8 * (columns // 32) + (8 * (columns // 16) if sixteen else 0)
        nbytes = (wide * (columns + 4 * (columns // block) + groups) + 63) // 64 * 64
        held = row()
        for first in range(0, tokens, wide):
            values = panels + first // wide * nbytes
            scales = values + wide * columns
            starts = scales + 4 * wide * (columns // block)
            sums = starts + 4 * wide * (columns // 32)
            starts16 = sums + 4 * wide * (columns // 32)
            sums16 = starts16 + 4 * wide * (columns // 16)
            if tokens - first < wide:
                for i in range(0, nbytes, 4):
                    v.store(values + i, v.convert(v.int32, 0))
            for t in range(min(wide, tokens - first)):
                source = x + (first + t) * row_stride
                for k in range(0, columns, 256):
                    count = min(256, columns - k)
                    quantise(source + 4 * k, held, count)
                    pack_piece(held, values, t, k, count, scales, (starts, sums), (starts16, sums16))

    return pack


@kernel("pack_q8_32", arguments=5)
def pack_q8_32(v: Any) -> Callable[..., None]:
    """(x float32, row_stride in bytes, tokens, columns, panels): threads may share the work by whole panels."""
    return _pack(v, "q8_32")


@kernel("pack_q8_256", arguments=5)
def pack_q8_256(v: Any) -> Callable[..., None]:
    """As pack_q8_32."""
    return _pack(v, "q8_256")


def _strip(v: Any, group: int) -> Any:
    """(unpack kernel, weights, row_nbytes, first row, last row, its byte, columns, their bytes, bytes to
    those unpacked next, rows' scratch, tile): the bytes, scales and minima of a strip's rows, as the tile wants them."""
    lanes, rows = v.lanes, STRIP_VECTORS * v.lanes
    quants_stride, scales_stride, scales_nbytes = _ROW_STRIDE, _SCALES_STRIDE, rows * _SCALES_NBYTES
    tile_nbytes = rows * CHUNK

    def strip(unpack, weights, row_nbytes, first, last, place, columns, nbytes, ahead, scratch, tile):
        scales, lows = scratch + lanes * quants_stride, scratch + lanes * (quants_stride + scales_stride)
        for m in range(STRIP_VECTORS):
            for r in range(lanes):
                source = weights + min(first + m * lanes + r, last) * row_nbytes + place
                for line in range(0, nbytes + 64, 64):
                    v.prefetch_second(source + ahead + line)
                each = r * scales_stride
                v.call(unpack, source, columns, scratch + r * quants_stride, scales + each, lows + each)
            target = tile + 4 * lanes * m
            for k in range(0, columns, 4 * lanes):
                v.transpose(scratch + k, quants_stride, target + k * rows, 4 * rows)
            for g in range(0, columns // group, lanes):
                place_of_group = target + tile_nbytes + 4 * g * rows
                v.transpose(scales + 4 * g, scales_stride, place_of_group, 4 * rows)
                v.transpose(lows + 4 * g, scales_stride, place_of_group + scales_nbytes, 4 * rows)

    return v.function(strip)


def _gemm(v: Any, form: str, group: int, minima: bool) -> Callable[..., None]:
    """(address of ARGUMENTS int64), as `gemm.gemm`, with an unpacking kernel in the place of the dequantising one."""
    lanes, rows, wide, block = v.lanes, STRIP_VECTORS * v.lanes, PANEL_TOKENS, _BLOCKS[form]
    chunk, most_tokens = CHUNK, _TOKENS
    row_scratch = v.lanes * (_ROW_STRIDE + 2 * _SCALES_STRIDE)
    tile_nbytes, scales_nbytes = rows * CHUNK, rows * _SCALES_NBYTES
    strip, products = _strip(v, group), v.integer_tile(STRIP_VECTORS, wide, group, block, minima)
    both = form == "q8_256"

    def multiply(arguments):
        unpack, weights = v.load(v.int64, arguments), v.load(v.int64, arguments + 8)
        row_nbytes, panels = v.load(v.int64, arguments + 16), v.load(v.int64, arguments + 24)
        out, out_stride = v.load(v.int64, arguments + 32), v.load(v.int64, arguments + 40)
        tokens, columns = v.load(v.int64, arguments + 48), v.load(v.int64, arguments + 56)
        row_start, row_stop = v.load(v.int64, arguments + 64), v.load(v.int64, arguments + 72)
        scratch = v.load(v.int64, arguments + 80)
        tile = scratch + row_scratch
        sums = tile + tile_nbytes + 2 * scales_nbytes
        groups = 8 * (columns // 32) + (8 * (columns // 16) if both else 0)
        nbytes = (wide * (columns + 4 * (columns // block) + groups) + 63) // 64 * 64
        scales = wide * columns
        offsets = scales + 4 * wide * (columns // block) + (8 * wide * (columns // 32) if group == 16 else 0)
        offsets += 4 * wide * (columns // group) if minima else 0
        for first in range(row_start, row_stop, rows):
            count = min(rows, row_stop - first)
            for start in range(0, tokens, most_tokens):
                stop = min(start + most_tokens, tokens)
                for i in range((stop - start + wide - 1) // wide * (wide * STRIP_VECTORS)):
                    v.store(sums + i * (4 * lanes), v.zero(v.f32))
                for k in range(0, columns, chunk):
                    many, place = min(chunk, columns - k), row_nbytes * k // columns
                    piece = row_nbytes * many // columns
                    ahead = piece if k + chunk < columns else rows * row_nbytes - place
                    strip(
                        unpack, weights, row_nbytes, first, row_stop - 1, place, many, piece, ahead, scratch, tile
                    )  # fmt: skip
                    for t in range(start, stop, wide):
                        panel = panels + t // wide * nbytes
                        products(
                            tile,
                            tile + tile_nbytes,
                            tile + tile_nbytes + scales_nbytes,
                            panel + k * wide,
                            panel + scales + 4 * wide * (k // block),
                            panel + offsets + 4 * wide * (k // group),
                            many // block,
                            sums + (t - start) * (4 * rows),
                        )
                for t in range(start, stop):
                    place, source = out + t * out_stride + 4 * first, sums + (t - start) * (4 * rows)
                    if count == rows:
                        for m in range(0, 4 * rows, 4 * lanes):
                            v.store(place + m, v.load(v.f32, source + m))
                    else:
                        for r in range(0, 4 * count, 4):
                            v.store(place + r, v.load(v.float32, source + r))

    return multiply


def _register(form: str, group: int, minima: bool) -> None:
    kernel(_gemm_name(form, group, minima), arguments=1)(lambda v: _gemm(v, form, group, minima))


for _taken in dict.fromkeys(INTEGER.values()):
    _register(_taken.form, _taken.group, _taken.minima)
