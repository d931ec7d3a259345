"""Rows of the formats with code books of 4 or 8 values (IQ1, IQ2, IQ3) as bytes and scales; contract as `unpack.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from localmoe.kernels.cpu.grids import GRIDS, Grid
from localmoe.kernels.cpu.unpack import offset, unpacks


def _grid_block(grid: Grid, v: Any) -> Any:
    thirty_two, added, halves, fraction = grid.read(v), offset(v.isa), grid.halves, np.float32(grid.fraction)
    size = grid.size(v)

    def odd(scale):
        return np.float32(2 * np.int64(scale) + 1)

    odd = v.function(odd)

    def block(p, quants, scales, lows):
        d = size(p) * fraction
        for j in range(8):
            values, negative, scale = thirty_two(p, j)
            negative = v.bits(v.u8x32, negative)
            v.store(quants + 32 * j, ((values ^ negative) - negative) + added)
            if halves:
                v.store(scales + 8 * j, d * odd(scale & 15))
                v.store(scales + 8 * j + 4, d * odd(scale >> 4))
            else:
                v.store(scales + 4 * j, d * odd(scale))

    return block


for _name, _grid in GRIDS.items():
    unpacks(_name, "q8_256", 16 if _grid.halves else 32)(partial(_grid_block, _grid))
