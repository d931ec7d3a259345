"""RMS norm of rows or heads on the cpu; the contract is `ops.Ops.rms_norm`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from localmoe.kernels.cpu.arguments import row_count, slots
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.program import Op

if TYPE_CHECKING:
    from localmoe.kernels.cpu.lower import Lowering


@kernel("rms_norm", 3)
def rms_norm(v: Any) -> Any:
    """Arguments: control, rows, x, its token and head strides (bytes), out, heads, width, weight (0: none), epsilon,
    bytes to the next thread's copy of out, which each thread fills for itself (0: they share the rows)."""
    slot, rows = slots(v), row_count(v)

    def run(a, thread, threads):
        tokens = rows(a)
        x, token_stride, head_stride, out = slot(a, 2), slot(a, 3), slot(a, 4), slot(a, 5)
        heads, width, weight, epsilon = slot(a, 6), slot(a, 7), slot(a, 8), v.load(v.float32, a + 72)
        whole = width - width % v.lanes
        start, stop = tokens * heads * thread // threads, tokens * heads * (thread + 1) // threads
        if slot(a, 10) != 0:
            start, stop, out = 0, tokens * heads, out + thread * slot(a, 10)
        for row in range(start, stop):
            source = x + row // heads * token_stride + row % heads * head_stride
            target = out + row * width * 4
            squares = v.zero(v.f32)
            for i in range(0, whole, v.lanes):
                part = v.load(v.f32, source + 4 * i)
                squares = v.fma(part, part, squares)
            total = v.total(squares)
            for i in range(whole, width):
                value = v.load(v.float32, source + 4 * i)
                total += value * value
            factor = np.float32(1) / v.sqrt(total / np.float32(width) + epsilon)
            for i in range(0, whole, v.lanes):
                y = v.load(v.f32, source + 4 * i) * factor
                v.store(target + 4 * i, y * v.load(v.f32, weight + 4 * i) if weight != 0 else y)
            for i in range(whole, width):
                value = v.load(v.float32, source + 4 * i) * factor
                v.store(target + 4 * i, value * v.load(v.float32, weight + 4 * i) if weight != 0 else value)

    return run


def lower_rms_norm(lowering: Lowering, op: Op) -> None:
    (x,), (out,) = op.inputs, op.outputs
    heads, head_stride = (x.shape[1], 4 * x.strides[1]) if len(x.shape) == 3 else (1, 0)
    weight = lowering.floats(op.weights[0]) if op.weights else 0
    place = (lowering.at(x), 4 * x.strides[0], head_stride, lowering.at(out))
    epsilon = float(op.attributes["epsilon"])
    lowering.emit("rms_norm", x, *place, heads, x.shape[-1], weight, epsilon, lowering.apart(out))
