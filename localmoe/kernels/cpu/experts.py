"""Experts on the cpu; the contract is `ops.Ops.experts`.

One token: its experts' rows are one parallel region. A chunk: tokens are sorted by expert, each expert's GEMM runs
over its own tokens, and every token adds up its shares in the order of its ids, so that results do not depend on what
else is in the chunk.

What multiplies weights does so for a list, (count, then choices of one token or experts of a chunk). Where all experts
are in memory it lists them all; else these entries, a wave, are run several times, each time for those that have come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from localmoe.formats import Weight
from localmoe.kernels.cpu import products
from localmoe.kernels.cpu.arguments import Argument, At, Function, row_count, share, slots
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.cpu.linear import for_itself
from localmoe.kernels.cpu.matmul import gemv_kernel
from localmoe.kernels.cpu.waves import COUNTERS, Wave
from localmoe.kernels.program import Op, Tensor

if TYPE_CHECKING:
    from localmoe.kernels.cpu.lower import Lowering

EXPERT_ROWS = 384  # of one expert's weight that a thread takes at a time: whole strips of every GEMM


@kernel("experts_gemv", 3)
def experts_gemv(v: Any) -> Any:
    """One token: rows of its experts' weights. Arguments: control, rows, ids, list of choices, count, then for each
    weight: matrix-vector kernel, table of experts, row bytes, activations, their bytes from one expert to the next and
    from one thread's copy to the next, out, columns, rows, biases of all experts (0: none)."""
    slot, part = slots(v), share(v)

    def run(a, thread, threads):
        listed = slot(a, 3)
        for w in range(a + 40, a + 40 + 80 * slot(a, 4), 80):
            height = slot(w, 8)
            start, stop = part(height * slot(listed, 0), thread, threads)
            for i in range(start // height, (stop + height - 1) // height):
                c = slot(listed, 1 + i)
                expert = v.load(v.int32, slot(a, 2) + 4 * c)
                matrix = slot(slot(w, 1), expert)
                x, out = slot(w, 3) + c * slot(w, 4) + thread * slot(w, 5), slot(w, 6) + 4 * c * height
                first, last = max(start - i * height, 0), min(stop - i * height, height)
                v.call(slot(w, 0), matrix, slot(w, 2), x, out, slot(w, 7), first, last)
                if slot(w, 9) != 0:
                    bias = slot(w, 9) + 4 * expert * height
                    for k in range(4 * first, 4 * last, 4):
                        v.store(out + k, v.load(v.float32, out + k) + v.load(v.float32, bias + k))

    return run


@kernel("experts_group", 3)
def experts_group(v: Any) -> Any:
    """Sort a chunk's choices by expert (the first thread alone). Arguments: control, rows, ids, used, experts, places
    (choice -> row in the sorted order), starts (experts + 1 first rows), counters to clear, how many."""
    slot, rows = slots(v), row_count(v)

    def run(a, thread, threads):
        if thread > 0:
            return
        ids, count, places, starts = slot(a, 2), slot(a, 4), slot(a, 5), slot(a, 6)
        choices = rows(a) * slot(a, 3)
        for i in range(slot(a, 8)):
            v.store(slot(a, 7) + 8 * i, 0)
        for e in range(count + 1):
            v.store(starts + 8 * e, 0)
        for i in range(choices):
            e = v.load(v.int32, ids + 4 * i) + 1
            v.store(starts + 8 * e, slot(starts, e) + 1)
        for e in range(count):
            v.store(starts + 8 * (e + 1), slot(starts, e) + slot(starts, e + 1))
        for i in range(choices):  # starts move on while places are given, and back again below
            e = v.load(v.int32, ids + 4 * i)
            v.store(places + 8 * i, slot(starts, e))
            v.store(starts + 8 * e, slot(starts, e) + 1)
        for e in range(count, 0, -1):
            v.store(starts + 8 * e, slot(starts, e - 1))
        v.store(starts, 0)

    return run


@kernel("experts_gather", 3)
def experts_gather(v: Any) -> Any:
    """Copy each choice's row of x to its place. Arguments: control, rows, x, its row stride (bytes), used, places,
    out, columns."""
    slot, rows = slots(v), row_count(v)

    def run(a, thread, threads):
        used, columns = slot(a, 4), slot(a, 7)
        choices = rows(a) * used
        for i in range(choices * thread // threads, choices * (thread + 1) // threads):
            source, target = slot(a, 2) + i // used * slot(a, 3), slot(a, 6) + 4 * slot(slot(a, 5), i) * columns
            for k in range(0, 4 * columns, 4):
                v.store(target + k, v.load(v.float32, source + k))

    return run


@kernel("experts_pack", 3)
def experts_pack(v: Any) -> Any:
    """Each expert's rows into its panels. Arguments: control, rows, x (sorted), columns, starts, list of experts,
    panels, packing kernel, tokens of a panel, its bytes, counter.

    An expert's panels begin behind as many as all earlier rows fill, and one more for each earlier expert: room enough
    without knowing how full theirs are.
    """
    slot = slots(v)

    def run(a, thread, threads):
        columns, starts = slot(a, 3), slot(a, 4)
        while True:
            unit = v.atomic_add(slot(a, 10), 1)
            if unit >= slot(slot(a, 5), 0):
                return
            e = slot(slot(a, 5), 1 + unit)
            first, count = slot(starts, e), slot(starts, e + 1) - slot(starts, e)
            if count > 0:
                target = slot(a, 6) + (first // slot(a, 8) + e) * slot(a, 9)
                v.call(slot(a, 7), slot(a, 2) + 4 * first * columns, 4 * columns, count, columns, target)

    return run


@kernel("experts_gemm", 3)
def experts_gemm(v: Any) -> Any:
    """Each expert's weight times its packed rows; threads take (weight, expert, rows) as they come. Arguments:
    control, rows, columns, starts, list of experts, scratch, its bytes a thread, counter, rows of a weight, count, then
    for each weight: GEMM kernel, unpacking kernel, table of experts, row bytes, panels, tokens of a panel, its bytes,
    out (sorted rows), biases of all experts (0: none)."""
    slot = slots(v)
    block = v.stack(8 * products.ARGUMENTS)

    def run(a, thread, threads):
        columns, starts, listed, height, b = slot(a, 2), slot(a, 3), slot(a, 4), slot(a, 8), block()
        count = slot(listed, 0)
        pieces = (height + EXPERT_ROWS - 1) // EXPERT_ROWS
        while True:
            unit = v.atomic_add(slot(a, 7), 1)
            if unit >= slot(a, 9) * count * pieces:
                return
            w, piece = a + 80 + 72 * (unit // (count * pieces)), unit % pieces
            e = slot(listed, 1 + unit // pieces % count)
            first, tokens = slot(starts, e), slot(starts, e + 1) - slot(starts, e)
            if tokens > 0:
                v.store(b, slot(w, 1))
                v.store(b + 8, slot(slot(w, 2), e))
                v.store(b + 16, slot(w, 3))
                v.store(b + 24, slot(w, 4) + (first // slot(w, 5) + e) * slot(w, 6))
                v.store(b + 32, slot(w, 7) + 4 * first * height)
                v.store(b + 40, 4 * height)
                v.store(b + 48, tokens)
                v.store(b + 56, columns)
                v.store(b + 64, piece * EXPERT_ROWS)
                v.store(b + 72, min(height, (piece + 1) * EXPERT_ROWS))
                v.store(b + 80, slot(a, 5) + thread * slot(a, 6))
                v.call(slot(w, 0), b)
                if slot(w, 8) != 0:
                    begin, end = 4 * piece * EXPERT_ROWS, 4 * min(height, (piece + 1) * EXPERT_ROWS)
                    bias, out = slot(w, 8) + 4 * e * height, slot(w, 7) + 4 * first * height
                    for t in range(tokens):
                        for i in range(begin, end, 4):
                            place = out + 4 * t * height + i
                            v.store(place, v.load(v.float32, place) + v.load(v.float32, bias + i))

    return run


@kernel("experts_rows", 3)
def experts_rows(v: Any) -> Any:
    """`glu` over the rows of listed experts. Arguments: control, rows, list of experts, starts, glu kernel, gate, up,
    out (all sorted), width. Behind an expert's last row it may write the next ones' first values, as they will be."""
    slot = slots(v)
    block = v.stack(8 * 7)

    def run(a, thread, threads):
        b, width, listed = block(), slot(a, 8), slot(a, 2)
        v.store(b, slot(a, 0))
        v.store(b + 40, width)
        v.store(b + 48, 0)
        for i in range(slot(listed, 0)):
            e = slot(listed, 1 + i)
            first, count = slot(slot(a, 3), e), slot(slot(a, 3), e + 1) - slot(slot(a, 3), e)
            if count > 0:
                v.store(b + 8, count)
                for k in range(5, 8):
                    v.store(b + 8 * (k - 3), slot(a, k) + 4 * first * width)
                v.call(slot(a, 4), b, thread, threads)

    return run


@kernel("experts_combine", 3)
def experts_combine(v: Any) -> Any:
    """out = Σ share · y over a token's choices, in order. Arguments: control, rows, y, shares (0: all 1), used, places
    (0: choice order), out, columns."""
    slot, rows, part = slots(v), row_count(v), share(v)

    def weight(shares, c):
        return v.load(v.float32, shares + 4 * c) if shares != 0 else np.float32(1)

    weight = v.function(weight)

    def run(a, thread, threads):
        tokens, used, columns, places = rows(a), slot(a, 4), slot(a, 7), slot(a, 5)
        start, stop = part(columns, thread, threads)  # of each token's columns
        whole = stop - (stop - start) % v.lanes
        for t in range(tokens):
            out = slot(a, 6) + 4 * t * columns
            for i in range(start, whole, v.lanes):
                total = v.zero(v.f32)
                for c in range(t * used, (t + 1) * used):
                    y = slot(a, 2) + 4 * ((slot(places, c) if places != 0 else c) * columns + i)
                    share_of_it = v.splat(v.f32, weight(slot(a, 3), c))
                    total = total + share_of_it * v.load(v.f32, y)
                v.store(out + 4 * i, total)
            for i in range(whole, stop):
                one = np.float32(0)
                for c in range(t * used, (t + 1) * used):
                    y = slot(a, 2) + 4 * ((slot(places, c) if places != 0 else c) * columns + i)
                    one += weight(slot(a, 3), c) * v.load(v.float32, y)
                v.store(out + 4 * i, one)

    return run


def lower_experts(lowering: Lowering, op: Op) -> None:
    if op.inputs[0].shape[0] == 1:
        _lower_one(lowering, op)
    else:
        _lower_chunk(lowering, op)


def _biases(lowering: Lowering, op: Op) -> list[int]:
    """Addresses of the biases of gate, up and down, 0 where there are none."""
    return [lowering.floats(bias) for bias in op.weights[3:]] or [0, 0, 0]


def _weights(lowering: Lowering, op: Op) -> Argument:
    return lowering.at(op.inputs[2]) if op.attributes["weighted"] else 0


def _lower_one(lowering: Lowering, op: Op) -> None:
    (x, ids), (out,), (gate, up, down) = op.inputs[:2], op.outputs, op.weights[:3]
    used, width, biases = ids.shape[1], gate.rows, _biases(lowering, op)
    opened = [lowering.scratch((used, width)) for _ in range(2)]
    kinds = dict.fromkeys(gemv_kernel(w.format)[1] for w in (gate, up))
    forms = {kind: for_itself(lowering, x, kind)[:2] for kind in kinds}
    wave = Wave(lowering, op, used)
    arguments: list[Any] = []
    for weight, target, bias, table in zip((gate, up), opened, biases, wave.tables, strict=False):
        name, kind = gemv_kernel(weight.format)
        form, apart = forms[kind]
        place = (Function(name), table, weight.row_nbytes, form, 0, apart, lowering.at(target))
        arguments += [*place, weight.columns, weight.rows, bias]
    lowering.emit("experts_gemv", x, lowering.at(ids), wave.listed, 2, *arguments)
    if lowering.residency:  # a wave's rows are shared out otherwise than all rows, which `glu` takes
        lowering.barrier()
    hidden, closed = lowering.scratch((1, used * width)).heads(used), lowering.scratch((used, down.rows))
    flow = (lowering.at(opened[0]), lowering.at(opened[1]), lowering.at(hidden))
    lowering.emit(f"glu_{op.attributes['kind']}", x, *flow, width * used, 0)
    lowering.barrier()
    name, kind = gemv_kernel(down.format)
    closing, apart, stride = for_itself(lowering, hidden, kind)
    last = (Function(name), wave.tables[2], down.row_nbytes, closing, stride, apart, lowering.at(closed))
    lowering.emit("experts_gemv", x, lowering.at(ids), wave.listed, 1, *last, down.columns, down.rows, biases[2])
    lowering.barrier()
    wave.end()
    total = (lowering.at(closed), _weights(lowering, op), used, 0, lowering.at(out), down.rows)
    lowering.emit("experts_combine", x, *total)


def _lower_chunk(lowering: Lowering, op: Op) -> None:
    (x, ids), (out,), (gate, up, down) = op.inputs[:2], op.outputs, op.weights[:3]
    biases = _biases(lowering, op)
    used, count, width, isa = ids.shape[1], gate.shape[0], gate.rows, lowering.isa
    choices = x.shape[0] * used
    how = {w.format.name: products.product(w.format, isa) for w in (gate, up, down)}
    places, starts = lowering.temporary(8 * choices), lowering.temporary(8 * (count + 1))
    counters = [lowering.temporary(8 * COUNTERS)]
    counters += [At(counters[0].offset + 8 * i) for i in range(1, COUNTERS)]
    cleared = counters[0]
    columns = max(x.shape[1], width)
    scratch_nbytes = max(products.scratch_nbytes(p.form, isa, x.shape[0], columns) for p in how.values())
    scratch = lowering.temporary(scratch_nbytes * lowering.threads)

    def pack(source: Tensor, weights: Sequence[Weight], listed: int) -> dict[str, tuple[At, int, int]]:
        panels: dict[str, tuple[At, int, int]] = {}
        for form in dict.fromkeys(how[w.format.name].form for w in weights):
            wide, nbytes = products.panel_tokens(form, isa), products.panel_nbytes(form, isa, source.shape[1])
            room = lowering.temporary(nbytes * (choices // wide + count))
            panels[form] = (room, wide, nbytes)
            packing = (room, Function(products.packing_kernel(form)), wide, nbytes, counters.pop())
            lowering.emit("experts_pack", x, lowering.at(source), source.shape[1], starts, listed, *packing)
        return panels

    def multiply(panels: dict[str, tuple[At, int, int]], parts: slice, targets: list[Tensor]) -> None:
        weights, each = op.weights[parts], list[Argument]()
        for w, table, target, bias in zip(weights, wave.tables[parts], targets, biases[parts], strict=True):
            kernels = how[w.format.name]
            each += [Function(kernels.gemm), Function(kernels.unpack), table, w.row_nbytes]
            each += [*panels[kernels.form], lowering.at(target), bias]
        shared = (scratch, scratch_nbytes, counters.pop(), weights[0].rows, len(weights))
        lowering.emit("experts_gemm", x, weights[0].columns, starts, wave.listed, *shared, *each)

    order = (places, starts, cleared, COUNTERS)
    lowering.emit("experts_group", x, lowering.at(ids), used, count, *order)
    gathered = lowering.scratch((choices, x.shape[1]))
    row = (lowering.at(x), 4 * x.strides[0], used, places, lowering.at(gathered), x.shape[1])
    lowering.emit("experts_gather", x, *row)
    opened = [lowering.scratch((choices, width)) for _ in range(2)]
    hidden, closed = lowering.scratch((choices, width)), lowering.scratch((choices, down.rows))
    panels = pack(gathered, (gate, up), lowering.table([count, *range(count)]))
    wave = Wave(lowering, op, count, cleared)
    multiply(panels, slice(0, 2), opened)
    flow = (lowering.at(opened[0]), lowering.at(opened[1]), lowering.at(hidden), width)
    glu = Function(f"glu_{op.attributes['kind']}")
    lowering.emit("experts_rows", x, wave.listed, starts, glu, *flow)
    multiply(pack(hidden, (down,), wave.listed), slice(2, 3), [closed])
    wave.end()
    total = (lowering.at(closed), _weights(lowering, op), used, places, lowering.at(out), down.rows)
    lowering.emit("experts_combine", x, *total)
