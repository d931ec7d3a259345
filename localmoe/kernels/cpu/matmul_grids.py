"""Matrix times vector on the formats with code books of 4 or 8 values (IQ1, IQ2, IQ3), for instruction sets without
their own kernel; the contract is `matmul.py`'s. The signs go to the activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from localmoe.kernels.cpu.blocks import PREFETCH
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.cpu.grids import GRIDS, Grid


def _odd_scale(v: Any) -> Any:
    """(scale) -> 2 scale + 1 in all of i16x16."""

    def odd(scale):
        return v.splat(v.i16x16, 2 * np.int64(scale) + 1)

    return v.function(odd)


def _odd_scales(v: Any) -> Any:
    """(byte of two scales) -> 2 scale + 1, i16x16: eight times the low one, eight times the high one."""
    shifts = v.constants(v.i16x16, [0] * 8 + [4] * 8)

    def odd(both):
        scales = (v.splat(v.i16x16, np.int64(both)) >> shifts()) & 15
        return scales + scales + 1

    return v.function(odd)


def _grid_gemv(grid: Grid, v: Any) -> Callable[..., None]:
    thirty_two, odd = grid.read(v), (_odd_scales if grid.halves else _odd_scale)(v)
    nbytes, fraction, size = grid.nbytes, grid.fraction, grid.size(v)

    def products(p, j, x, total):
        values, negative, scales = thirty_two(p, j)
        y = (v.load(v.i8x32, x + 32 * j) ^ negative) - negative
        return v.dot_words(total, v.byte_pairs(values, y), odd(scales))

    products = v.function(products)

    def gemv(weights, row_nbytes, activations, out, columns, row_start, row_stop):
        sizes = activations + columns + (columns >> 4) + (columns >> 3)
        for row in range(row_start, row_stop):
            w = weights + row * row_nbytes
            total = v.zero(v.f32x8)
            for block in range(columns >> 8):
                p, x = w + block * nbytes, activations + block * 256
                for ahead in range(PREFETCH, PREFETCH + nbytes, 64):
                    v.prefetch(p + ahead)
                sums, others = v.zero(v.i32x8), v.zero(v.i32x8)
                for j in range(0, 8, 2):
                    sums, others = products(p, j, x, sums), products(p, j + 1, x, others)
                d = size(p) * v.load(v.float32, sizes + block * 4) * np.float32(fraction)
                total = v.fma(v.convert(v.f32x8, sums + others), v.splat(v.f32x8, d), total)
            v.store(out + row * 4, v.total(total))

    return gemv


for _name, _grid in GRIDS.items():
    kernel(f"gemv_{_name.lower()}", arguments=7)(partial(_grid_gemv, _grid))
