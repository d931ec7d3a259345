"""The vector operation at the heart of an 8-bit matrix product: a tile whose integer sums stay in registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from localmoe.kernels.cpu.isa import Isa
from localmoe.kernels.cpu.vector import F32, I32, I64, Lowering, operation, spread
from localmoe.kernels.cpu.vector_maths import dot_products, dot_word_products, fused, small_dot_products
from localmoe.kernels.cpu.vector_memory import fetch, pointer

I8, I16 = ir.IntType(8), ir.IntType(16)
Defined = tuple[types.Type, Lowering] | None
Values = dict[str, ir.Value]
Cells = dict[tuple[int, int], ir.Value]  # by (token, vector of rows)


def operations(isa: Isa) -> dict[str, Any]:
    def integer_tile(vectors: int, tokens: int, group: int, block: int, minima: bool, signed: bool) -> Any:
        """v.integer_tile(vectors, tokens, group, block, minima, signed) in the factory: a tile of an 8-bit matrix
        product.

        name(quants, scales, lows, panel, panel_scales, panel_sums, blocks, sums), R = vectors · lanes rows: adds to
        sums float32[tokens][R] the products of quants uint8[K/4][R][4] with panel int8[K/4][tokens][4], where K is
        `blocks` · `block`. scales are float32[K/group][R]; panel_scales float32[K/block][tokens]. A group's integer sum
        begins at panel_sums int32[K/group][tokens], or with `signed` (quants are int8) at 0; with `minima` too, and
        lows times panel_sums, both float32[K/group], is added. With block > group, panel_scales multiplies the sum over
        a block, whose minima are pairs of int16 [block/group/2][R] and then float32[R] that these are times, panel_sums
        pairs of int16.
        """
        tile = _Tile(isa, vectors, tokens, group, block, minima, signed)

        @operation
        def integer_products(
            quants: Any, scales: Any, lows: Any, panel: Any, panel_scales: Any, panel_sums: Any, blocks: Any, sums: Any
        ) -> Defined:
            names = ("quants", "scales", "lows", "panel", "panel_scales", "panel_sums", "blocks", "sums")

            def lowered(b: ir.IRBuilder, *values: ir.Value) -> ir.Value:
                tile.emit(b, dict(zip(names, values, strict=True)))
                return ir.Constant(I8.as_pointer(), None)

            return types.void, lowered

        return integer_products

    return {"integer_tile": integer_tile}


def _base(b: ir.IRBuilder, start: ir.Value, index: ir.Value, nbytes: int) -> ir.Value:
    return pointer(b, b.add(start, b.mul(index, I64(nbytes))), I8)


def _vector(b: ir.IRBuilder, place: ir.Value, offset: int, of: ir.Type) -> ir.Value:
    # A constant offset from one pointer: as sums of integers, each address would get a register of its own.
    return b.load(b.gep(place, [I64(offset)], source_etype=I8), align=1, typ=of)


@dataclass(frozen=True)
class _Tile:
    isa: Isa
    vectors: int
    tokens: int
    group: int
    block: int
    minima: bool
    signed: bool

    def emit(self, b: ir.IRBuilder, given: Values) -> None:
        floats = ir.VectorType(F32, self.isa.lanes)
        nothing = ir.Constant(floats, [0.0] * self.isa.lanes)
        cells = [(t, m) for t in range(self.tokens) for m in range(self.vectors)]
        places = {(t, m): b.add(given["sums"], I64(t * self.width + 4 * self.isa.lanes * m)) for t, m in cells}
        held = {cell: cgutils.alloca_once_value(b, nothing) for cell in cells}
        if self.block == self.group:
            for cell in cells:
                b.store(fetch(b, places[cell], floats), held[cell])
        with cgutils.for_range(b, given["blocks"]) as loop:
            row = _base(b, given["panel_scales"], loop.index, 4 * self.tokens)
            once = [self.broadcast(b, row, t, F32) for t in range(self.tokens)]
            if self.block == self.group:
                self.add_group(b, given, loop.index, held, once)
            else:
                for cell in cells:
                    b.store(nothing, held[cell])
                first = b.mul(loop.index, I64(self.block // self.group))
                with cgutils.for_range(b, I64(self.block // self.group)) as inner:
                    self.add_group(b, given, b.add(first, inner.index), held, None)
                if self.minima:
                    self.add_minima(b, given, loop.index, held)
                for t, m in cells:
                    total = fused(b, self.isa, b.load(held[t, m]), once[t], fetch(b, places[t, m], floats))
                    b.store(total, pointer(b, places[t, m], floats), align=4)
        if self.block == self.group:
            for cell in cells:
                b.store(b.load(held[cell]), pointer(b, places[cell], floats), align=4)

    @property
    def width(self) -> int:
        """Bytes of four columns of the strip, and of its rows' scales."""
        return 4 * self.isa.lanes * self.vectors

    def broadcast(self, b: ir.IRBuilder, place: ir.Value, t: int, of: ir.Type) -> ir.Value:
        return spread(b, _vector(b, place, 4 * t, of), self.isa.lanes)

    def add_group(self, b: ir.IRBuilder, given: Values, g: ir.Value, held: Cells, once: list[ir.Value] | None) -> None:
        """Add a group to the float sums in `held`; `once` holds the tokens' scales where a group is a block."""
        lanes, width = self.isa.lanes, self.width
        floats = ir.VectorType(F32, lanes)
        scales, lows = _base(b, given["scales"], g, width), _base(b, given["lows"], g, width)
        offsets = _base(b, given["panel_sums"], g, 4 * self.tokens)
        totals = self.integer_sums(b, given, g, offsets)
        for m in range(self.vectors):
            scale = _vector(b, scales, 4 * lanes * m, floats)
            low = _vector(b, lows, 4 * lanes * m, floats) if self.minima and once else None
            for t in range(self.tokens):
                factor = b.fmul(scale, once[t]) if once else scale
                total = fused(b, self.isa, b.sitofp(totals[t, m], floats), factor, b.load(held[t, m]))
                if low is not None:
                    total = fused(b, self.isa, low, self.broadcast(b, offsets, t, F32), total)
                b.store(total, held[t, m])

    def add_minima(self, b: ir.IRBuilder, given: Values, block: ir.Value, held: Cells) -> None:
        """Add a block's minima, integers until the last step."""
        lanes, width, pairs = self.isa.lanes, self.width, self.block // self.group // 2
        floats, words, shorts = (ir.VectorType(*of) for of in ((F32, lanes), (I32, lanes), (I16, 2 * lanes)))
        lows = _base(b, given["lows"], block, (pairs + 1) * width)
        sums = _base(b, given["panel_sums"], block, pairs * 4 * self.tokens)
        totals: Cells = dict.fromkeys(held, ir.Constant(words, [0] * lanes))
        for pair in range(pairs):
            minima = [_vector(b, lows, pair * width + 4 * lanes * m, shorts) for m in range(self.vectors)]
            for t in range(self.tokens):
                token = b.bitcast(self.broadcast(b, sums, pair * self.tokens + t, I32), shorts)
                for m in range(self.vectors):
                    totals[t, m] = dot_word_products(b, self.isa, totals[t, m], minima[m], token)
        for (t, m), total in totals.items():
            scale = _vector(b, lows, pairs * width + 4 * lanes * m, floats)
            b.store(fused(b, self.isa, b.sitofp(total, floats), scale, b.load(held[t, m])), held[t, m])

    def integer_sums(self, b: ir.IRBuilder, given: Values, g: ir.Value, offsets: ir.Value) -> Cells:
        lanes, width = self.isa.lanes, self.width
        words, small = ir.VectorType(I32, lanes), ir.VectorType(I8, 4 * lanes)
        weights = _base(b, given["quants"], g, self.group // 4 * width)
        values = _base(b, given["panel"], g, self.group * self.tokens)
        totals: Cells = {}
        for t in range(self.tokens):
            zero = self.minima or self.signed
            begin = ir.Constant(words, [0] * lanes) if zero else self.broadcast(b, offsets, t, I32)
            totals.update({(t, m): begin for m in range(self.vectors)})
        for k in range(self.group // 4):
            quants = [_vector(b, weights, k * width + 4 * lanes * m, small) for m in range(self.vectors)]
            for t in range(self.tokens):
                token = b.bitcast(self.broadcast(b, values, k * self.tokens + t, I32), small)
                for m in range(self.vectors):
                    if self.signed:
                        totals[t, m] = dot_products(b, self.isa, totals[t, m], quants[m], token, signed=True)
                    else:
                        totals[t, m] = small_dot_products(b, self.isa, totals[t, m], quants[m], token)
        return totals
