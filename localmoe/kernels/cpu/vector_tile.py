"""Vector operations on small float32 matrices: the tile of a matrix multiplication, and 4 x 4 transposition."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from localmoe.kernels.cpu.isa import Isa
from localmoe.kernels.cpu.vector import F32, I64, Lowering, kind, operation, shuffled, spread
from localmoe.kernels.cpu.vector_maths import fused
from localmoe.kernels.cpu.vector_memory import fetch, pointer

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

    return {"tile": tile, "transpose4": transpose4}
