"""Ops with a recurrent state on the cpu, token after token: causal convolution and the gated delta rule.

The contracts are `ops.Ops.causal_conv` and `delta_rule`. A state's slots stand one after the other; which of them a
step reads and writes is in its control slots. A thread has some heads' channels, or 32 columns of some heads' states,
for all tokens: bits depend neither on threads nor on how tokens are cut into steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from localmoe.kernels.cpu.arguments import row_count, slots, step_position
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.program import Op, StateLayer, Tensor

if TYPE_CHECKING:
    from localmoe.kernels.cpu.lower import Lowering

PANEL = 32  # columns of a state that stand together, each row of them 128 bytes: with 128 rows they fit the first level
_PANEL_NBYTES = 4 * PANEL
SOURCE, TARGET, KEPT, KEPT_TOKENS = 2, 3, 4, 5  # control slots


@kernel("causal_conv", 3)
def causal_conv(v: Any) -> Any:
    """Arguments: control, rows, out, channels, taps, weights (a row for each tap), state, bytes of a slot, of a row,
    zeros, then for each part of the input: x, token and head strides (bytes), heads, width; a part without heads ends
    them."""
    slot, rows, position = slots(v), row_count(v), step_position(v)
    vector, leave_vector = _channels(v, v.f32)
    single, leave_single = _channels(v, v.float32)

    def leave(a, first, seen, x, stride, channel, width, slot_number):
        target = slot(a, 6) + slot_number * slot(a, 7)
        whole = width - width % v.lanes
        for i in range(0, whole, v.lanes):
            leave_vector(a, first, seen, x + 4 * i, stride, 4 * (channel + i), target)
        for i in range(whole, width):
            leave_single(a, first, seen, x + 4 * i, stride, 4 * (channel + i), target)

    leave = v.function(leave)

    def run(a, thread, threads):
        units, end, control = 0, 10, slot(a, 0)
        while slot(a, end + 3) != 0:
            units += slot(a, end + 3)
            end += 5
        first, tokens = position(a), rows(a)
        for unit in range(units * thread // threads, units * (thread + 1) // threads):
            part, head, channel = 10, unit, 0
            while head >= slot(a, part + 3):
                channel += slot(a, part + 3) * slot(a, part + 4)
                head -= slot(a, part + 3)
                part += 5
            x, stride, width = slot(a, part) + head * slot(a, part + 2), slot(a, part + 1), slot(a, part + 4)
            channel += head * width
            whole = width - width % v.lanes
            for t in range(tokens):  # outside, as inputs of one channel stand far apart
                for i in range(0, whole, v.lanes):
                    vector(a, first, t, x + 4 * i, stride, 4 * (channel + i))
                for i in range(whole, width):
                    single(a, first, t, x + 4 * i, stride, 4 * (channel + i))
            if slot(control, KEPT_TOKENS) > 0:
                leave(a, first, slot(control, KEPT_TOKENS), x, stride, channel, width, slot(control, KEPT))
            leave(a, first, tokens, x, stride, channel, width, slot(control, TARGET))

    return run


def _channels(v: Any, kind: Any) -> tuple[Any, Any]:
    """(convolve, leave): a token's output, and the state after `seen` tokens, of a vector of channels or of one;
    `place` is where they stand in a row."""
    slot = slots(v)

    def input_at(a, first, t, x, stride, place):
        """Address of input t of the step: those below 0 stand in the state, and are zeros before the first token."""
        if t >= 0:
            return x + t * stride
        source = slot(a, 6) + slot(slot(a, 0), SOURCE) * slot(a, 7)
        return slot(a, 9) if first == 0 else source + (t + slot(a, 4) - 1) * slot(a, 8) + place

    input_at = v.function(input_at)

    def leave(a, first, seen, x, stride, place, target):
        for i in range(slot(a, 4) - 1):  # in place, a row is read before it is written
            kept = v.load(kind, input_at(a, first, seen - slot(a, 4) + 1 + i, x, stride, place))
            v.store(target + i * slot(a, 8) + place, kept)

    def convolve(a, first, t, x, stride, place):
        taps, weights, row = slot(a, 4), slot(a, 5) + place, 4 * slot(a, 3)
        start = t - taps + 1
        total = v.load(kind, input_at(a, first, start, x, stride, place)) * v.load(kind, weights)
        for j in range(1, taps):
            before = v.load(kind, input_at(a, first, start + j, x, stride, place))
            total = v.fma(before, v.load(kind, weights + j * row), total)
        v.store(slot(a, 2) + t * row + place, total / (v.exp(-total) + np.float32(1)))

    return v.function(convolve), v.function(leave)


@kernel("delta_gates", 3)
def delta_gates(v: Any) -> Any:
    """Arguments: control, rows, key heads, their width, padded, heads; queries and keys made unit vectors, (T, K,
    padded) each; gates (T, H, 2), alpha and beta; query, its token and head strides (bytes); key, strides; beta, its
    token stride and that of its middle axis, its last axis; decay, strides, last axis; rate; bias."""
    slot, rows = slots(v), row_count(v)
    unit_vector, softplus = _unit_vector(v), _softplus(v)

    def run(a, thread, threads):
        keys, width, padded, heads = slot(a, 2), slot(a, 3), slot(a, 4), slot(a, 5)
        scale = np.float32(1) / v.sqrt(v.convert(v.float32, width))
        count = rows(a) * keys
        for unit in range(count * thread // threads, count * (thread + 1) // threads):
            t, head = unit // keys, unit % keys
            query = slot(a, 9) + t * slot(a, 10) + head * slot(a, 11)
            key = slot(a, 12) + t * slot(a, 13) + head * slot(a, 14)
            unit_vector(query, slot(a, 6) + 4 * unit * padded, width, padded, scale)
            unit_vector(key, slot(a, 7) + 4 * unit * padded, width, padded, np.float32(1))
        count = rows(a) * heads
        for unit in range(count * thread // threads, count * (thread + 1) // threads):
            t, head = unit // heads, unit % heads
            beta = slot(a, 15) + t * slot(a, 16) + head // slot(a, 18) * slot(a, 17) + head % slot(a, 18) * 4
            decay = slot(a, 19) + t * slot(a, 20) + head // slot(a, 22) * slot(a, 21) + head % slot(a, 22) * 4
            rate, bias = v.load(v.float32, slot(a, 23) + 4 * head), v.load(v.float32, slot(a, 24) + 4 * head)
            place = slot(a, 8) + 8 * unit
            v.store(place, v.exp(rate * softplus(v.load(v.float32, decay) + bias)))
            v.store(place + 4, np.float32(1) / (np.float32(1) + v.exp(-v.load(v.float32, beta))))

    return run


def _unit_vector(v: Any) -> Any:
    def unit_vector(source, target, width, padded, scale):
        whole = width - width % v.lanes
        squares = v.zero(v.f32)
        for i in range(0, whole, v.lanes):
            x = v.load(v.f32, source + 4 * i)
            squares = v.fma(x, x, squares)
        total = v.total(squares)
        for i in range(whole, width):
            x = v.load(v.float32, source + 4 * i)
            total += x * x
        factor = scale / v.sqrt(total + np.float32(1e-6))
        for i in range(0, whole, v.lanes):
            v.store(target + 4 * i, v.load(v.f32, source + 4 * i) * factor)
        for i in range(whole, width):
            v.store(target + 4 * i, v.load(v.float32, source + 4 * i) * factor)
        for i in range(width, padded):
            v.store(target + 4 * i, np.float32(0))

    return v.function(unit_vector)


def _softplus(v: Any) -> Any:
    """log(1 + exp(x)) to 2e-7 of its own size however small it is, since a state decays by it thousands of times."""
    half_root, coefficients = np.int64(0x3F3504F3), [np.float32(2 / n) for n in (9, 7, 5, 3, 1)]
    ninth, seventh, fifth, third, first = coefficients

    def softplus(x):
        if x > np.float32(20):
            return x
        y = v.exp(x)
        u = y + np.float32(1)
        if u == np.float32(1):
            return y
        bits = v.convert(v.int64, v.bits(v.int32, u))
        exponent = (bits - half_root) >> 23
        m = v.bits(v.float32, v.convert(v.int32, bits - (exponent << 23)))  # from sqrt(1/2) to sqrt(2)
        s = (m - np.float32(1)) / (m + np.float32(1))
        z = s * s
        series = s * (z * (z * (z * (z * ninth + seventh) + fifth) + third) + first)
        logarithm = v.convert(v.float32, exponent) * np.float32(0.6931471805599453) + series
        return logarithm * (y / (u - np.float32(1)))  # what rounding took from 1 + y; Goldberg 1991, theorem 4

    return v.function(softplus)


@kernel("delta_rule", 3)
def delta_rule(v: Any) -> Any:
    """Arguments: control, rows, queries, keys, gates (as `delta_gates` leaves them), key heads, padded width of a key,
    value, its token and head strides (bytes), heads, width, 1 if tiled, out, state, bytes of a slot."""
    slot, rows, position = slots(v), row_count(v), step_position(v)
    columns, room = _columns(v), v.stack(2 * _PANEL_NBYTES)

    def run(a, thread, threads):
        keys, padded, heads, width = slot(a, 5), slot(a, 6), slot(a, 10), slot(a, 11)
        control, states, slot_nbytes = slot(a, 0), slot(a, 14), slot(a, 15)
        tokens, panels, nbytes = rows(a), (width + PANEL - 1) // PANEL, padded * _PANEL_NBYTES
        spare = room()
        for unit in range(heads * panels * thread // threads, heads * panels * (thread + 1) // threads):
            head, start = unit // panels, unit % panels * PANEL
            key, many = head % keys if slot(a, 12) == 1 else head // (heads // keys), min(PANEL, width - start)
            before = states + slot(control, SOURCE) * slot_nbytes + unit * nbytes
            state = states + slot(control, TARGET) * slot_nbytes + unit * nbytes
            kept = states + slot(control, KEPT) * slot_nbytes + unit * nbytes
            if position(a) == 0:
                before = state
                for i in range(0, nbytes, 4 * v.lanes):
                    v.store(state + i, v.zero(v.f32))
            for t in range(tokens):
                at = 4 * (t * keys + key) * padded
                value = slot(a, 7) + t * slot(a, 8) + head * slot(a, 9) + 4 * start
                out = slot(a, 13) + 4 * ((t * heads + head) * width + start)
                gates = slot(a, 4) + 8 * (t * heads + head)
                if many == PANEL:
                    columns(before, state, slot(a, 2) + at, slot(a, 3) + at, padded, gates, value, out)
                else:
                    for i in range(PANEL):
                        v.store(spare + 4 * i, v.load(v.float32, value + 4 * i) if i < many else np.float32(0))
                    made = spare + _PANEL_NBYTES
                    columns(before, state, slot(a, 2) + at, slot(a, 3) + at, padded, gates, spare, made)
                    for i in range(many):
                        v.store(out + 4 * i, v.load(v.float32, made + 4 * i))
                before = state
                if t + 1 == slot(control, KEPT_TOKENS):
                    for i in range(0, nbytes, 4 * v.lanes):
                        v.store(kept + i, v.load(v.f32, state + i))

    return run


def _columns(v: Any) -> Any:
    """A panel's state one token further, from `before` to `state`: two vectors of columns at a time, four rows of them
    at once, so that sums need not wait for each other."""
    wide = 4 * v.lanes

    def columns(before, state, query, key, padded, gates, value, out):
        alpha, beta = v.load(v.float32, gates), v.load(v.float32, gates + 4)
        for at in range(0, _PANEL_NBYTES, 2 * wide):
            a0, a1, b0, b1 = v.zero(v.f32), v.zero(v.f32), v.zero(v.f32), v.zero(v.f32)
            c0, c1, d0, d1 = v.zero(v.f32), v.zero(v.f32), v.zero(v.f32), v.zero(v.f32)
            for i in range(0, padded, 4):
                row, k = before + i * _PANEL_NBYTES + at, key + 4 * i
                x = v.splat(v.f32, v.load(v.float32, k))
                a0, a1 = v.fma(v.load(v.f32, row), x, a0), v.fma(v.load(v.f32, row + wide), x, a1)
                row, x = row + _PANEL_NBYTES, v.splat(v.f32, v.load(v.float32, k + 4))
                b0, b1 = v.fma(v.load(v.f32, row), x, b0), v.fma(v.load(v.f32, row + wide), x, b1)
                row, x = row + _PANEL_NBYTES, v.splat(v.f32, v.load(v.float32, k + 8))
                c0, c1 = v.fma(v.load(v.f32, row), x, c0), v.fma(v.load(v.f32, row + wide), x, c1)
                row, x = row + _PANEL_NBYTES, v.splat(v.f32, v.load(v.float32, k + 12))
                d0, d1 = v.fma(v.load(v.f32, row), x, d0), v.fma(v.load(v.f32, row + wide), x, d1)
            e0 = (v.load(v.f32, value + at) - ((a0 + b0) + (c0 + d0)) * alpha) * beta
            e1 = (v.load(v.f32, value + at + wide) - ((a1 + b1) + (c1 + d1)) * alpha) * beta
            a0, a1, b0, b1 = v.zero(v.f32), v.zero(v.f32), v.zero(v.f32), v.zero(v.f32)
            for i in range(0, padded, 2):
                old, new = before + i * _PANEL_NBYTES + at, state + i * _PANEL_NBYTES + at
                x, y = v.splat(v.f32, v.load(v.float32, key + 4 * i)), v.splat(v.f32, v.load(v.float32, query + 4 * i))
                s0 = v.fma(e0, x, v.load(v.f32, old) * alpha)
                s1 = v.fma(e1, x, v.load(v.f32, old + wide) * alpha)
                v.store(new, s0)
                v.store(new + wide, s1)
                a0, a1 = v.fma(s0, y, a0), v.fma(s1, y, a1)
                old, new = old + _PANEL_NBYTES, new + _PANEL_NBYTES
                x = v.splat(v.f32, v.load(v.float32, key + 4 * i + 4))
                y = v.splat(v.f32, v.load(v.float32, query + 4 * i + 4))
                s0 = v.fma(e0, x, v.load(v.f32, old) * alpha)
                s1 = v.fma(e1, x, v.load(v.f32, old + wide) * alpha)
                v.store(new, s0)
                v.store(new + wide, s1)
                b0, b1 = v.fma(s0, y, b0), v.fma(s1, y, b1)
            v.store(out + at, a0 + b0)
            v.store(out + at + wide, a1 + b1)

    return v.function(columns)


def lower_causal_conv(lowering: Lowering, op: Op) -> None:
    (out,), (weight,), state = op.outputs, op.weights, op.attributes["state"]
    lowering.kept.append(np.zeros(16, np.float32))
    zeros = lowering.kept[-1].ctypes.data
    parts = [n for x in op.inputs for n in (*place(lowering, x), x.shape[1], x.shape[2])]
    sizes = (out.shape[1], weight.columns, lowering.floats(weight, turned=True))
    states = (*slots_of(lowering, state), 4 * state.padded[2], zeros)
    lowering.emit("causal_conv", out, lowering.at(out), *sizes, *states, *parts, 0, 0, 0, 0, 0)


def lower_delta_rule(lowering: Lowering, op: Op) -> None:
    (query, key, value, beta, decay), (out,), (rate, bias) = op.inputs, op.outputs, op.weights
    state: StateLayer = op.attributes["state"]
    tokens, keys, heads, padded = key.shape[0], key.shape[1], value.shape[1], state.padded[1]
    made = [lowering.temporary(4 * tokens * n) for n in (keys * padded, keys * padded, 2 * heads)]
    inputs = (*place(lowering, query), *place(lowering, key))
    gates = [n for x in (beta, decay) for n in (*place(lowering, x), x.shape[2])]
    weights = (lowering.floats(rate), lowering.floats(bias))
    lowering.emit("delta_gates", key, keys, key.shape[2], padded, heads, *made, *inputs, *gates, *weights)
    tiled = int(op.attributes["tiled"])
    values = (*place(lowering, value), heads, value.shape[2], tiled, lowering.at(out))
    lowering.emit("delta_rule", value, *made, keys, padded, *values, *slots_of(lowering, state))


def place(lowering: Lowering, x: Tensor) -> tuple[Any, int, int]:
    """Where the heads of x stand, with their strides in bytes."""
    return lowering.at(x), 4 * x.strides[0], 4 * x.strides[1]


def slots_of(lowering: Lowering, state: StateLayer) -> tuple[int, int]:
    """Address of a state's first slot, and bytes from one slot to the next."""
    return lowering.device.state(state, lowering.program.state_slots).ctypes.data, state.nbytes
