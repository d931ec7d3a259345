"""RMS norm and layer norm of rows or heads on the cpu; the contracts are `ops.Ops.rms_norm` and `layer_norm`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from localmoe.kernels.cpu.arguments import row_count, slots
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.program import Op

if TYPE_CHECKING:
    from localmoe.kernels.cpu.lower import Lowering


def _norm(v: Any, centred: bool) -> Any:
    slot, rows = slots(v), row_count(v)

    def total(source, whole, width):
        sums = v.zero(v.f32)
        for i in range(0, whole, v.lanes):
            sums = sums + v.load(v.f32, source + 4 * i)
        result = v.total(sums)
        for i in range(whole, width):
            result += v.load(v.float32, source + 4 * i)
        return result

    total = v.function(total)

    def run(a, thread, threads):
        tokens = rows(a)
        x, token_stride, head_stride, out = slot(a, 2), slot(a, 3), slot(a, 4), slot(a, 5)
        heads, width, weights, epsilon = slot(a, 6), slot(a, 7), slot(a, 8), v.load(v.float32, a + 72)
        biases, weight_stride = slot(a, 11), slot(a, 12)
        whole = width - width % v.lanes
        start, stop = tokens * heads * thread // threads, tokens * heads * (thread + 1) // threads
        if slot(a, 10) != 0:
            start, stop, out = 0, tokens * heads, out + thread * slot(a, 10)
        for row in range(start, stop):
            source = x + row // heads * token_stride + row % heads * head_stride
            target = out + row * width * 4
            weight, bias = weights + row % heads * weight_stride, biases + row % heads * weight_stride
            mean = total(source, whole, width) / np.float32(width) if centred else np.float32(0)
            squares = v.zero(v.f32)
            for i in range(0, whole, v.lanes):
                part = v.load(v.f32, source + 4 * i) - mean
                squares = v.fma(part, part, squares)
            variance = v.total(squares)
            for i in range(whole, width):
                value = v.load(v.float32, source + 4 * i) - mean
                variance += value * value
            factor = np.float32(1) / v.sqrt(variance / np.float32(width) + epsilon)
            for i in range(0, whole, v.lanes):
                y = (v.load(v.f32, source + 4 * i) - mean) * factor
                y = y * v.load(v.f32, weight + 4 * i) if weights != 0 else y
                v.store(target + 4 * i, y + v.load(v.f32, bias + 4 * i) if biases != 0 else y)
            for i in range(whole, width):
                value = (v.load(v.float32, source + 4 * i) - mean) * factor
                value = value * v.load(v.float32, weight + 4 * i) if weights != 0 else value
                v.store(target + 4 * i, value + v.load(v.float32, bias + 4 * i) if biases != 0 else value)

    return run


@kernel("rms_norm", 3)
def rms_norm(v: Any) -> Any:
    """Arguments: control, rows, x, its token and head strides (bytes), out, heads, width, weight (0: none), epsilon,
    bytes to the next thread's copy of out, which each thread fills for itself (0: they share the rows), bias (0: none),
    bytes from one head's weight to the next one's."""
    return _norm(v, centred=False)


@kernel("layer_norm", 3)
def layer_norm(v: Any) -> Any:
    """As rms_norm, with the mean taken away first."""
    return _norm(v, centred=True)


def lower_norm(lowering: Lowering, op: Op) -> None:
    (x,), (out,) = op.inputs, op.outputs
    heads, head_stride = (x.shape[1], 4 * x.strides[1]) if len(x.shape) == 3 else (1, 0)
    weight, bias = [*(lowering.floats(w) for w in op.weights), 0, 0][:2]
    apiece = 4 * x.shape[-1] if op.weights and len(op.weights[0].shape) == 2 else 0
    place = (lowering.at(x), 4 * x.strides[0], head_stride, lowering.at(out))
    sizes = (heads, x.shape[-1], weight, float(op.attributes["epsilon"]), lowering.apart(out), bias, apiece)
    lowering.emit(op.name, x, *place, *sizes)
