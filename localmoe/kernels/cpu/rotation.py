"""Walsh-Hadamard transforms of rows on the cpu, to the bits of `kernels/cache_blocks.turned`; knows no cache and no op.

Imports numba where a kernel is compiled, and only there.
"""

from __future__ import annotations

from typing import Any

from localmoe.kernels.cache_blocks import BLOCK


def row_turner(v: Any) -> Any:
    """`turn(row, columns, factor)` in a kernel: float32[columns] in place."""
    from localmoe.kernels.cpu import vector_rows

    transformed = vector_rows.transformed(v.isa, BLOCK)

    def turn(row, columns, factor):
        for i in range(0, columns, BLOCK):
            transformed(row + 4 * i, factor)

    return v.function(turn)


def column_turner(v: Any) -> Any:
    """`turn(panel, columns, factor)` in a kernel: float32[columns][two vectors] in place, down the columns."""
    width, nbytes = 2 * v.lanes, 4 * v.lanes

    def turn(panel, columns, factor):
        for i in range(0, width * columns, v.lanes):
            v.store(panel + 4 * i, v.load(v.f32, panel + 4 * i) * factor)
        step = 1
        while step < BLOCK:
            for start in range(0, columns, 2 * step):
                for i in range(2 * start, 2 * (start + step)):
                    p, q = panel + nbytes * i, panel + nbytes * (i + 2 * step)
                    a, b = v.load(v.f32, p), v.load(v.f32, q)
                    v.store(p, a + b)
                    v.store(q, a - b)
            step *= 2

    return v.function(turn)
