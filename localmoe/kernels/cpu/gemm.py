"""Matrix times matrix in float32 for prefill: weights of any format become float32 a strip at a time; knows no threads.

Tokens are packed once per op into panels: panel p is float32 [columns][panel_tokens], tokens p·panel_tokens …, missing
ones zero. A token's result is summed in the order of the columns, whatever the number of tokens or its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.cpu.isa import Isa

_TILE_ROWS = {"avx512": 8, "avx2": 6, "portable": 2}
STRIP_ROWS = 24  # a multiple of every tile's rows; threads should share rows by whole strips
# Rows and columns of a strip: 50 KB of float32, which stay in the second-level cache with a panel's columns. Each strip
# reads all panels once more; where they are MUCH, and come from far away, strips are longer (210 KB).
_STRIP, _LONG_STRIP = (STRIP_ROWS, 512), (192, 256)
_MUCH = 10 << 20  # bytes
ARGUMENTS = 11
_TOKENS = 512  # sums of a strip over so many tokens stay in the second-level cache until all columns are in
_SKEW = 64  # bytes more from row to row than a multiple of 1024, so that a tile's rows fall into different cache sets


def panel_tokens(isa: Isa) -> int:
    return 2 * isa.lanes


def panels_nbytes(isa: Isa, tokens: int, columns: int) -> int:
    """Bytes of the panels that so many tokens need, one after the other."""
    width = panel_tokens(isa)
    return (tokens + width - 1) // width * width * columns * 4


def scratch_nbytes(tokens: int, columns: int, isa: Isa) -> int:
    """Bytes of scratch that each thread in `gemm` needs for itself with so many tokens, or fewer."""
    width = panel_tokens(isa)
    sums = 4 * min(_TOKENS, (tokens + width - 1) // width * width)
    strips = (_STRIP, _LONG_STRIP) if min(tokens, _TOKENS) * columns * 4 > _MUCH else (_STRIP,)
    return max(rows * (4 * chunk + _SKEW + sums) for rows, chunk in strips)


@kernel("pack_panel", arguments=5)
def pack_panel(v: Any) -> Callable[..., None]:
    """(x float32, row_stride in bytes, tokens, columns, panels): threads may share the work by whole panels."""
    width = 2 * v.lanes

    def pack_one(x, row_stride, tokens, columns, panel):
        whole, even = tokens - tokens % 4, columns - columns % 4
        for t in range(0, whole, 4):
            for k in range(0, even, 4):
                place = panel + (k * width + t) * 4
                a, b, c, d = v.transpose4(x + t * row_stride + k * 4, row_stride)
                v.store(place, a)
                v.store(place + width * 4, b)
                v.store(place + width * 8, c)
                v.store(place + width * 12, d)
        for t in range(width):
            for k in range(even if t < whole else 0, columns):
                value = v.load(v.float32, x + t * row_stride + k * 4) if t < tokens else np.float32(0)
                v.store(panel + (k * width + t) * 4, value)

    pack_one = v.function(pack_one)

    def pack(x, row_stride, tokens, columns, panels):
        for first in range(0, tokens, width):
            count = min(width, tokens - first)
            pack_one(x + first * row_stride, row_stride, count, columns, panels + first * columns * 4)

    return pack


def _put(v: Any, stride: int) -> Any:
    """(sums[rows][stride bytes], rows, out of row 0, token 0, out's token stride, tokens): out[t, r] = sums[r, t]."""

    def put(sums, rows, out, out_stride, tokens):
        whole, fours = rows - rows % 4, tokens - tokens % 4
        for t in range(0, fours, 4):
            for r in range(0, whole, 4):
                a, b, c, d = v.transpose4(sums + r * stride + t * 4, stride)
                place = out + t * out_stride + r * 4
                v.store(place, a)
                v.store(place + out_stride, b)
                v.store(place + 2 * out_stride, c)
                v.store(place + 3 * out_stride, d)
        for t in range(tokens):
            for r in range(whole if t < fours else 0, rows):
                v.store(out + t * out_stride + r * 4, v.load(v.float32, sums + r * stride + t * 4))

    return v.function(put)


@kernel("gemm", arguments=1)
def gemm(v: Any) -> Callable[..., None]:
    """(address of ARGUMENTS int64): dequantise kernel, weights, row_nbytes, panels, out, out_stride, tokens, columns,
    row_start, row_stop, scratch.

    out[t, r] float32 for all tokens and row_start <= r < row_stop; out is the address of row 0 of token 0, out_stride
    the bytes from one token to the next; scratch belongs to the calling thread (`scratch_nbytes`).
    """
    tile_rows, width, half = _TILE_ROWS[v.isa.name], 2 * v.lanes, v.lanes
    sums_stride, (few_rows, many_columns), (many_rows, few_columns) = width * 4, _STRIP, _LONG_STRIP
    wide, narrow = v.tile(tile_rows, 2, v.lanes, sums_stride), v.tile(tile_rows, 1, v.lanes, sums_stride)
    few, put = v.tile(tile_rows, 1, v.lanes // 2, sums_stride), _put(v, sums_stride)
    most_tokens, much, skew = _TOKENS, _MUCH, _SKEW

    def multiply(arguments):
        dequantise, weights = v.load(v.int64, arguments), v.load(v.int64, arguments + 8)
        row_nbytes, panels = v.load(v.int64, arguments + 16), v.load(v.int64, arguments + 24)
        out, out_stride = v.load(v.int64, arguments + 32), v.load(v.int64, arguments + 40)
        tokens, columns = v.load(v.int64, arguments + 48), v.load(v.int64, arguments + 56)
        row_start, row_stop = v.load(v.int64, arguments + 64), v.load(v.int64, arguments + 72)
        scratch = v.load(v.int64, arguments + 80)
        is_much = min(tokens, most_tokens) * columns * 4 > much
        strip_rows = many_rows if is_much else few_rows
        chunk = few_columns if is_much else many_columns
        row_stride, panel_sums = chunk * 4 + skew, strip_rows * width * 4
        sums = scratch + strip_rows * row_stride
        for first in range(row_start, row_stop, strip_rows):
            rows = min(strip_rows, row_stop - first)
            filled = (rows + tile_rows - 1) // tile_rows * tile_rows
            for start in range(0, tokens, most_tokens):
                stop = min(start + most_tokens, tokens)
                for i in range((stop - start + width - 1) // width * panel_sums // (4 * half)):
                    v.store(sums + i * (4 * half), v.zero(v.f32))
                for k in range(0, columns, chunk):
                    count = min(chunk, columns - k)
                    for r in range(filled):
                        row = min(first + r, row_stop - 1)
                        v.call(dequantise, weights, row_nbytes, row, k, scratch + r * row_stride, count)
                    for t in range(start, stop, width):
                        panel = panels + (t * columns + k * width) * 4
                        into = sums + (t - start) // width * panel_sums
                        for r in range(0, rows, tile_rows):
                            strip = scratch + r * row_stride
                            if stop - t > half:
                                wide(strip, row_stride, panel, sums_stride, count, into + r * sums_stride)
                            elif stop - t > half // 2:
                                narrow(strip, row_stride, panel, sums_stride, count, into + r * sums_stride)
                            else:
                                few(strip, row_stride, panel, sums_stride, count, into + r * sums_stride)
                for t in range(start, stop, width):
                    place = out + t * out_stride + first * 4
                    put(sums + (t - start) // width * panel_sums, rows, place, out_stride, min(width, stop - t))

    return multiply
