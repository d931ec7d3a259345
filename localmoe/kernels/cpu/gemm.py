"""The float GEMM of a prefill chunk: weights dequantised strip by strip against packed panels of tokens; knows no op and no format.

A panel holds `panel_tokens` rows of x as (K, tokens), so that one weight is multiplied with two vectors of tokens. For every output the
sum over K runs in one order, whatever else is in the chunk: results do not depend on T, on a token's place or on the threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from localmoe.kernels.cpu.arguments import slots
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.cpu.isa import Isa

ARGUMENTS = 11  # slots of the block that `gemm` reads
STRIP_ROWS = 24  # dequantised together: a panel's part is read once from L3 for all of them
DEPTH = 512  # columns at a time, a multiple of every block: 24 rows are 48 KB and a panel's part 64 KB, both in L2
_ROWS = 6  # of a microkernel: 12 accumulators fit 16 registers


def panel_tokens(isa: Isa) -> int:
    """Tokens in a panel: two vectors."""
    return 2 * isa.lanes


def scratch_nbytes(tokens: int, isa: Isa) -> int:
    """Bytes a thread needs: a dequantised strip and the sums of a strip for every panel of `tokens` tokens."""
    wide = panel_tokens(isa)
    return 4 * STRIP_ROWS * (DEPTH + -(-tokens // wide) * wide)


@kernel("pack_panel", 5)
def pack_panel(v: Any) -> Any:
    """(x, row stride in bytes, rows, columns, panels): as many panels as the rows need, missing rows as zeros."""
    wide = panel_tokens(v.isa)

    def run(x, stride, rows, columns, panels):  # type: ignore[no-untyped-def]
        for first in range(0, rows, wide):
            target = panels + 4 * first * columns
            for t in range(wide):
                if first + t < rows:
                    source = x + (first + t) * stride
                    for k in range(columns):
                        v.store(target + 4 * (k * wide + t), v.load(v.float32, source + 4 * k))
                else:
                    for k in range(columns):
                        v.store(target + 4 * (k * wide + t), np.float32(0))

    return run


@kernel("gemm", 1)
def gemm(v: Any) -> Any:
    """Block: dequantise kernel, weights, row bytes, panels, out, its row stride (bytes), T, K, first row, last row + 1, scratch.

    out[t, r] for every token and the rows asked for; out is the address of (0, 0).
    """
    slot, micro = slots(v), _micro(v)
    wide = panel_tokens(v.isa)

    def run(b):  # type: ignore[no-untyped-def]
        row_nbytes, panels, stride, tokens, columns = slot(b, 2), slot(b, 3), slot(b, 5), slot(b, 6), slot(b, 7)
        strip, stop = slot(b, 10), slot(b, 9)
        sums = strip + 4 * STRIP_ROWS * DEPTH
        many = (tokens + wide - 1) // wide
        for row in range(slot(b, 8), stop, STRIP_ROWS):
            height = min(STRIP_ROWS, stop - row)
            for k in range(0, columns, DEPTH):
                depth = min(DEPTH, columns - k)
                for i in range(height):
                    source = slot(b, 1) + (row + i) * row_nbytes + row_nbytes * k // columns
                    v.call(slot(b, 0), source, strip + 4 * i * DEPTH, depth)
                for p in range(many):
                    x = panels + 4 * wide * (p * columns + k)
                    for i in range(0, height, _ROWS):
                        micro(strip + 4 * i * DEPTH, x, depth, sums + 4 * wide * (p * STRIP_ROWS + i), k == 0)
            for t in range(tokens):
                source = sums + 4 * (t // wide * STRIP_ROWS * wide + t % wide)
                target = slot(b, 4) + t * stride + 4 * row
                for i in range(height):
                    v.store(target + 4 * i, v.load(v.float32, source + 4 * i * wide))

    return run


def _micro(v: Any) -> Any:
    """Six rows of weights times one panel over `depth` columns, added to the (6, wide) sums unless `fresh`."""
    lanes, row, wide = v.lanes, 4 * DEPTH, 4 * panel_tokens(v.isa)

    def micro(w, x, depth, sums, fresh):  # type: ignore[no-untyped-def]
        a0, a1, a2, a3, a4, a5 = (v.zero(v.f32), v.zero(v.f32), v.zero(v.f32), v.zero(v.f32), v.zero(v.f32), v.zero(v.f32))
        b0, b1, b2, b3, b4, b5 = (v.zero(v.f32), v.zero(v.f32), v.zero(v.f32), v.zero(v.f32), v.zero(v.f32), v.zero(v.f32))
        if not fresh:
            a0, b0 = v.load(v.f32, sums), v.load(v.f32, sums + 4 * lanes)
            a1, b1 = v.load(v.f32, sums + wide), v.load(v.f32, sums + wide + 4 * lanes)
            a2, b2 = v.load(v.f32, sums + 2 * wide), v.load(v.f32, sums + 2 * wide + 4 * lanes)
            a3, b3 = v.load(v.f32, sums + 3 * wide), v.load(v.f32, sums + 3 * wide + 4 * lanes)
            a4, b4 = v.load(v.f32, sums + 4 * wide), v.load(v.f32, sums + 4 * wide + 4 * lanes)
            a5, b5 = v.load(v.f32, sums + 5 * wide), v.load(v.f32, sums + 5 * wide + 4 * lanes)
        for k in range(depth):
            x0, x1 = v.load(v.f32, x + k * wide), v.load(v.f32, x + k * wide + 4 * lanes)
            at = w + 4 * k
            s = v.splat(v.f32, v.load(v.float32, at))
            a0, b0 = v.fma(s, x0, a0), v.fma(s, x1, b0)
            s = v.splat(v.f32, v.load(v.float32, at + row))
            a1, b1 = v.fma(s, x0, a1), v.fma(s, x1, b1)
            s = v.splat(v.f32, v.load(v.float32, at + 2 * row))
            a2, b2 = v.fma(s, x0, a2), v.fma(s, x1, b2)
            s = v.splat(v.f32, v.load(v.float32, at + 3 * row))
            a3, b3 = v.fma(s, x0, a3), v.fma(s, x1, b3)
            s = v.splat(v.f32, v.load(v.float32, at + 4 * row))
            a4, b4 = v.fma(s, x0, a4), v.fma(s, x1, b4)
            s = v.splat(v.f32, v.load(v.float32, at + 5 * row))
            a5, b5 = v.fma(s, x0, a5), v.fma(s, x1, b5)
        v.store(sums, a0)
        v.store(sums + 4 * lanes, b0)
        v.store(sums + wide, a1)
        v.store(sums + wide + 4 * lanes, b1)
        v.store(sums + 2 * wide, a2)
        v.store(sums + 2 * wide + 4 * lanes, b2)
        v.store(sums + 3 * wide, a3)
        v.store(sums + 3 * wide + 4 * lanes, b3)
        v.store(sums + 4 * wide, a4)
        v.store(sums + 4 * wide + 4 * lanes, b4)
        v.store(sums + 5 * wide, a5)
        v.store(sums + 5 * wide + 4 * lanes, b5)

    return v.function(micro)
