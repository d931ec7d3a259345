"""Operations of a kernel on the processor's mode for subnormal numbers. Imports numba."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from localmoe.kernels.cpu.isa import Isa
from localmoe.kernels.cpu.vector import I32, I64, Lowering, call, operation

I8 = ir.IntType(8)
Defined = tuple[types.Type, Lowering] | None


def denormal_mode(isa: Isa) -> tuple[Any, Any]:
    """`mode()` -> int64, and `set_mode(int64)`."""

    @operation
    def mode() -> Defined:
        def lowered(b: ir.IRBuilder) -> ir.Value:
            if not isa.x86:
                return I64(0)
            word = cgutils.alloca_once(b, I32)
            call(b, "llvm.x86.sse.stmxcsr", ir.VoidType(), b.bitcast(word, I8.as_pointer()))
            return b.zext(b.load(word), I64)

        return types.int64, lowered

    @operation
    def set_mode(value: types.Type) -> Defined:
        def lowered(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
            if isa.x86:
                word = cgutils.alloca_once(b, I32)
                b.store(b.trunc(x, I32), word)
                call(b, "llvm.x86.sse.ldmxcsr", ir.VoidType(), b.bitcast(word, I8.as_pointer()))
            return ir.Constant(I8.as_pointer(), None)

        return types.void, lowered

    return mode, set_mode
