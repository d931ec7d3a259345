"""Operations of a kernel on the system and the processor's mode: futex calls, subnormal mode. Imports numba."""

from __future__ import annotations

import platform
import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from localmoe.kernels.cpu.isa import is_x86
from localmoe.kernels.cpu.vector import I32, I64, Lowering, call, operation

I8 = ir.IntType(8)
Defined = tuple[types.Type, Lowering] | None
# The futex call's number and the assembly of a system call with six arguments (number first).
_X86 = (202, "syscall", "={rax},{rax},{rdi},{rsi},{rdx},{r10},{r8},{r9},~{rcx},~{r11},~{memory}")
_ARM = (98, "svc #0", "={x0},{x8},{x0},{x1},{x2},{x3},{x4},{x5},~{memory}")


def linux_system_call() -> Any:
    """`call(address, operation, value)`: the futex system call, or None where there is none. Written as assembly, so
    that a kernel needs no symbol of the C library."""
    machine = platform.machine().lower()
    if sys.platform != "linux" or not (is_x86() or machine == "aarch64"):
        return None
    number, text, constraints = _X86 if is_x86() else _ARM

    @operation
    def system_call(address: types.Type, what: types.Type, value: types.Type) -> Defined:
        def lowered(b: ir.IRBuilder, a: ir.Value, o: ir.Value, x: ir.Value) -> ir.Value:
            assembly = ir.InlineAsm(ir.FunctionType(I64, [I64] * 7), text, constraints, side_effect=True)
            return b.call(assembly, [I64(number), a, o, x, I64(0), I64(0), I64(0)])

        return types.int64, lowered

    return system_call


def denormal_mode() -> tuple[Any, Any]:
    """`mode()` -> int64, and `set_mode(int64)`."""

    @operation
    def mode() -> Defined:
        def lowered(b: ir.IRBuilder) -> ir.Value:
            if not is_x86():
                return I64(0)
            word = cgutils.alloca_once(b, I32)
            call(b, "llvm.x86.sse.stmxcsr", ir.VoidType(), b.bitcast(word, I8.as_pointer()))
            return b.zext(b.load(word), I64)

        return types.int64, lowered

    @operation
    def set_mode(value: types.Type) -> Defined:
        def lowered(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
            if is_x86():
                word = cgutils.alloca_once(b, I32)
                b.store(b.trunc(x, I32), word)
                call(b, "llvm.x86.sse.ldmxcsr", ir.VoidType(), b.bitcast(word, I8.as_pointer()))
            return ir.Constant(I8.as_pointer(), None)

        return types.void, lowered

    return mode, set_mode
