"""Rotary embedding on the cpu, from a table of cos and sin for every position; the contract is `ops.Ops.rope`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from localmoe.kernels.cpu.arguments import row_count, slots, step_position
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.program import Op, RopeTable

if TYPE_CHECKING:
    from localmoe.kernels.cpu.lower import Lowering


@kernel("rope", 3)
def rope(v: Any) -> Any:
    """Arguments: control, rows, x, token and head strides (bytes), out, heads, width, table, n, step and partner of a
    pair."""
    slot, rows, position = slots(v), row_count(v), step_position(v)

    def run(a, thread, threads):
        x, token_stride, head_stride, out = slot(a, 2), slot(a, 3), slot(a, 4), slot(a, 5)
        heads, width, table, n = slot(a, 6), slot(a, 7), slot(a, 8), slot(a, 9)
        step, partner = 4 * slot(a, 10), 4 * slot(a, 11)  # pairs: (2i, 2i + 1); halves: (i, i + n)
        units, first_position = rows(a) * heads, position(a)
        for row in range(units * thread // threads, units * (thread + 1) // threads):
            source = x + row // heads * token_stride + row % heads * head_stride
            target = out + row * width * 4
            angles = table + (first_position + row // heads) * n * 8
            for i in range(n):
                cos, sin = v.load(v.float32, angles + 8 * i), v.load(v.float32, angles + 8 * i + 4)
                first, second = v.load(v.float32, source + i * step), v.load(v.float32, source + i * step + partner)
                v.store(target + i * step, first * cos - second * sin)
                v.store(target + i * step + partner, second * cos + first * sin)
            for i in range(2 * n, width):
                v.store(target + 4 * i, v.load(v.float32, source + 4 * i))

    return run


def lower_rope(lowering: Lowering, op: Op) -> None:
    (x,), (out,) = op.inputs, op.outputs
    table: RopeTable = op.attributes["table"]
    n = table.inverse_frequencies.size
    step, partner = (2, 1) if table.layout == "pairs" else (1, n)
    angles = lowering.device.rope_table(table)
    place = (lowering.at(x), 4 * x.strides[0], 4 * x.strides[1], lowering.at(out))
    lowering.emit("rope", x, *place, x.shape[1], x.shape[2], angles.ctypes.data, n, step, partner)
