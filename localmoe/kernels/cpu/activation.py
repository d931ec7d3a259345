"""Element-wise ops and copies on the cpu; the contracts are in `ops.Ops`.

Buffers end on whole 64-byte lines, so flat ops work in whole vectors and may write up to the end of the last line.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from localmoe.kernels.cpu.arguments import At, Function, row_count, share, slots, soft_capped, step_position
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.cpu.matmul import dequantise_kernel
from localmoe.kernels.ops import GLU_KINDS
from localmoe.kernels.program import Op

if TYPE_CHECKING:
    from localmoe.kernels.cpu.lower import Lowering


@kernel("embed", 3)
def embed(v: Any) -> Any:
    """Arguments: control, rows, ids, out, weights, row bytes, columns, dequantise kernel."""
    slot, rows = slots(v), row_count(v)

    def run(a, thread, threads):
        tokens, ids, out, columns = rows(a), slot(a, 2), slot(a, 3), slot(a, 6)
        for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
            row = v.load(v.int32, ids + 4 * t)
            v.call(slot(a, 7), slot(a, 4), slot(a, 5), row, 0, out + 4 * t * columns, columns)

    return run


def _sigmoid(v: Any) -> Any:
    def sigmoid(x):
        one = v.splat(v.f32, np.float32(1))
        return one / (one + v.exp(-x))

    return v.function(sigmoid)


def _gelu(v: Any) -> Any:
    """x (1 + tanh(z)) / 2 is x · sigmoid(2 z)."""
    sigmoid, twice = _sigmoid(v), np.float32(2 * (2 / np.pi) ** 0.5)

    def gelu(x):
        return x * sigmoid((x + x * x * x * np.float32(0.044715)) * twice)

    return v.function(gelu)


def _gate(v: Any, kind: str) -> Any:
    """(gate, up) -> what `Ops.glu` of that kind makes of them."""
    sigmoid, gelu = _sigmoid(v), _gelu(v)

    def clamped_swish(gate, up):
        seven = v.splat(v.f32, np.float32(7))
        gate, up = v.minimum(gate, seven), v.maximum(v.minimum(up, seven), -seven)
        return gate * sigmoid(gate * np.float32(1.702)) * (up + np.float32(1))

    kinds = {
        "silu": lambda gate, up: gate * sigmoid(gate) * up,
        "sigmoid": lambda gate, up: sigmoid(gate) * up,
        "gelu": lambda gate, up: gelu(gate) * up,
        "clamped_swish": clamped_swish,
        "product": lambda gate, up: gate * up,
    }
    return v.function(kinds[kind])


def _glu(kind: str, v: Any) -> Any:
    slot, rows, part, gated = slots(v), row_count(v), share(v), _gate(v, kind)

    def run(a, thread, threads):
        tokens, gate, up, out, width = rows(a), slot(a, 2), slot(a, 3), slot(a, 4), slot(a, 5)
        if slot(a, 6) == 1:
            for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
                spread = v.splat(v.f32, v.load(v.float32, gate + 4 * t))
                whole = (t + 1) * width - width % v.lanes
                for i in range(t * width, whole, v.lanes):
                    v.store(out + 4 * i, gated(spread, v.load(v.f32, up + 4 * i)))
                for i in range(whole, (t + 1) * width):
                    v.store(out + 4 * i, v.largest(gated(spread, v.splat(v.f32, v.load(v.float32, up + 4 * i)))))
        else:
            start, stop = part(tokens * width, thread, threads)
            for at in range(4 * start, 4 * stop, 4 * v.lanes):
                v.store(out + at, gated(v.load(v.f32, gate + at), v.load(v.f32, up + at)))

    return run


for _kind in GLU_KINDS:
    # Arguments: control, rows, gate, up, out, width, 1 if the gate is one value a row.
    kernel(f"glu_{_kind}", 3)(partial(_glu, _kind))


def _each(v: Any, function: Any) -> Any:
    """Arguments: control, rows, x, out, width, a float32 for `function(x, number)`, which is applied to every
    element."""
    slot, rows, part, applied = slots(v), row_count(v), share(v), function

    def run(a, thread, threads):
        start, stop = part(rows(a) * slot(a, 4), thread, threads)
        number = v.splat(v.f32, v.load(v.float32, a + 40))
        for at in range(4 * start, 4 * stop, 4 * v.lanes):
            v.store(slot(a, 3) + at, applied(v.load(v.f32, slot(a, 2) + at), number))

    return run


@kernel("gelu", 3)
def gelu(v: Any) -> Any:
    curve = _gelu(v)
    return _each(v, v.function(lambda x, number: curve(x)))


@kernel("scale", 3)
def scale(v: Any) -> Any:
    return _each(v, v.function(lambda x, factor: x * factor))


@kernel("softcap", 3)
def softcap(v: Any) -> Any:
    return _each(v, soft_capped(v))


@kernel("add_positions", 3)
def add_positions(v: Any) -> Any:
    """Arguments: control, rows, x, out, width, weights (float32, a row for each position)."""
    slot, rows, part, position = slots(v), row_count(v), share(v), step_position(v)

    def run(a, thread, threads):
        start, stop = part(rows(a) * slot(a, 4), thread, threads)
        weights = slot(a, 5) + 4 * position(a) * slot(a, 4)
        for i in range(start, stop):
            v.store(slot(a, 3) + 4 * i, v.load(v.float32, slot(a, 2) + 4 * i) + v.load(v.float32, weights + 4 * i))

    return run


@kernel("add", 3)
def add(v: Any) -> Any:
    """Arguments: control, rows, a, b, out, width."""
    slot, rows, part = slots(v), row_count(v), share(v)

    def run(a, thread, threads):
        start, stop = part(rows(a) * slot(a, 5), thread, threads)
        for at in range(4 * start, 4 * stop, 4 * v.lanes):
            v.store(slot(a, 4) + at, v.load(v.f32, slot(a, 2) + at) + v.load(v.f32, slot(a, 3) + at))

    return run


@kernel("concat", 3)
def concat(v: Any) -> Any:
    """Arguments: control, rows, heads, out, then for each of two parts: address, token and head strides (bytes),
    width."""
    slot, rows = slots(v), row_count(v)

    def run(a, thread, threads):
        heads, width = slot(a, 2), slot(a, 7) + slot(a, 11)
        units = rows(a) * heads
        for row in range(units * thread // threads, units * (thread + 1) // threads):
            target = slot(a, 3) + 4 * row * width
            for part in range(4, 12, 4):
                source = slot(a, part) + row // heads * slot(a, part + 1) + row % heads * slot(a, part + 2)
                for i in range(slot(a, part + 3)):
                    v.store(target + 4 * i, v.load(v.float32, source + 4 * i))
                target += 4 * slot(a, part + 3)

    return run


@kernel("last_row", 3)
def last_row(v: Any) -> Any:
    """Arguments: control, rows, x, out, width."""
    slot = slots(v)

    def run(a, thread, threads):
        width = slot(a, 4)
        source = slot(a, 2) + 4 * width * (slot(slot(a, 0), 0) - 1)
        for i in range(width * thread // threads, width * (thread + 1) // threads):
            v.store(slot(a, 3) + 4 * i, v.load(v.float32, source + 4 * i))

    return run


def lower_embed(lowering: Lowering, op: Op) -> None:
    (ids,), (out,), (weight,) = op.inputs, op.outputs, op.weights
    place = (lowering.at(ids), lowering.at(out), lowering.address(weight))
    function = Function(dequantise_kernel(weight.format))
    lowering.emit("embed", ids, *place, weight.row_nbytes, weight.columns, function)


def lower_glu(lowering: Lowering, op: Op) -> None:
    (gate, up), (out,) = op.inputs, op.outputs
    place: tuple[At, ...] = (lowering.side_by_side(gate), lowering.side_by_side(up), lowering.at(out))
    width = prod(up.shape[1:])
    lowering.emit(f"glu_{op.attributes['kind']}", up, *place, width, int(gate.shape != up.shape))


def lower_each(lowering: Lowering, op: Op) -> None:
    (x,), (out,) = op.inputs, op.outputs
    number = float(op.attributes.get("factor", op.attributes.get("cap", 0.0)))
    number = number * lowering.number(op.weights[0]) if op.weights else number
    lowering.emit(op.name, x, lowering.side_by_side(x), lowering.at(out), prod(x.shape[1:]), number)


def lower_add_positions(lowering: Lowering, op: Op) -> None:
    (x,), (out,), (weight,) = op.inputs, op.outputs, op.weights
    lowering.emit("add_positions", x, lowering.side_by_side(x), lowering.at(out), x.shape[1], lowering.floats(weight))


def lower_add(lowering: Lowering, op: Op) -> None:
    (a, b), (out,) = op.inputs, op.outputs
    place = (lowering.side_by_side(a), lowering.side_by_side(b), lowering.at(out))
    lowering.emit("add", a, *place, prod(a.shape[1:]))


def lower_concat(lowering: Lowering, op: Op) -> None:
    (a, b), (out,) = op.inputs, op.outputs
    parts = [x for t in (a, b) for x in (lowering.at(t), 4 * t.strides[0], 4 * t.strides[1], t.shape[2])]
    lowering.emit("concat", a, a.shape[1], lowering.at(out), *parts)


def lower_last_row(lowering: Lowering, op: Op) -> None:
    (x,), (out,) = op.inputs, op.outputs
    lowering.emit("last_row", out, lowering.side_by_side(x), lowering.at(out), x.shape[1])
