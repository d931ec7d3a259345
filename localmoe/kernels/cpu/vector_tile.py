"""Vector operations on small matrices: the tiles of matrix multiplications, and transpositions."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from localmoe.kernels.cpu.isa import Isa
from localmoe.kernels.cpu.vector import F32, I32, I64, Lowering, kind, operation, shuffled, spread
from localmoe.kernels.cpu.vector_maths import fused
from localmoe.kernels.cpu.vector_memory import fetch, pointer

I8 = ir.IntType(8)

Defined = tuple[types.Type, Lowering] | None


def operations(isa: Isa) -> dict[str, Any]:
    def tile(rows: int, vectors: int, lanes: int, sums_stride: int) -> Any:
        """v.tile(rows, vectors, lanes, sums_stride) in the factory: an operation that keeps its sums in registers.

        name(weights, row_stride, panel, panel_stride, count, sums): for r < rows and t < vectors · lanes,
        sums[r, t] += weights[r, k] · panel[k, t] for k < count, in order, each lane for itself; strides in bytes.
        """
        of = kind("f32", lanes)
        nbytes = lanes * 4

        @operation
        def inner_products(w: Any, row_stride: Any, panel: Any, panel_stride: Any, count: Any, sums: Any) -> Defined:
            def lowered(b: ir.IRBuilder, *values: ir.Value) -> ir.Value:
                weights, stride, columns, step, number, address = values
                offsets = [[r * sums_stride + i * nbytes for i in range(vectors)] for r in range(rows)]
                places = [[b.add(address, I64(offset)) for offset in row] for row in offsets]
                held = [[cgutils.alloca_once_value(b, fetch(b, place, of.ir)) for place in row] for row in places]
                starts = [b.add(weights, b.mul(stride, I64(r))) for r in range(rows)]
                with cgutils.for_range(b, number) as loop:
                    column = b.add(columns, b.mul(loop.index, step))
                    tokens = [fetch(b, b.add(column, I64(nbytes * i)), of.ir) for i in range(vectors)]
                    for start, row in zip(starts, held, strict=True):
                        weight = spread(b, fetch(b, b.add(start, b.mul(loop.index, I64(4))), F32), lanes)
                        for token, one in zip(tokens, row, strict=True):
                            b.store(fused(b, isa, weight, token, b.load(one)), one)
                for row, one_row in zip(places, held, strict=True):
                    for place, one in zip(row, one_row, strict=True):
                        b.store(b.load(one), pointer(b, place, of.ir), align=4)
                return ir.Constant(ir.IntType(8).as_pointer(), None)

            return types.void, lowered

        return inner_products

    @operation
    def transpose4(source: Any, stride: Any) -> Defined:
        """v.transpose4(address, stride): four columns, each f32x4, of the 4 x 4 floats in rows `stride` bytes apart."""
        four = kind("f32", 4)

        def lowered(b: ir.IRBuilder, address: ir.Value, step: ir.Value) -> ir.Value:
            p, q, r, s = (fetch(b, b.add(address, b.mul(step, I64(i))), four.ir) for i in range(4))
            low, high = shuffled(b, p, q, [0, 4, 1, 5]), shuffled(b, p, q, [2, 6, 3, 7])
            low2, high2 = shuffled(b, r, s, [0, 4, 1, 5]), shuffled(b, r, s, [2, 6, 3, 7])
            halves, masks = ((low, low2), (high, high2)), ([0, 1, 4, 5], [2, 3, 6, 7])
            return cgutils.pack_array(b, [shuffled(b, x, y, mask) for x, y in halves for mask in masks])

        return types.UniTuple(four, 4), lowered

    return {"tile": tile, "transpose4": transpose4, "transpose": _transpose(isa)}


def _transpose(isa: Isa) -> Any:
    @operation
    def transpose(source: Any, stride: Any, target: Any, target_stride: Any) -> Defined:
        """v.transpose(source, stride, target, target stride): a square of as many 32-bit values as a vector has lanes;
        strides in bytes."""
        lanes = isa.lanes
        words = ir.VectorType(I32, lanes)

        def lowered(b: ir.IRBuilder, p: ir.Value, step: ir.Value, q: ir.Value, out_step: ir.Value) -> ir.Value:
            rows = [fetch(b, b.add(p, b.mul(step, I64(i))), words) for i in range(lanes)]
            for i, column in enumerate(transposed(b, rows)):
                b.store(column, pointer(b, b.add(q, b.mul(out_step, I64(i))), words), align=1)
            return ir.Constant(I8.as_pointer(), None)

        return types.void, lowered

    return transpose


def transposed(b: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """n vectors of n lanes, n = 8 or 16, by shuffles that each are one instruction of x86: inside 128-bit pieces, then
    of whole pieces."""
    n = len(rows)
    pieces = range(0, n, 4)

    def each(x: ir.Value, y: ir.Value, mask: list[int]) -> ir.Value:  # lanes 4… of the mask are of y
        return shuffled(b, x, y, [piece + i % 4 + (n if i >= 4 else 0) for piece in pieces for i in mask])

    pairs = [each(rows[i], rows[i + 1], mask) for i in range(0, n, 2) for mask in ([0, 4, 1, 5], [2, 6, 3, 7])]
    fours = []  # fours[4 g + j], piece L: column 4 L + j of rows 4 g to 4 g + 3
    for i in range(0, n, 4):
        for low, high in ((pairs[i], pairs[i + 2]), (pairs[i + 1], pairs[i + 3])):
            fours += [each(low, high, [0, 1, 4, 5]), each(low, high, [2, 3, 6, 7])]

    def whole(x: ir.Value, y: ir.Value, odd: int) -> ir.Value:  # the even or the odd pieces of x, then of y
        return shuffled(b, x, y, [4 * piece + i for piece in range(odd, n // 2, 2) for i in range(4)])

    columns: list[ir.Value] = [None] * n
    for j in range(4):
        groups = fours[j::4]
        if n == 8:
            columns[j], columns[4 + j] = whole(*groups, 0), whole(*groups, 1)
        else:
            for odd in (0, 1):
                x, y = whole(groups[0], groups[1], odd), whole(groups[2], groups[3], odd)
                columns[4 * odd + j], columns[4 * (2 + odd) + j] = whole(x, y, 0), whole(x, y, 1)
    return columns
