"""Vector operations on rows of numbers, for attention: queries times keys, the exp of a softmax, weighted sums of rows.

Rows are F32, F16, Q8_0 or Q4_0, which only `_columns` and `_scale` tell apart. Imports numba: to be imported only where
something must be compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from localmoe.formats import Format
from localmoe.kernels.cache_blocks import SCALE_NBYTES
from localmoe.kernels.cpu.isa import Isa
from localmoe.kernels.cpu.vector import F32, I32, I64, Lowering, call, operation, shuffled, spread
from localmoe.kernels.cpu.vector_maths import fused
from localmoe.kernels.cpu.vector_memory import fetch, half_to_float, number, pointer, prefetched

I8, I16 = ir.IntType(8), ir.IntType(16)
LINE = 64
Defined = tuple[types.Type, Lowering] | None


def _place(b: ir.IRBuilder, start: ir.Value, index: ir.Value, nbytes: int) -> ir.Value:
    return pointer(b, b.add(start, b.mul(index, I64(nbytes))), I8)


def _vector(b: ir.IRBuilder, place: ir.Value, offset: int, of: ir.Type) -> ir.Value:
    # A constant offset from one pointer: as sums of integers, each address would get a register of its own.
    return b.load(b.gep(place, [I64(offset)], source_etype=I8), align=1, typ=of)


def span(isa: Isa, format: Format) -> int:
    """Columns of a row that are read in one turn: whole vectors, and whole blocks."""
    return max(isa.lanes, format.elements)


def _columns(b: ir.IRBuilder, isa: Isa, place: ir.Value, format: Format, column: int) -> ir.Value:
    """A vector of float32 from a column of whole blocks at `place`; the block's scale, if it has one, is left out."""
    block, inside = divmod(column, format.elements)
    offset = block * format.nbytes
    if format.name == "F32":
        return _vector(b, place, offset, ir.VectorType(F32, isa.lanes))
    if format.name == "F16":
        return half_to_float(b, isa, _vector(b, place, offset, ir.VectorType(I16, isa.lanes)))
    if format.name == "Q4_0":
        return _nibbles(b, isa, place, offset + SCALE_NBYTES, inside)
    quants = _vector(b, place, offset + SCALE_NBYTES + inside, ir.VectorType(I8, isa.lanes))
    return b.sitofp(quants, ir.VectorType(F32, isa.lanes))


def _nibbles(b: ir.IRBuilder, isa: Isa, place: ir.Value, offset: int, column: int) -> ir.Value:
    """The float32 of four bits each, -8 to 7, from a column of 32: the first 16 are low halves of bytes."""
    high, first = divmod(column, 16)
    floats, packed = ir.VectorType(F32, isa.lanes), _vector(b, place, offset + first, ir.VectorType(I8, isa.lanes))
    if isa.name == "avx512":  # looked up: of an index only four bits count
        wide = b.zext(packed, ir.VectorType(I32, 16))
        values = ir.Constant(floats, [ir.Constant(F32, float(x)) for x in range(-8, 8)])
        index = b.lshr(wide, number(wide.type, 4)) if high else wide
        return call(b, "llvm.x86.avx512.permvar.sf.512", floats, values, index)
    four = b.lshr(packed, number(packed.type, 4)) if high else b.and_(packed, number(packed.type, 15))
    return b.sitofp(b.sub(four, number(packed.type, 8)), floats)


def _scale(b: ir.IRBuilder, isa: Isa, place: ir.Value, format: Format, column: int) -> ir.Value | None:
    """The float16 scale of the block of a column, in every lane of float32; None where values stand for themselves."""
    if format.elements == 1:
        return None
    bits = _vector(b, place, column // format.elements * format.nbytes, I16)
    return spread(b, half_to_float(b, isa, bits), isa.lanes)


def _prefetch(b: ir.IRBuilder, isa: Isa, place: ir.Value, ahead: ir.Value, nbytes: int) -> None:
    """Ask for `nbytes` of lines, `ahead` bytes behind a pointer."""
    for line in range(0, max(nbytes, LINE), LINE):
        address = b.gep(b.gep(place, [ahead], source_etype=I8), [I64(line)], source_etype=I8)
        prefetched(b, address, isa.stream_level)


def _lane_totals(b: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """One vector whose lane i is the sum of the lanes of vector i; as many vectors as lanes, a power of two."""
    while len(vectors) > 1:
        half, lanes = len(vectors) // 2, vectors[0].type.count
        kept = [i + (lanes if i & half else 0) for i in range(lanes)]
        other = [(i ^ half) + (lanes if i & half else 0) for i in range(lanes)]
        pairs = [(vectors[i], vectors[i + half]) for i in range(half)]
        vectors = [b.fadd(shuffled(b, x, y, kept), shuffled(b, x, y, other)) for x, y in pairs]
    return vectors[0]


def softmax_exp(isa: Isa) -> Any:
    """`softmax_exp(isa)` in the factory, `name(x)` in the kernel: exp(x) of a vector of x <= 0, relative error 1e-7.

    Exactly 1 for 0 and exactly 0 below -86; in two thirds of v.exp's instructions.
    """
    magic = 12582912.0  # 1.5 · 2^23: added, it leaves the nearest integer in the low bits

    @operation
    def exp(x: Any) -> Defined:
        def lowered(b: ir.IRBuilder, p: ir.Value) -> ir.Value:
            f = lambda value: number(p.type, value)  # noqa: E731
            words = ir.VectorType(I32, p.type.count)
            shifted = fused(b, isa, p, f(1.44269502162933349609375), f(magic))
            whole = b.fsub(shifted, f(magic))
            r = fused(b, isa, whole, f(-0.693359375), p)
            r = fused(b, isa, whole, f(2.12194440e-4), r)
            y = f(1.0 / 5040)
            for coefficient in (1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0):
                y = fused(b, isa, y, r, f(coefficient))
            power = b.shl(b.bitcast(shifted, words), number(words, 23))  # the exponent of 2^n, n >= -124
            y = b.bitcast(b.add(b.bitcast(y, words), power), p.type)
            return b.select(b.fcmp_ordered("<", p, f(-86.0)), f(0.0), y)

        return x, lowered

    return exp


def transformed(isa: Isa, columns: int) -> Any:
    """`transformed(isa, columns)` in the factory: name(row, factor) multiplies float32[columns], in place, by a factor
    and the Walsh-Hadamard matrix."""
    lanes, floats = isa.lanes, ir.VectorType(F32, isa.lanes)

    def within(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
        for step in (1 << i for i in range(lanes.bit_length() - 1)):
            other = shuffled(b, x, x, [i ^ step for i in range(lanes)])
            lower = [i + lanes if i & step else i for i in range(lanes)]
            x = shuffled(b, b.fadd(x, other), b.fsub(other, x), lower)
        return x

    @operation
    def transform(row: Any, factor: Any) -> Defined:
        def lowered(b: ir.IRBuilder, start: ir.Value, by: ir.Value) -> ir.Value:
            place, factors = pointer(b, start, I8), spread(b, by, lanes)
            offsets = range(0, 4 * columns, 4 * lanes)
            held = [within(b, b.fmul(_vector(b, place, offset, floats), factors)) for offset in offsets]
            step = 1
            while step < len(held):
                pairs = {i: (held[i & ~step], held[i | step]) for i in range(len(held))}
                held = [b.fsub(x, y) if i & step else b.fadd(x, y) for i, (x, y) in pairs.items()]
                step *= 2
            for offset, x in zip(offsets, held, strict=True):
                b.store(x, b.bitcast(b.gep(place, [I64(offset)], source_etype=I8), floats.as_pointer()), align=4)
            return ir.Constant(I8.as_pointer(), None)

        return types.void, lowered

    return transform


def products(isa: Isa, queries: int, format: Format, out_stride: int) -> Any:
    """`products(isa, queries, format, out_stride)` in the factory: queries · keys == lanes inner products at once.

    name(q, q_stride, rows, row_stride, last, spans, out, ahead): float32 out[i, j] = q[i] · rows[min(j, last)], for
    rows of `spans` times `span` columns; strides in bytes. Rows lie without gaps, and as much as they hold is
    prefetched from `ahead` bytes behind them.
    """
    lanes, keys, columns = isa.lanes, isa.lanes // queries, span(isa, format)
    cells = [(i, j) for i in range(queries) for j in range(keys)]
    starts, nbytes = range(0, columns, lanes), format.row_nbytes(columns)
    floats = ir.VectorType(F32, lanes)

    def add(b: ir.IRBuilder, place: ir.Value, query: list[list[ir.Value]], sums: list[ir.Value]) -> None:
        """A span of one row times that of every query; a scale goes to what is fewer, columns or sums."""
        scale = _scale(b, isa, place, format, 0)
        values = [_columns(b, isa, place, format, c) for c in starts]
        if scale is not None and queries >= len(starts):
            values, scale = [b.fmul(value, scale) for value in values], None
        for one, held in zip(query, sums, strict=True):
            total = b.load(held) if scale is None else b.fmul(one[0], values[0])
            for m in range(0 if scale is None else 1, len(starts)):
                total = fused(b, isa, one[m], values[m], total)
            b.store(total if scale is None else fused(b, isa, total, scale, b.load(held)), held)

    @operation
    def inner_products(
        q: Any, q_stride: Any, rows: Any, row_stride: Any, last: Any, spans: Any, out: Any, ahead: Any
    ) -> Defined:
        def lowered(b: ir.IRBuilder, *values: ir.Value) -> ir.Value:
            query, query_step, key, key_step, end, count, target, distance = values
            held = {cell: cgutils.alloca_once_value(b, ir.Constant(floats, [0.0] * lanes)) for cell in cells}
            query_starts = [b.add(query, b.mul(query_step, I64(i))) for i in range(queries)]
            distance = b.add(distance, b.mul(key_step, I64(keys)))
            places = [b.select(b.icmp_signed("<", I64(j), end), I64(j), end) for j in range(keys)]
            key_starts = [b.add(key, b.mul(key_step, place)) for place in places]
            for cell in cells:
                b.store(ir.Constant(floats, [0.0] * lanes), held[cell])
            with cgutils.for_range(b, count) as loop:
                _prefetch(b, isa, _place(b, key, loop.index, max(keys * nbytes, LINE)), distance, keys * nbytes)
                places = [_place(b, s, loop.index, 4 * columns) for s in query_starts]
                spread_query = [[_vector(b, place, 4 * c, floats) for c in starts] for place in places]
                for j, start in enumerate(key_starts):
                    add(b, _place(b, start, loop.index, nbytes), spread_query, [held[i, j] for i in range(queries)])
            total = _lane_totals(b, [b.load(held[cell]) for cell in cells])
            for i in range(queries):
                part = shuffled(b, total, total, list(range(i * keys, (i + 1) * keys)))
                b.store(part, pointer(b, b.add(target, I64(i * out_stride)), part.type), align=4)
            return ir.Constant(I8.as_pointer(), None)

        return types.void, lowered

    return inner_products


def weighted_sums(isa: Isa, sets: int, columns: int, format: Format) -> Any:
    """`weighted_sums(isa, sets, columns, format)` in the factory: sums of rows, kept in registers.

    name(shares, share_stride, rows, row_stride, count, sums, sums_stride, ahead): for i < sets and c < columns,
    sums[i, c] += shares[i, k] · rows[k, c] for k < count, in order, all float32 but the rows; strides in bytes. What
    stands `ahead` bytes behind a row is prefetched. Sums that the registers cannot hold take a pass more.
    """
    width = min(columns, (16 if isa.lanes == 16 else 8) // sets * isa.lanes)

    @operation
    def sums_of_rows(
        shares: Any, share_stride: Any, rows: Any, row_stride: Any, count: Any, sums: Any, sums_stride: Any, ahead: Any
    ) -> Defined:
        def lowered(b: ir.IRBuilder, *values: ir.Value) -> ir.Value:
            for first in range(0, columns, width):
                _add_rows(b, isa, sets, range(first, first + width, isa.lanes), format, columns, values)
            return ir.Constant(I8.as_pointer(), None)

        return types.void, lowered

    return sums_of_rows


def _add_rows(
    b: ir.IRBuilder, isa: Isa, sets: int, strip: range, format: Format, columns: int, values: Sequence[ir.Value]
) -> None:
    """A pass of `weighted_sums` over the columns of a strip, each the first of a vector."""
    share, share_step, row, row_step, number, target, target_step, distance = values
    floats, blocks = ir.VectorType(F32, isa.lanes), sorted({c // format.elements * format.elements for c in strip})
    cells = [(i, c) for i in range(sets) for c in strip]
    places = {(i, c): b.add(b.add(target, b.mul(target_step, I64(i))), I64(4 * c)) for i, c in cells}
    held = {cell: cgutils.alloca_once_value(b, ir.Constant(floats, [0.0] * isa.lanes)) for cell in cells}
    for cell in cells:
        b.store(fetch(b, places[cell], floats), held[cell])
    starts = [b.add(share, b.mul(share_step, I64(i))) for i in range(sets)]
    with cgutils.for_range(b, number) as loop:
        place = pointer(b, b.add(row, b.mul(loop.index, row_step)), I8)
        if strip.start == 0:
            _prefetch(b, isa, place, distance, format.row_nbytes(columns))
        parts = {c: _columns(b, isa, place, format, c) for c in strip}
        scales = {} if format.elements == 1 else {c: _scale(b, isa, place, format, c) for c in blocks}
        if scales and sets * len(blocks) >= len(strip):  # a scale goes to what is fewer, vectors or factors
            parts = {c: b.fmul(part, scales[c // format.elements * format.elements]) for c, part in parts.items()}
            scales = {}
        for i, start in enumerate(starts):
            plain = spread(b, _vector(b, _place(b, start, loop.index, 4), 0, F32), isa.lanes)
            factors = {c: b.fmul(plain, scale) for c, scale in scales.items()}
            for c, part in parts.items():
                factor = factors.get(c // format.elements * format.elements, plain)
                b.store(fused(b, isa, factor, part, b.load(held[i, c])), held[i, c])
    for cell in cells:
        b.store(b.load(held[cell]), pointer(b, places[cell], floats), align=4)


def widened(isa: Isa, format: Format) -> Any:
    """`widened(isa, format)` in the factory: name(source, target) writes the float32 of one `span` of a row."""

    @operation
    def floats_of_span(source: Any, target: Any) -> Defined:
        def lowered(b: ir.IRBuilder, place: ir.Value, out: ir.Value) -> ir.Value:
            place, out = pointer(b, place, I8), pointer(b, out, I8)
            scale = _scale(b, isa, place, format, 0)
            for c in range(0, span(isa, format), isa.lanes):
                values = _columns(b, isa, place, format, c)
                values = values if scale is None else b.fmul(values, scale)
                b.store(values, b.bitcast(b.gep(out, [I64(4 * c)], source_etype=I8), values.type.as_pointer()), align=4)
            return ir.Constant(I8.as_pointer(), None)

        return types.void, lowered

    return floats_of_span


def outer_products(isa: Isa, rows: int, stride: int, *, across: bool) -> Any:
    """`outer_products(isa, rows, stride, across)` in the factory: a tile `rows` high and two vectors of tokens wide.

    name(matrix, panel, count, sums): for r < rows and the 2 · lanes columns t of panel and sums, sums[r, t] +=
    matrix[r, k] · panel[k, t] for k < count, in order, each lane for itself, all float32. matrix[r, k] stands at
    matrix + r · stride + 4 k, or with `across` at matrix + k · stride + 4 r; panel and sums have no gaps.
    """
    nbytes, width = 4 * isa.lanes, 8 * isa.lanes
    row_step, column_step = (4, stride) if across else (stride, 4)
    cells = [(r, m) for r in range(rows) for m in range(2)]
    floats = ir.VectorType(F32, isa.lanes)

    @operation
    def tile(matrix: Any, panel: Any, count: Any, sums: Any) -> Defined:
        def lowered(b: ir.IRBuilder, *values: ir.Value) -> ir.Value:
            left, right, number, target = values
            target = pointer(b, target, I8)
            held = {}
            for r, m in cells:
                held[r, m] = cgutils.alloca_once(b, floats)
                b.store(_vector(b, target, r * width + m * nbytes, floats), held[r, m])
            with cgutils.for_range(b, number) as loop:
                column, tokens = _place(b, left, loop.index, column_step), _place(b, right, loop.index, width)
                columns = [_vector(b, tokens, m * nbytes, floats) for m in range(2)]
                for r in range(rows):
                    factor = spread(b, _vector(b, column, r * row_step, F32), isa.lanes)
                    for m in range(2):
                        b.store(fused(b, isa, factor, columns[m], b.load(held[r, m])), held[r, m])
            for r, m in cells:
                place = b.gep(target, [I64(r * width + m * nbytes)], source_etype=I8)
                b.store(b.load(held[r, m]), b.bitcast(place, floats.as_pointer()), align=4)
            return ir.Constant(I8.as_pointer(), None)

        return types.void, lowered

    return tile
