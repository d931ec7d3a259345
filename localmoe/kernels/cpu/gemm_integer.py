"""Matrix times matrix in 8-bit integers for prefill: weights of any integer format become bytes a strip at a time;
knows no threads.

Tokens are quantised and packed once per op into panels of PANEL_TOKENS, missing ones zero; `_SECTIONS` has their
layout. A token's result does not depend on the number of tokens or on its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from localmoe.kernels.cpu import unpack_grids  # noqa: F401  (it registers kernels)
from localmoe.kernels.cpu.activations import quantise_q8_32, quantise_q8_256
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.cpu.isa import Isa
from localmoe.kernels.cpu.unpack import INTEGER, SIGNED, low_words, offset, signed

CHUNK = 512  # columns: a strip's bytes (16 KB with 512-bit vectors) stay in the first-level cache
PANEL_TOKENS = 6
_STRIP_VECTORS = {"avx512": 2}  # else 1: 12 or 6 integer sums, as many float sums and operands fit the registers
_TOKENS = 510  # sums of a strip over so many tokens stay in the second-level cache until all columns are in
_BLOCKS = {"q8_32": 32, "q8_256": 256}
# A panel is its sections one after the other, each 32-bit words [columns / n][PANEL_TOKENS]: four int8 values; the
# float32 scale of a block; int32 -offset · the sum of a group of 32 (or 16), where its products begin; the sums for
# minima: float32 and times the scale for q8_32, pairs of int16 for q8_256.
_SECTIONS = {
    "q8_32": {"values": 4, "scales": 32, "starts32": 32, "sums32": 32},
    "q8_256": {"values": 4, "scales": 256, "starts32": 32, "sums32": 64, "starts16": 16, "sums16": 32},
}
_ROW_STRIDE = CHUNK + 64  # off a power of two, so that rows fall into different cache sets


def strip_rows(isa: Isa) -> int:
    """Threads should share rows by whole strips."""
    return _strip_vectors(isa) * isa.lanes


def _strip_vectors(isa: Isa) -> int:
    return _STRIP_VECTORS.get(isa.name, 1)


def integer_kernels(format_name: str, isa: Isa) -> tuple[str, str, str]:
    """(form of the activations, the GEMM kernel, the unpacking kernel) of a format in INTEGER."""
    taken = INTEGER[format_name]
    name = _gemm_name(taken.form, taken.group, taken.minima, signed(format_name, isa))
    return taken.form, name, f"unpack_{format_name.lower()}"


def _gemm_name(form: str, group: int, minima: bool, signed: bool) -> str:
    return f"gemm_{form}_{group}{'_minima' if minima else ''}{'_signed' if signed else ''}"


def panel_nbytes(form: str, columns: int) -> int:
    """Bytes of one panel: what PANEL_TOKENS tokens or fewer need."""
    return (4 * PANEL_TOKENS * sum(columns // n for n in _SECTIONS[form].values()) + 63) // 64 * 64


def panels_nbytes(form: str, tokens: int, columns: int) -> int:
    return (tokens + PANEL_TOKENS - 1) // PANEL_TOKENS * panel_nbytes(form, columns)


def scratch_nbytes(tokens: int, isa: Isa) -> int:
    """Bytes of scratch that each thread in a GEMM kernel needs for itself."""
    rows = strip_rows(isa)
    sums = min(_TOKENS, (tokens + PANEL_TOKENS - 1) // PANEL_TOKENS * PANEL_TOKENS) * rows * 4
    return isa.lanes * (_ROW_STRIDE + 2 * _SCALES_STRIDE) + rows * (CHUNK + 2 * _SCALES_NBYTES) + sums


_SCALES_NBYTES = 4 * CHUNK // 16
_SCALES_STRIDE = _SCALES_NBYTES + 64


def _section(v: Any, form: str, name: str = "") -> Any:
    """`begins(columns)` in a kernel: bytes before a section of a panel; without a name, bytes of all."""
    names = list(_SECTIONS[form])
    before = tuple(_SECTIONS[form][n] for n in (names[: names.index(name)] if name else names))
    wide = PANEL_TOKENS

    def begins(columns):
        words = 0
        for n in before:
            words += columns // n
        return 4 * wide * words

    return v.function(begins if before else lambda columns: 0)


def _pack(v: Any, form: str) -> Callable[..., None]:
    """The packing kernel of a form; `put(held, panel, columns, k, t)` copies 256 quantised values of token t."""
    wide, whole = PANEL_TOKENS, _section(v, form)
    quantise, put = (
        (v.function(quantise_q8_32(v)), _put_32(v))
        if form == "q8_32"
        else (v.function(quantise_q8_256(v)), _put_256(v))
    )
    row = v.stack(512)

    def pack(x, row_stride, tokens, columns, panels):
        nbytes, held = (whole(columns) + 63) // 64 * 64, row()
        for first in range(0, tokens, wide):
            panel = panels + first // wide * nbytes
            if tokens - first < wide:
                for i in range(0, nbytes, 4):
                    v.store(panel + i, v.convert(v.int32, 0))
            for t in range(min(wide, tokens - first)):
                for k in range(0, columns, 256):
                    count = min(256, columns - k)
                    quantise(x + (first + t) * row_stride + 4 * k, held, count)
                    for i in range(0, count, 4):
                        v.store(panel + ((k + i) * wide + 4 * t), v.load(v.int32, held + i))
                    put(held, panel, columns, k, count, t)

    return pack


def _put_32(v: Any) -> Any:
    wide, ones, begin = 4 * PANEL_TOKENS, v.constants(v.u8x32, 1), offset(v.isa)
    scales, starts, sums = (_section(v, "q8_32", name) for name in ("scales", "starts32", "sums32"))

    def put(held, panel, columns, k, count, t):
        for i in range(count // 32):
            place, scale = panel + (k // 32 + i) * wide + 4 * t, v.load(v.float32, held + ((count + 63) & -64) + 4 * i)
            total = v.total(v.dot(v.zero(v.i32x8), ones(), v.load(v.i8x32, held + 32 * i)))
            v.store(place + scales(columns), scale)
            v.store(place + starts(columns), v.convert(v.int32, -begin * total))
            v.store(place + sums(columns), np.float32(total) * scale)

    return v.function(put)


def _put_256(v: Any) -> Any:
    """Behind the values stand int16 sums of 32 and of 16, and the scale: see `activations.py`."""
    wide, begin = 4 * PANEL_TOKENS, offset(v.isa)
    scales, starts, sums = (_section(v, "q8_256", name) for name in ("scales", "starts32", "sums32"))
    starts16, sums16 = _section(v, "q8_256", "starts16"), _section(v, "q8_256", "sums16")

    def put(held, panel, columns, k, count, t):
        column = panel + 4 * t
        v.store(column + scales(columns) + k // 256 * wide, v.load(v.float32, held + 304))
        for i in range(8):
            start = -begin * v.convert(v.int32, v.load(v.int16, held + 256 + 2 * i))
            v.store(column + starts(columns) + (k // 32 + i) * wide, v.convert(v.int32, start))
            v.store(column + sums16(columns) + (k // 32 + i) * wide, v.load(v.int32, held + 272 + 4 * i))
        for i in range(4):
            v.store(column + sums(columns) + (k // 64 + i) * wide, v.load(v.int32, held + 256 + 4 * i))
        for i in range(16):
            start = -begin * v.convert(v.int32, v.load(v.int16, held + 272 + 2 * i))
            v.store(column + starts16(columns) + (k // 16 + i) * wide, v.convert(v.int32, start))

    return v.function(put)


@kernel("pack_q8_32", arguments=5)
def pack_q8_32(v: Any) -> Callable[..., None]:
    """(x float32, row_stride in bytes, tokens, columns, panels): threads may share the work by whole panels."""
    return _pack(v, "q8_32")


@kernel("pack_q8_256", arguments=5)
def pack_q8_256(v: Any) -> Callable[..., None]:
    """As pack_q8_32."""
    return _pack(v, "q8_256")


def _strip(v: Any, group: int, low_words: int) -> Any:
    """(unpack kernel, weights, row_nbytes, place, rows' scratch, tile): the bytes, scales and minima of a strip's rows,
    as the tile wants them. `place`: first and last row, byte in a row, columns, their bytes, bytes to the next ones."""
    lanes, vectors, rows = v.lanes, _strip_vectors(v.isa), strip_rows(v.isa)
    quants_stride, scales_stride, scales_nbytes = _ROW_STRIDE, _SCALES_STRIDE, rows * _SCALES_NBYTES
    tile_nbytes = rows * CHUNK

    def strip(unpack, weights, row_nbytes, place, scratch, tile):
        first, last, byte, columns, nbytes, ahead = place
        scales, lows = scratch + lanes * quants_stride, scratch + lanes * (quants_stride + scales_stride)
        for m in range(vectors):
            for r in range(lanes):
                source = weights + min(first + m * lanes + r, last) * row_nbytes + byte
                for line in range(0, nbytes + 64, 64):
                    v.prefetch_second(source + ahead + line)
                each = r * scales_stride
                v.call(unpack, source, columns, scratch + r * quants_stride, scales + each, lows + each)
            target = tile + 4 * lanes * m
            for k in range(0, columns, 4 * lanes):
                v.transpose(scratch + k, quants_stride, target + k * rows, 4 * rows)
            for g in range(0, columns // group, lanes):
                v.transpose(scales + 4 * g, scales_stride, target + tile_nbytes + 4 * g * rows, 4 * rows)
            for g in range(0, low_words * columns // 256, lanes):
                v.transpose(lows + 4 * g, scales_stride, target + tile_nbytes + scales_nbytes + 4 * g * rows, 4 * rows)

    return v.function(strip)


def _gemm(v: Any, form: str, group: int, minima: bool, signed: bool) -> Callable[..., None]:
    """(address of ARGUMENTS int64), as `gemm.gemm`, with an unpacking kernel in the place of the dequantising one."""
    lanes, vectors, rows, wide, block = v.lanes, _strip_vectors(v.isa), strip_rows(v.isa), PANEL_TOKENS, _BLOCKS[form]
    chunk, most_tokens = CHUNK, _TOKENS
    row_scratch = v.lanes * (_ROW_STRIDE + 2 * _SCALES_STRIDE)
    tile_nbytes, scales_nbytes = rows * CHUNK, rows * _SCALES_NBYTES
    products = v.integer_tile(vectors, wide, group, block, minima, signed)
    strip = _strip(v, group, low_words(form, group) if minima else 0)
    whole, scales = _section(v, form), _section(v, form, "scales")
    offsets = f"{'sums' if minima else 'starts'}{group}"
    sums_of, columns_of_sum = _section(v, form, offsets), _SECTIONS[form][offsets]

    def multiply(arguments):
        unpack, weights = v.load(v.int64, arguments), v.load(v.int64, arguments + 8)
        row_nbytes, panels = v.load(v.int64, arguments + 16), v.load(v.int64, arguments + 24)
        out, out_stride = v.load(v.int64, arguments + 32), v.load(v.int64, arguments + 40)
        tokens, columns = v.load(v.int64, arguments + 48), v.load(v.int64, arguments + 56)
        row_start, row_stop = v.load(v.int64, arguments + 64), v.load(v.int64, arguments + 72)
        scratch = v.load(v.int64, arguments + 80)
        tile = scratch + row_scratch
        sums, nbytes = tile + tile_nbytes + 2 * scales_nbytes, (whole(columns) + 63) // 64 * 64
        for first in range(row_start, row_stop, rows):
            count = min(rows, row_stop - first)
            for start in range(0, tokens, most_tokens):
                stop = min(start + most_tokens, tokens)
                for i in range((stop - start + wide - 1) // wide * (wide * vectors)):
                    v.store(sums + i * (4 * lanes), v.zero(v.f32))
                for k in range(0, columns, chunk):
                    many, byte = min(chunk, columns - k), row_nbytes * k // columns
                    piece = row_nbytes * many // columns
                    ahead = piece if k + chunk < columns else rows * row_nbytes - byte
                    place = (first, row_stop - 1, byte, many, piece, ahead)
                    strip(unpack, weights, row_nbytes, place, scratch, tile)
                    for t in range(start, stop, wide):
                        panel = panels + t // wide * nbytes
                        products(
                            tile,
                            tile + tile_nbytes,
                            tile + tile_nbytes + scales_nbytes,
                            panel + k * wide,
                            panel + scales(columns) + 4 * wide * (k // block),
                            panel + sums_of(columns) + 4 * wide * (k // columns_of_sum),
                            many // block,
                            sums + (t - start) * (4 * rows),
                        )
                for t in range(start, stop):
                    target, source = out + t * out_stride + 4 * first, sums + (t - start) * (4 * rows)
                    if count == rows:
                        for m in range(0, 4 * rows, 4 * lanes):
                            v.store(target + m, v.load(v.f32, source + m))
                    else:
                        for r in range(0, 4 * count, 4):
                            v.store(target + r, v.load(v.float32, source + r))

    return multiply


def _register(form: str, group: int, minima: bool, signed: bool) -> None:
    kernel(_gemm_name(form, group, minima, signed), arguments=1)(lambda v: _gemm(v, form, group, minima, signed))


for _taken in dict.fromkeys(INTEGER.values()):
    _register(_taken.form, _taken.group, _taken.minima, signed=False)
for _form, _group in dict.fromkeys(SIGNED.values()):
    _register(_form, _group, minima=False, signed=True)
