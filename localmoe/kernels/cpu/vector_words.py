"""Vector operations for code books, 512 bits wide: look-ups of words and of entries of eight bytes, choices by bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils

from localmoe.kernels.cpu.isa import Isa
from localmoe.kernels.cpu.vector import I32, I64, Lowering, call, constant, kind, operation
from localmoe.kernels.cpu.vector_memory import fetch, like, number

I1, I8, F64 = ir.IntType(1), ir.IntType(8), ir.DoubleType()
Defined = tuple[types.Type, Lowering] | None


def operations(isa: Isa) -> dict[str, Any]:
    return {**_look_ups(), **_choices()} if isa.name == "avx512" else {}


def _look_ups() -> dict[str, Any]:
    def words(values: list[int]) -> Any:
        """v.words(values) in the factory, `name(indices u16x32)` in the kernel: the values at the indices. There are 64
        or another power of two above it; bits that no index needs may be anything."""
        of = kind("u16", 32)
        tables = [constant(of, values[i : i + 32]) for i in range(0, len(values), 32)]

        @operation
        def look_up_words(indices: Any) -> Defined:
            def lowered(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
                name, bit = "llvm.x86.avx512.vpermi2var.hi.512", 64
                found = [call(b, name, of.ir, p, x, q) for p, q in zip(tables[::2], tables[1::2], strict=True)]
                while len(found) > 1:
                    upper = b.icmp_unsigned("!=", b.and_(x, number(of.ir, bit)), number(of.ir, 0))
                    found = [b.select(upper, q, p) for p, q in zip(found[::2], found[1::2], strict=True)]
                    bit *= 2
                return found[0]

            return (of, lowered) if indices == of else None

        return look_up_words

    def entries(values: npt.NDArray[Any]) -> Any:
        """v.entries(table of (n, 8) small integers) in the factory, `name(address of u16 [8])` in the kernel: eight
        rows of the table, u8x64."""
        data = np.ascontiguousarray(values, np.uint8).tobytes()

        @operation
        def load_entries(address: types.Type) -> Defined:
            def lowered(b: ir.IRBuilder, a: ir.Value) -> ir.Value:
                table = cgutils.global_constant(b, "entries", ir.Constant(ir.ArrayType(I8, len(data)), bytearray(data)))
                table.align = 64
                found = ir.Constant(ir.VectorType(F64, 8), ir.Undefined)  # of floats: as integers, a load is two steps
                for half in range(2):
                    four = fetch(b, b.add(a, I64(8 * half)), I64)
                    for i in range(4):
                        index = b.and_(b.lshr(four, I64(16 * i)), I64(0xFFFF))
                        # Indexed from the table: from a sum of integers, the address would be worked out each time.
                        place = b.bitcast(b.gep(table, [I64(0), b.mul(index, I64(8))]), F64.as_pointer())
                        found = b.insert_element(found, b.load(place, align=8, typ=F64), I32(4 * half + i))
                return b.bitcast(found, kind("u8", 64).ir)

            return kind("u8", 64), lowered

        return load_entries

    return {"words": words, "entries": entries}


def _choices() -> dict[str, Any]:
    @operation
    def merged(mask: Any, x: Any, y: Any) -> Defined:
        """v.merged(mask, x, y): the bits of x where those of the mask are set, else the bits of y; one instruction,
        where LLVM makes two or three of the same expression."""
        wide = ir.VectorType(I32, 16)

        def lowered(b: ir.IRBuilder, *values: ir.Value) -> ir.Value:
            given = [b.bitcast(value, wide) for value in values]
            return b.bitcast(call(b, "llvm.x86.avx512.pternlog.d.512", wide, *given, I32(0xCA)), x.ir)

        return (x, lowered) if mask == x == y else None

    @operation
    def negative(x: Any, mask: Any) -> Defined:
        """v.negative(x, mask): -x in the lanes i where bit i of an int64 is set; x has 64 lanes."""

        def lowered(b: ir.IRBuilder, p: ir.Value, m: ir.Value) -> ir.Value:
            return b.select(b.bitcast(m, like(p.type, I1)), b.neg(p), p)

        return x, lowered

    return {"merged": merged, "negative": negative}
